"""Ends a run that hangs: prints the stacks of all threads and what was going on."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque

from jaxft.errors import EXIT_AGAIN
from jaxft.parallel.processes import AGAIN, ALONE, Processes, dump_stacks, leave_with

STEP_SECONDS, STEP_MEDIANS = 300.0, 20.0  # a step may take the larger of so long and so many median steps
OTHERWISE_SECONDS = 7200.0  # reading weights, compiling, evaluating, generating, saving
KEPT = 101  # steps that the median is taken of


class Watchdog:
    """Looks at what the run is at, as it says itself; a thread of its own, inside a `with`.

    `step_seconds` is the least limit of a step, `otherwise_seconds` that of any other phase.
    """

    def __init__(
        self,
        processes: Processes = ALONE,
        *,
        step_seconds: float = STEP_SECONDS,
        otherwise_seconds: float = OTHERWISE_SECONDS,
    ):
        self._processes, self._least, self._otherwise = processes, step_seconds, otherwise_seconds
        self._took: deque[float] = deque(maxlen=KEPT)
        self._now = ("starting", time.monotonic(), otherwise_seconds)  # phase, since when, for how long
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def doing(self, phase: str) -> None:
        """A phase that is no step begins: loading, compiling, evaluating, saving."""
        self._processes.doing(phase)
        self._now = (phase, time.monotonic(), self._otherwise)

    def alive(self) -> None:
        """The phase goes on: a batch of it is done."""
        phase, _, limit = self._now
        self._now = (phase, time.monotonic(), limit)

    def stepping(self, step: int) -> None:
        """Training step `step` begins. The first may take as long as any phase: programs travel to the devices with it."""
        phase, since, _ = self._now
        if phase.startswith("step "):
            self._took.append(time.monotonic() - since)
        limit = max(self._least, STEP_MEDIANS * statistics.median(self._took)) if self._took else self._otherwise
        self._processes.doing(f"step {step}", stepping=bool(self._took))
        self._now = (f"step {step}", time.monotonic(), limit)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *error: object) -> None:
        """Watches no longer."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._least / 4)):
            phase, since, limit = self._now
            if time.monotonic() - since > limit:
                self._bite(f"{phase} has not ended for {limit:.0f} s")

    def _bite(self, why: str) -> None:
        """The others print their stacks too: this process may only be waiting for the one that hangs."""
        self._processes.end(EXIT_AGAIN, why, stacks=True)
        dump_stacks()
        leave_with(EXIT_AGAIN, self._processes.named(f"{why}; the stacks of all threads are above; {AGAIN}"))
