"""What a run tells while it runs: metrics.jsonl and its writers; rates and memory."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from jaxft import chips, disk
from jaxft.config import Config, fingerprint
from jaxft.errors import disk_full
from jaxft.learn.folder import RunFolder, unwritable
from jaxft.learn.progress import tell
from jaxft.learn.stand import Stand
from jaxft.learn.writers import Board, Tracker, Writer, flat

# Of TensorBoard's table of runs.
FINAL_LOSS, FINAL_TASK = "final/best_eval_loss", "final/{}_exact_match"


class Metrics:
    """Writes each record to `metrics.jsonl` and tells it to the writers, such as TensorBoard's.

    Opened with the `stand` of a run that goes on at step `resumed`, it first drops what had been logged beyond that step,
    and evaluations that the stand does not know and that come again, so that a resumed run's log equals an uninterrupted
    one's. Of several processes one `writes`, and has writers.
    """

    def __init__(self, folder: Path, resumed: int | None = None, stand: Stand | None = None, writes: bool = True):
        self.writers: list[Writer] = []
        self._file = folder / "metrics.jsonl" if writes else None
        if self._file is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = [] if resumed is None else [r for r in read(folder) if r["step"] <= resumed and not _again(r, stand)]
            disk.write_text(self._file, "".join(json.dumps(record) + "\n" for record in kept))
        except OSError as error:
            if disk_full(error):
                raise
            raise unwritable(folder, error) from error

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(error is not None)

    def write(self, record: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`, flushed; `step` is the x axis. Writers get its numbers."""
        if self._file is None:
            return
        with self._file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        self._tell(lambda writer: writer.write(numbers))

    def sync(self) -> None:
        """Has what was written outlast a loss of power, as a checkpoint that counts on it does."""
        if self._file is not None:
            with self._file.open("rb") as stream:
                os.fsync(stream.fileno())

    def text(self, name: str, text: str, step: int) -> None:
        """A text, as it is."""
        self._tell(lambda writer: writer.text(name, text, step))

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """How `values` are spread."""
        self._tell(lambda writer: writer.histogram(name, values, step))

    def scores(self, scores: Mapping[str, float], step: int) -> None:
        """Figures of the whole run, at its end."""
        self._tell(lambda writer: writer.scores(scores, step))

    def _tell(self, told: Callable[[Writer], None]) -> None:
        """One that cannot write any more is left out from there on, and the run goes on."""
        for writer in list(self.writers):
            try:
                told(writer)
            except OSError as error:
                self.writers.remove(writer)
                writer.close(failed=True)
                tell(f"{writer.name}: {error.strerror or error}; the run goes on without it, metrics.jsonl has all")

    def close(self, failed: bool = False) -> None:
        """Has the writers write what is left; again it does nothing."""
        while self.writers:
            self.writers.pop().close(failed)


def _again(record: Mapping[str, Any], stand: Stand | None) -> bool:
    """Whether it is an evaluation of a step that was saved before it was evaluated."""
    return (
        stand is not None
        and "eval_loss" in record
        and record["step"] > (-1 if stand.evaluated is None else stand.evaluated)
    )


def opened(folder: RunFolder, settings: Config, resumed: int | None, stand: Stand | None = None) -> Metrics:
    """A run's log with its writers: TensorBoard, and Weights & Biases where run.wandb asks for it. Raises UserError."""
    metrics = Metrics(folder.path, resumed, stand, writes=folder.processes.first)
    if not folder.processes.first:
        return metrics
    said, project = flat(folder.settings), settings.run.wandb
    scores = [FINAL_LOSS, *map(FINAL_TASK.format, settings.eval.tasks)]
    try:
        metrics.writers.append(Board(folder.path / "tensorboard", resumed, said, scores))
    except OSError as error:
        if disk_full(error):
            raise
        raise unwritable(folder.path / "tensorboard", error) from error
    if project is not None:
        identity = fingerprint(
            folder.settings, folder.results["started"]
        )  # the same one again for a run that is resumed
        metrics.writers.append(Tracker(project, folder.path, folder.place.name, identity, resumed, said))
    return metrics


def final_scores(folder: RunFolder, best_loss: float | None) -> dict[str, float]:
    """Figures of the whole run, under the names that `opened` told the writers."""
    tuned = {task: sides["tuned"] for task, sides in folder.results["tasks"].items() if "tuned" in sides}
    found = {FINAL_TASK.format(task): scores["exact_match"] for task, scores in tuned.items()}
    return found if best_loss is None else {FINAL_LOSS: best_loss} | found


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl; a last line cut off by a kill is left out."""
    file = folder / "metrics.jsonl"
    records = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def evaluation(folder: Path, step: int) -> dict[str, Any] | None:
    """The line of the evaluation at `step`; None where there was none."""
    return next((record for record in read(folder) if record["step"] == step and "eval_loss" in record), None)


def speed(
    steps: int, tokens: int, seconds: float, devices: Sequence[Any], flops_per_token: float | None
) -> dict[str, float]:
    """What `steps` steps over `tokens` real tokens in `seconds` come to, on `devices` of one kind.

    `mfu` is the share of the chips' peak that `flops_per_token` for each real token makes: padding, attention, the head and
    what is recomputed count as nothing. It is left out where the peak is not known, as on a CPU.
    """
    chip = chips.of_device(devices[0].device_kind)
    rate = tokens / seconds
    found = {
        "tokens_per_second": rate,
        "tokens_per_second_per_chip": rate * (chip.devices if chip else 1) / len(devices),
        "seconds_per_step": seconds / steps,
    }
    if chip and chip.flops and flops_per_token:
        found["mfu"] = flops_per_token * rate / (len(devices) * chip.flops)
    return found


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """The most memory in use so far, in GiB: of the fullest device, or of the process where devices do not tell (a CPU's)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    if peaks and None not in peaks:
        return {"device_memory_gib": max(peaks) / chips.GIB}
    peak = _peak_resident_bytes()
    return {} if peak is None else {"host_memory_gib": peak / chips.GIB}


def _peak_resident_bytes() -> int | None:
    """Of this process; getrusage only where there is no /proc, since on Linux it starts from the parent's peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
