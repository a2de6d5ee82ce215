"""Ends a run on SIGTERM, as a machine that is taken away sends it, and on Ctrl-C, so that nothing is lost.

While there is something to save the signal is only noted, and the loop asks; else it ends the run where it stands. Python
hears a signal between two of its own instructions, and compiling is one: a thread hears it at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from jaxft.errors import EXIT_AGAIN, EXIT_INTERRUPTED, Stopped
from jaxft.parallel.processes import ALONE, Processes, leave_with

CODES = {signal.SIGTERM: EXIT_AGAIN, signal.SIGINT: EXIT_INTERRUPTED}
NAMES = {EXIT_AGAIN: "SIGTERM", EXIT_INTERRUPTED: "Ctrl-C"}
GRACE_SECONDS = 3.0  # for an orderly end where nothing is to be saved
GO_ON = "the same command goes on from there"


class Preemption:
    """Hears the signals inside a `with` of the main thread; elsewhere it does nothing, and signals do what they did.

    `hold` and `release` say whether there is anything to save. Of several processes each may hear one, and all agree.
    """

    def __init__(self) -> None:
        self.processes: Processes = ALONE
        self._held, self._asked, self._saved = False, None, "nothing was trained yet"
        self._before: dict[int, Any] = {}
        self._over = threading.Event()

    def hold(self) -> None:
        """From here on there is something to save: who calls it asks `agreed` soon and often."""
        self._held = True

    def release(self, saved: str) -> None:
        """From here on nothing is to be saved, because of what is `saved`; raises Stopped where a signal has come."""
        self._held, self._saved = False, saved
        if self._asked is not None:
            raise self._stopped(self._asked)

    def agreed(self) -> int | None:
        """The exit code with which to save and stop, on all processes alike, which call this together; or None."""
        return self.processes.from_first(lambda: self._asked or self.processes.asked)

    def check(self) -> None:
        """Raises Stopped on all processes alike, which call this together, where one of them has heard a signal."""
        code = self.agreed()
        if code is not None:
            raise self.stopped(code, self._saved)

    def stopped(self, code: int, saved: str) -> Stopped:
        """To raise on all processes alike, once what is `saved` is."""
        self._held = False
        return Stopped(f"stopped by {NAMES[code]}: {saved}; {GO_ON}", code, together=True)

    def __enter__(self) -> Preemption:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reads, writes = os.pipe()
        os.set_blocking(writes, False)
        self._writes, self._wakes = writes, signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        for number in CODES:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:  # as of a job in the background
                self._before[number] = before
                signal.signal(number, self._heard)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Signals do again what they did."""
        self._over.set()
        if not self._before:
            return
        for number, before in self._before.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(self._wakes)
        os.close(self._writes)  # which ends the thread

    def _heard(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two instructions."""
        if self._asked is None:
            self._asked = CODES[signal.Signals(number)]
            if not self._held:
                raise self._stopped(self._asked)

    def _stopped(self, code: int) -> Stopped:
        return Stopped(f"stopped by {NAMES[code]} at {self.processes.phase}: {self._saved}; {GO_ON}", code)

    def _listen(self) -> None:
        """In a thread of its own, whatever the main thread is at."""
        interrupts = 0
        with contextlib.suppress(OSError):
            while heard := os.read(self._reads, 64):
                for number in heard:
                    if number not in self._before or self._over.is_set():
                        continue
                    interrupts += number == signal.SIGINT
                    self._note(CODES[signal.Signals(number)], at_once=interrupts > 1)
        os.close(self._reads)

    def _note(self, code: int, at_once: bool) -> None:
        if at_once:
            self._leave(code)
        if self._held:
            self._asked = self._asked or code
            self.processes.ask(code)
        else:
            timer = threading.Timer(GRACE_SECONDS, self._give_up, [code])
            timer.daemon = True
            timer.start()

    def _give_up(self, code: int) -> None:
        """The main thread has not come to an end: it compiles, reads, or waits for others."""
        if not self._over.is_set() and not self._held:
            self._leave(code)

    def _leave(self, code: int) -> None:
        said = str(self._stopped(code))
        self.processes.end(code, said)
        leave_with(code, self.processes.named(said), mistake=False)
