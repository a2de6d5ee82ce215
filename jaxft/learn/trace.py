"""A trace of chosen steps by jax.profiler, where TensorBoard's profile plugin looks for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax


class Trace:
    """Traces the steps from `steps[0]` to `steps[1]`, both included and counted from 1, into `folder`/plugins/profile/.

    Nothing runs on the devices when the trace begins or ends, so it holds those steps alone. A start in the midst of them
    traces what is left of them. `say` is handed a line for the user at the end.
    """

    def __init__(self, folder: Path, steps: Sequence[int] | None, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._first, self._last = steps or (1, 0)
        self._on = False

    def begin(self, step: int, running: Any) -> float:
        """Before `step`: starts if it is a chosen one, once the arrays `running` are there. Seconds that starting took."""
        if self._on or not self._first <= step <= self._last:
            return 0.0
        jax.block_until_ready(running)
        began = time.monotonic()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call: slows the steps and buries them
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._on, self._first = True, step
        return time.monotonic() - began

    def end(self, step: int, running: Any) -> float:
        """After `step`: ends behind the last chosen one, once the arrays `running` are there. Seconds that writing took."""
        if not self._on or step < self._last:
            return 0.0
        jax.block_until_ready(running)
        began = time.monotonic()
        self.close(step)
        return time.monotonic() - began

    def close(self, step: int) -> None:
        """Ends and writes a trace that is under way; `step` was the last. A trace that cannot be written stops no run."""
        if not self._on:
            return
        self._on = False
        try:
            jax.profiler.stop_trace()
            self._say(f"traced steps {self._first} to {step}: {self._folder / 'plugins' / 'profile'}")
        except (OSError, RuntimeError) as error:
            self._say(f"run.profile: the trace was not written: {error}")
