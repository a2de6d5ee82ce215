"""The run folder: its configuration, its results so far, and whether the same command may resume in it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxft import config, disk
from jaxft.errors import UserError, disk_full, redacted
from jaxft.learn import marker
from jaxft.learn.mirror import Mirror, is_marked, is_remote, remote_path
from jaxft.learn.progress import tell
from jaxft.parallel.processes import ALONE, Processes, leave_with

# What may differ between two starts of one run: it changes neither the numbers trained on nor the order.
FREE = (
    "eval.every_steps", "eval.patience", "eval.min_delta", "optim.stop_after_nonfinite",
    "data.cache", "run.dir", "run.log_every", "run.keep", "run.usd_per_chip_hour", "run.profile",
    "run.compilation_cache", "eval.tasks", "eval.limit", "eval.samples",
    "eval.probe_rows", "run.wandb", "model.verify", "run.allow_change",
)  # fmt: skip
FREE_SECTIONS = ("mesh",)
# What a run that has not ended may go on with otherwise, and says so: the steps to come are not what they would have been.
WARNED = (
    "optim.learning_rate", "optim.schedule", "optim.warmup", "optim.weight_decay", "optim.beta1", "optim.beta2",
    "optim.epsilon", "optim.loraplus_lr_ratio", "optim.clip", "optim.epochs", "optim.max_steps",
)  # fmt: skip
PARTS = ("tensorboard", "checkpoints", "examples")
SHARED_SECONDS = 60.0  # until a network file system shows one host what another has written


class RunFolder:
    """One run's files. Nothing is written before `start`, and by process 0 alone; the others hold what it has read."""

    def __init__(self, settings: config.Config, processes: Processes = ALONE):
        name = settings.run.dir or "runs/run"
        self.processes, self._mirror = processes, None
        self._changes: list[str] = []  # of settings, since the start before this one
        self.place = remote_path(name) if is_remote(name) else Path(name)
        self.path = self.place  # where this process writes
        if is_remote(name) and processes.first:
            self._copy()
        self.settings = json.loads(redacted(json.dumps(config.to_dict(settings))))  # no secret is ever written
        self.results = processes.from_first(self._results_before)

    def _results_before(self) -> dict[str, Any]:
        """results.json of an earlier start, if any; UserError where the folder is not this run's."""
        results, before = _read(self.path / "results.json"), _read(self.path / "config.json")
        if before:
            commit = results.get("model", {}).get("commit")
            if commit and self.settings["model"]["revision"] == commit:  # what the run began on, now by its own name
                before = before | {"model": {**before.get("model", {}), "revision": commit}}
            self._changes = _same_run(self.place, before, self.settings, results.get("state") == "finished")
        elif self.place.exists() and (
            not self.place.is_dir() or any(p.name != disk.LOCK for p in self.place.iterdir())
        ):
            raise UserError(f"run.dir: {self.place} exists and holds no run; give a new or empty folder")
        return results

    @property
    def finished(self) -> bool:
        """Whether a run has ended here; its results are then complete."""
        return self.results.get("state") == "finished"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other runs out of the folder for as long as this one goes on; raises UserError where one is in it.

        Process 0 does it for all of a run. What writers that were killed have left under temporary names goes.
        """
        with contextlib.ExitStack() as stack:
            if self.processes.first:
                self._hold(stack)
            self.results = self.processes.from_first(self._results_before)  # another run may have ended meanwhile
            if self._changes and self.processes.first:
                said = "; ".join(self._changes)
                print(f"changed since this run began, and from here on only: {said}", flush=True)
            yield

    def _hold(self, stack: contextlib.ExitStack) -> None:
        what = f"run.dir: {self.place}"
        if self._mirror is not None and is_marked(str(self.place)) and marker.can_mark():
            stack.enter_context(marker.only_writer(str(self.place), what, self._lost, tell))
            self._copy()  # as it is now
        elif self._mirror is not None:
            needs = " (gs:// needs `pip install 'jaxft[gcs]'`)" if is_marked(str(self.place)) else ""
            tell(f"{what}: nothing keeps other runs out of this storage{needs}; see that none writes here")
        else:
            warning = stack.enter_context(disk.only_writer(self.place, what))
            if warning:
                tell(warning)
            disk.sweep(self.place)
            self._check_parts()

    def _copy(self) -> None:
        if self._mirror is not None:
            self._mirror.close()
        self._mirror = Mirror(self.place)
        self.path = self._mirror.local

    def _lost(self, code: int, why: str) -> None:
        """Ends this process and the others of its run, from any thread."""
        self.processes.end(code, why)
        leave_with(code, self.processes.named(why))

    def _check_parts(self) -> None:
        """Raises UserError where something that an earlier start has made cannot be written to, before hours have passed."""
        for part in (self.place / name for name in PARTS):
            if part.exists() and not (part.is_dir() and os.access(part, os.W_OK | os.X_OK)):
                raise unwritable(part, "no folder, or none that may be written to")

    def start(self, facts: dict[str, Any]) -> None:
        """Creates the folder and writes config.json and the first results.json; UserError where another data set was used."""
        known = self.results.get("data", {}).get("fingerprint")
        allowed = any(key.startswith("data.") for key in self.settings["run"]["allow_change"])
        if known and known != facts["data"]["fingerprint"] and not allowed:
            raise UserError(
                f"run.dir: {self.place} holds a run on other rows, tokenizer or lengths (data {known[:12]} → "
                f"{facts['data']['fingerprint'][:12]}); give a new --run.dir"
            )
        try:
            if self.processes.first:
                self.path.mkdir(parents=True, exist_ok=True)
                _write(self.path / "config.json", self.settings)
            changes = {"changes": [*self.results.get("changes", []), *self._changes]} if self._changes else {}
            self.update(facts | changes | {"tasks": self.results.get("tasks", {}), "state": "running"})
        except OSError as error:
            if disk_full(error):
                raise
            raise unwritable(self.place, error) from error
        written = self.processes.from_first(lambda: self.results)
        if not self.processes.first:
            self._wait_for(written)

    def _wait_for(self, written: dict[str, Any]) -> None:
        """Raises UserError where what process 0 has written does not show here, so that the folder cannot be the same."""
        deadline = time.monotonic() + SHARED_SECONDS
        while _read(self.place / "results.json") != written:
            if time.monotonic() > deadline:
                raise UserError(
                    f"run.dir: {self.place} is not the folder that process 0 writes; several processes need one "
                    "that they share"
                )
            time.sleep(0.2)

    def update(self, facts: dict[str, Any]) -> None:
        """Adds to results.json; a kill leaves the old one or the new one."""
        self.results = {**self.results, **facts}
        if self.processes.first:
            _write(self.path / "results.json", self.results)
            self.send()

    def send(self) -> None:
        """Brings what was written to where it belongs, where that is not this machine."""
        if self._mirror is not None:
            self._mirror.send()


def unwritable(place: Any, error: OSError | str) -> UserError:
    """To raise for a part of a run folder."""
    why = error if isinstance(error, str) else error.strerror or error
    return UserError(f"run.dir: {place} cannot be written: {why}; mend that, or give another run.dir")


def _same_run(path: Any, before: dict[str, Any], now: dict[str, Any], ended: bool) -> list[str]:
    """What is said of settings that a run may go on with otherwise; UserError for those that it may not.

    A setting that was not known yet when the run began counts as its default.
    """
    defaults = config.to_dict(config.Config())
    known = {name: defaults.get(name, {}) | told if isinstance(told, dict) else told for name, told in before.items()}
    old, new = _flat(known), _flat(now)
    allowed = (*WARNED, *now["run"]["allow_change"])
    changed = {
        key: f"{key} {old.get(key)!r} → {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if key not in FREE and key.partition(".")[0] not in FREE_SECTIONS and old.get(key) != new.get(key)
    }
    refused = {key: said for key, said in changed.items() if ended or key not in allowed}
    if refused:
        remedy = "" if ended else f" (or go on all the same with --run.allow_change {' '.join(refused)})"
        said = f"run.dir: {path} holds a run with other settings: {'; '.join(refused.values())}"
        raise UserError(f"{said}; give a new --run.dir{remedy}")
    return list(changed.values())


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in settings.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            flat[section] = values
    return flat


def _read(file: Any) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a new --run.dir") from error
    return found if isinstance(found, dict) else {}


def _write(file: Path, value: dict[str, Any]) -> None:
    disk.write_text(file, json.dumps(value, indent=2) + "\n")
