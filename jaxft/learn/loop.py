"""The training loop: steps, logging, evaluation, early stopping and saving."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxft.config import Config
from jaxft.data.loader import Loader, Prefetch
from jaxft.errors import UserError
from jaxft.learn.evaluator import Evaluator
from jaxft.learn.examples import Examples
from jaxft.learn.loss import Tally
from jaxft.learn.metrics import Metrics, memory, speed
from jaxft.learn.progress import Progress
from jaxft.learn.step import TrainState, place_batch
from jaxft.learn.trace import Trace
from jaxft.parallel.processes import ALONE, Processes
from jaxft.parallel.sharding import local_rows
from jaxft.parallel.watchdog import Watchdog
from jaxft.weights.checkpoint import Checkpoints

# (step, trainable parameters) -> figures for the line of an evaluation; `train` hands them in, and what they show they show.
Observer = Callable[[int, dict[str, jax.Array]], Mapping[str, float]]
# Steps handed to the devices before the last one is waited for: they never idle, and a hang is seen where it is.
AHEAD = 2


@dataclass
class Stand:
    """Where a run stands beside its arrays: what a checkpoint keeps of it, JSON-ready."""

    best_loss: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    tokens: int = 0  # real tokens trained on
    seconds: float = 0.0  # spent in training steps, over all starts, compiling apart
    wall_seconds: float = 0.0  # of everything, over all starts, up to the last checkpoint of each
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # nll, correct, weight since the last log line


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
        self.stand, self._resumed = stand or Stand(), stand is not None
        self._began = began - self.stand.wall_seconds
        self.progress = Progress(steps, self.step)
        self._key = jax.random.key(config.run.seed)
        self._pending: list[dict[str, jax.Array]] = []
        self._tokens, self._since = 0, time.monotonic()
        self._steps: dict[tuple[int, ...], Any] = dict(parts.compiled)
        self._line = (self.step, self.stand.tokens, self.stand.seconds)  # at the last log line
        traced = config.run.profile if parts.processes.first else None
        self._trace = Trace(parts.tensorboard, traced, self.progress.say)

    def run(self) -> str:
        """Trains; returns why it ended. State, step and stand are then those of the last step."""
        with self.progress:
            if not self._resumed:
                self._evaluate_and_save()
            reason = self._ended() or self._train()
        self._doing("saving")
        self.parts.checkpoints.wait()
        return reason

    def _train(self) -> str:
        """Steps until the run has ended; returns why it did."""
        self._batches = Prefetch(self._prepare, self.step, self.steps)
        try:
            self._doing("compiling")
            self._compiled(self._prepare(self.step)[0])
            self._since, self._batches.waited = time.monotonic(), 0.0
            self.progress.begin()
            while (reason := self._ended()) is None:
                self._train_once()
                if self.step % self.config.run.log_every == 0 or self.step == self.steps:
                    self._log()
                if self.step % self.config.eval.every_steps == 0 or self.step == self.steps:
                    self._evaluate_and_save()
        finally:
            self._batches.close()
            self._trace.close(self.step)
        return reason

    def _doing(self, phase: str) -> None:
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
            self._doing("compiling")
            began = time.monotonic()
            arguments = self.state, self.parts.frozen, batch, self._key
            self._steps[shape] = self.parts.train_step.lower(*arguments).compile()
            seconds = time.monotonic() - began
            self._since += seconds  # compiling is not training
            self.progress.say(f"compiled the training step for {shape[0]} × {shape[1]} in {seconds:.1f} s")
        return self._steps[shape]

    def _train_once(self) -> None:
        first, last = self.config.run.profile or (1, 0)
        if first <= self.step + 1 <= last:
            self._doing("tracing")  # writing a trace takes as long as it takes
        elif self.parts.watchdog is not None:
            self.parts.watchdog.stepping(self.step + 1)
        self.parts.checkpoints.check()  # a disk that is full is told at once, not at the next save
        batch, tokens = self._batches.next()
        step = self._compiled(batch)
        self._since += self._trace.begin(self.step + 1, self._pending[-1:])  # tracing is not training
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
            self.state, sums = step(self.state, self.parts.frozen, batch, self._key)
        self._pending.append(sums)
        jax.block_until_ready(self._pending[-AHEAD - 1 : -AHEAD])
        self._tokens += tokens
        self.step += 1
        self._since += self._trace.end(self.step, sums)
        self.progress.advance(self.step)

    def _collect(self) -> dict[str, Any]:
        """Waits for the steps under way and adds their sums to the stand; returns the last step's."""
        fetched = jax.device_get(self._pending)
        for sums in fetched:
            for i, name in enumerate(Tally._fields):
                self.stand.sums[i] += float(sums[name])
        self.stand.seconds += time.monotonic() - self._since
        self.stand.tokens += self._tokens
        self._pending, self._tokens, self._since = [], 0, time.monotonic()
        if not all(map(math.isfinite, self.stand.sums)):
            raise UserError(
                f"the loss is not finite by step {self.step}; the last checkpoint, step {self.parts.checkpoints.latest}, is "
                "good: lower optim.learning_rate, or set optim.clip, and start in a new run.dir"
            )
        return fetched[-1] if fetched else {}

    def _log(self) -> None:
        last, waited = self._collect(), self._batches.waited
        line = self.step, self.stand.tokens, self.stand.seconds
        steps, tokens, seconds = (now - before for now, before in zip(line, self._line))
        self._line, self._batches.waited = line, 0.0
        nll, correct, weight = self.stand.sums
        devices = self.parts.mesh.devices.flatten()
        self.stand.sums = [0.0, 0.0, 0.0]
        record = {
            "step": self.step,
            "epoch": self._epoch(),
            "loss": nll / max(weight, 1.0),
            "mean_token_accuracy": correct / max(weight, 1.0),
            "learning_rate": float(self.parts.schedule(self.step - 1)),
            "grad_norm": float(last["grad_norm"]),
            "num_tokens": self.stand.tokens,
            **speed(steps, tokens, max(seconds, 1e-9), devices, self.parts.flops_per_token),
            "data_wait": waited / max(seconds, 1e-9),
            **memory(self.parts.mesh.local_devices),
        }
        self.parts.metrics.write(record)
        self.progress.show(record)

    def _evaluate_and_save(self) -> None:
        self._collect()
        if self.parts.evaluator is None:
            self.stand.best_step = self.step
        else:
            self._doing("evaluating")
            self._evaluate(self.parts.evaluator)
        self._doing("saving")
        self.parts.sent()
        self.stand.wall_seconds = self.wall_seconds()
        self.parts.checkpoints.save(self.step, self.state, dataclasses.asdict(self.stand), self.stand.best_step)
        self._since = time.monotonic()

    def _evaluate(self, evaluator: Evaluator) -> None:
        began = time.monotonic()
        found = evaluator(self.state.trainable)
        figures = evaluator.figures(found)
        loss, record = figures["eval_loss"], {"step": self.step, "epoch": self._epoch(), **figures}
        if not math.isfinite(loss):
            raise UserError(
                f"eval_loss is {loss} at step {self.step}; lower optim.learning_rate and start in a new run.dir"
            )
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
