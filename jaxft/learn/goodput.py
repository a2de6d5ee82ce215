"""Where a run's time goes, phase after phase, over all its starts: goodput.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxft import disk

NAME = "goodput.jsonl"
LOST = "lost"
LEAST_SECONDS = 5e-4  # what takes less has no line


class Goodput:
    """One phase follows another without a gap; each is a line as it ends: phase, seconds, start, and the step it led to.

    Phases are import, load, compile, step, data_wait (of the steps, what they waited for), evaluate, save, export. When a run
    goes on from a checkpoint, what came after that one in an earlier start becomes `lost`: it is done again. What a start was
    at when it was killed has no line. Nothing is written before `open`, nor where it does not `write`.
    """

    def __init__(self, began: float, phase: str = "import"):
        """`began` is the `time.monotonic()` at which the first phase did."""
        self._file: Path | None = None
        self._kept: list[str] = []  # until there is a file
        self._phase, self._began, self._waited, self._over = phase, began, 0.0, False

    def begin(self, phase: str, step: int | None = None) -> None:
        """Ends the phase before, which led to `step`."""
        now = time.monotonic()
        took = max(0.0, now - self._began)
        if self._phase == "step" and self._waited:
            self._line("data_wait", min(took, self._waited), step)
            took = max(0.0, took - self._waited)
        self._line(self._phase, took, step)
        self._phase, self._began, self._waited = phase, now, 0.0

    def waited(self, seconds: float) -> None:
        """Part of the steps under way."""
        self._waited += seconds

    def open(self, folder: Path, resumed: int | None, writes: bool = True) -> None:
        """Goes on in the file of earlier starts, whose steps behind step `resumed` are lost; all of them where it is None."""
        if not writes:
            self._kept = []
            return
        self._file = folder / NAME
        if self._file.exists():
            kept = self._file.read_text().splitlines()
            disk.write_text(self._file, "".join(_judged(line, -1 if resumed is None else resumed) for line in kept))
        self._append("".join(self._kept))
        self._kept = []

    def close(self, step: int | None = None) -> None:
        """Writes the last phase; what comes later has no line."""
        self.begin("over", step)
        self._file, self._over = None, True

    @contextlib.contextmanager
    def ended(self, folder: Path, writes: bool = True) -> Iterator[None]:
        """Closed at the end of a `with`, whatever ends it: a signal, a mistake. A start that came to nothing in the folder of
        an earlier one leaves its lines there too."""
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a full disk has been told, and a signal's exit code must stay
                if not self._over and self._file is None and writes and (folder / NAME).exists():
                    self._file = folder / NAME
                    self._append("\n" + "".join(self._kept))  # a kill may have cut the line before
                self.close()

    def _line(self, phase: str, seconds: float, step: int | None) -> None:
        if seconds < LEAST_SECONDS or self._over:
            return
        start = datetime.fromtimestamp(time.time() - (time.monotonic() - self._began), UTC)
        record: dict[str, Any] = {"phase": phase, "seconds": round(seconds, 4), "start": start.isoformat()}
        line = json.dumps(record if step is None else record | {"step": step}) + "\n"
        if self._file is None:
            self._kept.append(line)
            return
        self._append(line)

    def _append(self, lines: str) -> None:
        with self._file.open("a") as stream:
            stream.write(lines)


def _judged(line: str, resumed: int) -> str:
    """A line of an earlier start, as it counts now; none where a kill has cut it."""
    try:
        record = json.loads(line)
        if record.get("step", -1) > resumed:
            record["phase"] = LOST
        return json.dumps(record) + "\n"
    except (ValueError, TypeError, AttributeError):
        return ""


def process_began() -> float:
    """The `time.monotonic()` at which this process did; now, where the system does not tell."""
    now = time.monotonic()
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = float(Path("/proc/uptime").read_text().split()[0]) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
    return now - max(0.0, age)
