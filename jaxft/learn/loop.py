"""The training loop: steps, logging, evaluation, early stopping and saving."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxft.config import Config
from jaxft.data.loader import Loader, Prefetch
from jaxft.errors import Stopped
from jaxft.learn.evaluator import Evaluator
from jaxft.learn.examples import Examples
from jaxft.learn.goodput import Goodput
from jaxft.learn.loss import Tally
from jaxft.learn.metrics import Metrics, memory, speed
from jaxft.learn.nonfinite import Skips, check_state, loss_not_finite
from jaxft.learn.progress import Progress
from jaxft.learn.stand import Stand
from jaxft.learn.step import TrainState, place_batch
from jaxft.learn.trace import Trace
from jaxft.parallel.preemption import Preemption
from jaxft.parallel.processes import ALONE, Processes
from jaxft.parallel.sharding import local_rows
from jaxft.parallel.watchdog import Watchdog
from jaxft.weights.checkpoint import Checkpoints

# (step, trainable parameters) -> figures for the line of an evaluation; `train` hands them in, and what they show they show.
Observer = Callable[[int, dict[str, jax.Array]], Mapping[str, float]]
# Steps handed to the devices before the last one is waited for: they never idle, and a hang is seen where it is.
AHEAD = 2
# What the loop is at, and what it counts as in goodput.jsonl.
PHASES = {"compiling": "compile", "evaluating": "evaluate", "saving": "save", "tracing": "step", "training": "step"}


@dataclass(frozen=True)
class Parts:
    """What a loop runs on; `evaluator` is None where nothing is held out."""

    mesh: Mesh
    schedule: optax.Schedule
    train: Loader
    evaluator: Evaluator | None
    train_step: Callable[..., Any]
    frozen: dict[str, jax.Array]
    checkpoints: Checkpoints
    metrics: Metrics
    examples: Examples | None = None  # keeps what evaluations find of single rows
    observers: Sequence[Observer] = ()  # called at every evaluation
    flops_per_token: float | None = None  # of the layers' linear modules, for mfu
    compiled: Mapping[tuple[int, ...], Any] = field(default_factory=dict)  # training steps, by the shape of the tokens
    processes: Processes = ALONE
    watchdog: Watchdog | None = None  # told what the loop is at
    preemption: Preemption = field(default_factory=Preemption)
    goodput: Goodput = field(default_factory=lambda: Goodput(time.monotonic()))
    tensorboard: Path = Path("runs/run/tensorboard")
    sent: Callable[[], None] = lambda: (
        None
    )  # brings the logs to where they belong, before the checkpoint that needs them


class Loop:
    """One run's loop from `state` to the last step, or until patience runs out."""

    def __init__(self, config: Config, parts: Parts, steps: int, state: TrainState, stand: Stand | None, began: float):
        """`began` is `time.monotonic()` at the start of this process's work, for the seconds of everything."""
        self.config, self.parts, self.steps = config, parts, steps
        self.state, self.step = state, int(state.step)
        self.stand, self._saved = stand or Stand(), None if stand is None else self.step
        self._began = began - self.stand.wall_seconds
        self.progress = Progress(steps, self.step)
        self._key = jax.random.key(config.run.seed)
        self._pending: deque[tuple[int, dict[str, jax.Array]]] = deque()  # steps under way, and their metrics
        self._grad_norm = math.nan  # of the last step
        self._skips = Skips(config.optim.stop_after_nonfinite, parts.train.origins_at)
        self._tokens, self._since = 0, time.monotonic()
        self._steps: dict[tuple[int, ...], Any] = dict(parts.compiled)
        self._line = (self.step, self.stand.tokens, self.stand.seconds)  # at the last log line
        traced = config.run.profile if parts.processes.first else None
        self._trace = Trace(parts.tensorboard, traced, self.progress.say)

    def run(self) -> str:
        """Trains; returns why it ended. State, step and stand are then those of the last step."""
        with self.progress:
            if self._due and self.stand.evaluated != self.step:  # also where a signal had come before it
                self._evaluate_and_save()
            reason = self._ended() or self._train()
        self._doing("saving")
        self._wait_for_disk()
        return reason

    def _train(self) -> str:
        """Steps until the run has ended; returns why it did."""
        self._batches = Prefetch(self._prepare, self.step, self.steps)
        try:
            self._doing("compiling")
            self._compiled(self._prepare(self.step)[0])
            self._doing("training")
            self._since, self._batches.waited = time.monotonic(), 0.0
            self.progress.begin()
            while (reason := self._ended()) is None:
                self._train_once()
                if self.step % self.config.run.log_every == 0 or self.step == self.steps:
                    self._log()
                code = self.parts.preemption.agreed()
                if code is not None:
                    self._save_and_stop(code)
                if self._due:
                    self._evaluate_and_save()
        finally:
            self._batches.close()
            self._trace.close(self.step)
        return reason

    @property
    def _due(self) -> bool:
        """Whether this step is one to evaluate after."""
        return self.step % self.config.eval.every_steps == 0 or self.step == self.steps

    def _doing(self, phase: str) -> None:
        self.parts.goodput.begin(PHASES[phase], self.step)
        if self.parts.watchdog is not None:
            self.parts.watchdog.doing(f"{phase} at step {self.step}")

    def wall_seconds(self) -> float:
        """Seconds of this start so far and of the earlier ones."""
        return time.monotonic() - self._began

    def _ended(self) -> str | None:
        patience, stand = self.config.eval.patience, self.stand
        if patience is not None and stand.bad_evaluations >= patience:
            return f"early stop at step {self.step}: no lower eval_loss in {patience} evaluations since step {stand.best_step}"
        return f"all {self.steps} steps done" if self.step >= self.steps else None

    def _compiled(self, batch: dict[str, jax.Array]) -> Any:
        """The training step for batches of this shape; unpacked rows have a few shapes, packed ones have one."""
        shape = batch["tokens"].shape
        if shape not in self._steps:
            self._save_before_compiling()
            self._doing("compiling")
            began = time.monotonic()
            arguments = self.state, self.parts.frozen, batch, self._key
            self._steps[shape] = self.parts.train_step.lower(*arguments).compile()
            seconds = time.monotonic() - began
            self._since += seconds  # compiling is not training
            self.progress.say(f"compiled the training step for {shape[0]} × {shape[1]} in {seconds:.1f} s")
            self._doing("training")
        return self._steps[shape]

    def _save_before_compiling(self) -> None:
        """A signal that comes then is heard at once, and nothing may be lost."""
        if self._saved is not None and self._saved != self.step:
            self._collect()
            self._save()
        self._wait_for_disk()

    def _train_once(self) -> None:
        first, last = self.config.run.profile or (1, 0)
        if first <= self.step + 1 <= last:
            self._doing("tracing")  # writing a trace takes as long as it takes
        elif self.parts.watchdog is not None:
            self.parts.watchdog.stepping(self.step + 1)
        self.parts.checkpoints.check()  # a disk that is full is told at once, not at the next save
        began = time.monotonic()
        batch, tokens = self._batches.next()
        self.parts.goodput.waited(time.monotonic() - began)
        step = self._compiled(batch)
        self.parts.preemption.hold()
        self._since += self._trace.begin(self.step + 1, [sums for _, sums in self._pending])  # tracing is not training
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
            self.state, sums = step(self.state, self.parts.frozen, batch, self._key)
        self._tokens += tokens
        self.step += 1
        self._pending.append((self.step, sums))
        if len(self._pending) > AHEAD:
            self._take()
        self._since += self._trace.end(self.step, sums)
        self.progress.advance(self.step)

    def _take(self) -> None:
        """Waits for the oldest step under way and adds its sums to the stand. Raises UserError where it was one too many."""
        step, sums = self._pending.popleft()
        found = jax.device_get(sums)
        self._grad_norm = float(found["grad_norm"])
        if found["applied"]:
            self.stand.skipped_in_row = 0
            for i, name in enumerate(Tally._fields):
                self.stand.sums[i] += float(found[name])
            return
        self.stand.skipped, self.stand.skipped_in_row = self.stand.skipped + 1, self.stand.skipped_in_row + 1
        line, record = self._skips.told(step, float(found["nll"]), self._grad_norm, self.stand.skipped)
        self.progress.say(line)
        self.parts.metrics.write(record)
        self._skips.check(step, self.stand.skipped_in_row, self.parts.checkpoints.latest)

    def _collect(self) -> None:
        """Waits for all steps under way."""
        while self._pending:
            self._take()
        self.stand.seconds += time.monotonic() - self._since
        self.stand.tokens += self._tokens
        self._tokens, self._since = 0, time.monotonic()

    def _log(self) -> None:
        self._collect()
        self.parts.goodput.begin("step", self.step)
        waited = self._batches.waited
        line = self.step, self.stand.tokens, self.stand.seconds
        steps, tokens, seconds = (now - before for now, before in zip(line, self._line))
        self._line, self._batches.waited = line, 0.0
        nll, correct, weight = self.stand.sums
        devices = self.parts.mesh.devices.flatten()
        self.stand.sums = [0.0, 0.0, 0.0]
        record = {
            "step": self.step,
            "epoch": self._epoch(),
            **({"loss": nll / weight, "mean_token_accuracy": correct / weight} if weight else {}),
            "learning_rate": float(self.parts.schedule(self.step - 1 - self.stand.skipped)),
            **({"grad_norm": self._grad_norm} if math.isfinite(self._grad_norm) else {}),
            "num_tokens": self.stand.tokens,
            **speed(steps, tokens, max(seconds, 1e-9), devices, self.parts.flops_per_token),
            "data_wait": waited / max(seconds, 1e-9),
            **memory(self.parts.mesh.local_devices),
        }
        self.parts.metrics.write(record)
        self.progress.show(record)

    def _evaluate_and_save(self) -> None:
        self._collect()
        before = dataclasses.replace(self.stand)
        try:
            if self.parts.evaluator is None:
                self.stand.best_step = self.step
            else:
                self._doing("evaluating")
                self._evaluate(self.parts.evaluator)
        except Stopped as stopped:
            if self._saved in (None, self.step):
                raise
            self.stand = before  # it is evaluated by the next start
            self._save_and_stop(stopped.code)
        self.stand.evaluated = self.step
        self._save()
        self._since = time.monotonic()

    def _save(self) -> None:
        self._doing("saving")
        check_state(self.state, self.parts.checkpoints.latest)
        self.parts.metrics.sync()
        self.parts.sent()
        self.stand.wall_seconds = self.wall_seconds()
        self.parts.checkpoints.save(self.step, self.state, dataclasses.asdict(self.stand), self.stand.best_step)
        self._saved = self.step
        self._doing("training")

    def _wait_for_disk(self) -> None:
        """Returns when what was saved is on disk; there is then nothing to lose. Raises Stopped where a signal has come."""
        self.parts.checkpoints.wait()
        if self._saved is not None:
            self.parts.preemption.release(f"step {self._saved} is saved")

    def _save_and_stop(self, code: int) -> None:
        """Raises Stopped, on all processes at this step."""
        if self._saved != self.step:
            self._collect()
            self._save()
        self.parts.checkpoints.wait()
        self.parts.processes.barrier()
        raise self.parts.preemption.stopped(code, f"step {self._saved} is saved")

    def _evaluate(self, evaluator: Evaluator) -> None:
        began = time.monotonic()
        found = evaluator(self.state.trainable)
        figures = evaluator.figures(found)
        loss, record = figures["eval_loss"], {"step": self.step, "epoch": self._epoch(), **figures}
        if not math.isfinite(loss):
            raise loss_not_finite(loss, self.step)
        stand = self.stand
        better = stand.best_loss is None or loss < stand.best_loss - self.config.eval.min_delta
        if better:
            stand.best_loss, stand.best_step, stand.bad_evaluations = loss, self.step, 0
        else:
            stand.bad_evaluations += 1
        if self.parts.examples is not None:
            self.parts.examples.keep(self.step, found, stand.best_step)
        record["eval_seconds"] = time.monotonic() - began
        self.progress.evaluated(record, None if better else (stand.best_loss, stand.best_step))
        for observe in self.parts.observers:
            record |= observe(self.step, self.state.trainable)
        self.parts.metrics.write(record)

    def _epoch(self) -> float:
        if self.step == 0:
            return 0.0
        epoch, done = self.parts.train.locate(self.step - 1)
        return round(epoch + (done + 1) / self.parts.train.steps_in_epoch(epoch), 4)

    def _prepare(self, step: int) -> tuple[dict[str, jax.Array], int]:
        """The batch of a step on the devices, and its number of real tokens."""
        train, mesh = self.parts.train, self.parts.mesh
        batch = train.batch_at(step, local_rows(mesh, train.batch_size))
        return place_batch(batch, mesh), train.tokens_at(step)
