"""Where a run's records go beside metrics.jsonl: TensorBoard's event files and, where asked for, Weights & Biases."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxft.errors import UserError
from jaxft.learn.events import Events

BINS = 64  # of a histogram; TensorBoard shows half as many
GROUPS = ("eval", "probe")  # of TensorBoard's scalars; a name that begins with neither is train's, as TRL has it


PLACES = ("data.cache", "run.dir", "run.compilation_cache", "mesh.coordinator")
# What Weights & Biases' package would gather by itself.
NOT_SENT = {
    "disable_git": True, "disable_code": True, "x_save_requirements": False, "x_disable_stats": True, "x_disable_meta": True,
    "x_disable_machine_info": True,
}  # fmt: skip


class Writer(Protocol):
    """What takes a run's records, each with its `step`; `scores` are figures of the whole run, told at its end.

    An OSError says that it cannot write any more; `name` says who it is.
    """

    name: str

    def write(self, record: Mapping[str, Any]) -> None: ...
    def text(self, name: str, text: str, step: int) -> None: ...
    def histogram(self, name: str, values: np.ndarray, step: int) -> None: ...
    def scores(self, scores: Mapping[str, float], step: int) -> None: ...
    def close(self, failed: bool) -> None: ...


class Board:
    """TensorBoard's event files in `folder`, under TRL's names; what an earlier start wrote beyond step `resumed` is hidden.

    Flat `settings` stand in its table of runs (HPARAMS) beside the scores of these names. tensorboardX's add_hparams would
    make a second run of them; they are written to the run's own event file instead.
    """

    def __init__(self, folder: Path, resumed: int | None, settings: Mapping[str, Any], scores: Sequence[str]):
        from tensorboardX.summary import hparams

        self.name = f"TensorBoard in {folder}"
        self._events = Events(folder, None if resumed is None else resumed + 1)
        shown = {key: value for key, value in settings.items() if isinstance(value, (str, bool, int, float))}
        *started, self._ended = hparams(shown, dict.fromkeys(scores))
        for summary in started if resumed is None else ():
            self._events.add(summary)

    def write(self, record: Mapping[str, Any]) -> None:
        """A scalar per finite number."""
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                group, _, rest = name.partition("_")
                self._scalar(f"{group}/{rest}" if group in GROUPS else f"train/{name}", value, record["step"])

    def text(self, name: str, text: str, step: int) -> None:
        """A text panel, as an indented code block, so that nothing in it is read as Markdown or HTML."""
        from tensorboardX import summary

        self._events.add(summary.text(name, "\n".join("    " + line for line in text.splitlines())), step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Of finite numbers; of none, and of others, nothing is shown."""
        from tensorboardX import summary

        if values.size and np.isfinite(values).all():
            self._events.add(summary.histogram(name, values, BINS), step)

    def scores(self, scores: Mapping[str, float], step: int) -> None:
        """A scalar each, under its own name; the table of runs then has the run as ended."""
        for name, value in scores.items():
            self._scalar(name, value, step)
        self._events.add(self._ended)

    def _scalar(self, name: str, value: float, step: int) -> None:
        from tensorboardX import summary

        self._events.add(summary.scalar(name, value), step)

    def close(self, failed: bool) -> None:
        """Nothing is left to be written."""
        self._events.close()


class Tracker:
    """A run on Weights & Biases: its flat settings and the records of metrics.jsonl, and of the machine nothing.

    Where they go, and whether anywhere, is the package's own matter: WANDB_MODE, WANDB_BASE_URL, `wandb login`. Raises
    UserError where it cannot begin.
    """

    def __init__(
        self, project: str, folder: Path, name: str, identity: str, resumed: int | None, settings: Mapping[str, Any]
    ):
        check_tracker(project)
        import wandb

        self.name = "Weights & Biases"
        known = wandb.Settings.model_fields  # of which releases add some
        only = wandb.Settings(console="off", **{name: value for name, value in NOT_SENT.items() if name in known})
        try:
            self._run = wandb.init(
                project=project, dir=str(folder), id=identity, name=name, config=dict(settings), settings=only,
                resume=None if resumed is None else "allow",
            )  # fmt: skip
        except (wandb.errors.Error, OSError) as error:
            raise UserError(f"run.wandb: {error}; run `wandb login`, or set WANDB_MODE=offline") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """One entry, at the record's step."""
        self._run.log(dict(record), step=record["step"])

    def text(self, name: str, text: str, step: int) -> None:
        """Not sent: texts are of the data."""

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Not sent."""

    def scores(self, scores: Mapping[str, float], step: int) -> None:
        """Into the run's summary."""
        self._run.summary.update(dict(scores))

    def close(self, failed: bool) -> None:
        """Waits until all is sent, or on disk where offline."""
        self._run.finish(exit_code=int(failed))


def check_tracker(project: str | None) -> None:
    """Raises UserError where a project is named and the package is not here."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("run.wandb: the package wandb is not here; `pip install 'jaxft[wandb]'`, or set run.wandb none")


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run's sections as `section.field`, without what is off, and without where things lie on this machine."""
    return {
        f"{section}.{name}": value
        for section, values in settings.items()
        for name, value in (values or {}).items()
        if value not in (None, [], {}) and f"{section}.{name}" not in PLACES
    }
