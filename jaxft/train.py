"""`python -m jaxft.train --config NAME [--section.field value …]`: from a checkpoint and rows to an adapter and a report."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jaxft
from jaxft import command_line, config
from jaxft.errors import UserError, run_process
from jaxft.learn.job import Job
from jaxft.learn.progress import tell

if TYPE_CHECKING:  # JAX and the rest are imported where used: --help and a mistake in the config answer at once
    import optax

    from jaxft.evals.tasks import Answerer
    from jaxft.learn.evaluator import Evaluator
    from jaxft.learn.examples import Examples, Text
    from jaxft.learn.folder import RunFolder
    from jaxft.learn.goodput import Goodput
    from jaxft.learn.loop import Loop, Observer
    from jaxft.learn.metrics import Metrics
    from jaxft.learn.recompute import Compiled
    from jaxft.learn.stand import Stand
    from jaxft.learn.step import TrainState
    from jaxft.parallel.preemption import Preemption
    from jaxft.parallel.watchdog import Watchdog
    from jaxft.weights.checkpoint import Checkpoints
    from jaxft.weights.model import Loaded, Source

PROG = "python -m jaxft.train"
SAMPLE_TOKENS = 128  # of each answer shown at an evaluation


def main(argv: list[str]) -> None:
    """Trains as the config says; the same command resumes, and does nothing where the run has ended."""
    path, overrides, _ = command_line.split(argv, PROG, {})
    run(config.load(path, overrides))


@dataclass(frozen=True)
class Started:
    """A job with its arrays on the devices and its folder open."""

    loaded: Loaded
    compiled: Compiled
    schedule: optax.Schedule
    state: TrainState
    stand: Stand | None  # None: from the beginning
    checkpoints: Checkpoints
    answerer: Answerer
    examples: Examples


def run(settings: config.Config) -> None:
    """One run, in the order in which things can be wrong: config, data, tokenizer, headers, weights, compile, train."""
    began, sole = time.monotonic(), "jax" not in sys.modules
    from jaxft.parallel.preemption import Preemption

    with Preemption() as preemption:
        from jaxft.learn.folder import RunFolder
        from jaxft.learn.goodput import Goodput, process_began
        from jaxft.parallel.compilation import keep_compiled
        from jaxft.parallel.processes import joined
        from jaxft.parallel.watchdog import Watchdog

        goodput = Goodput(process_began() if sole else began)
        with joined(settings.mesh, _alike(settings)) as processes:
            preemption.processes = processes
            folder = RunFolder(settings, processes)
            if folder.finished:
                _say_finished(folder)
                return
            keep_compiled(settings.run.compilation_cache)
            with folder.held(), Watchdog(processes) as watchdog, goodput.ended(folder.path, writes=processes.first):
                _run(settings, folder, Clock(began, watchdog, preemption, goodput))


@dataclass(frozen=True)
class Clock:
    """What goes along with a run: since when it goes on, who is told what it is at, who ends it, and what time it took."""

    began: float  # as time.monotonic() has it
    watchdog: Watchdog
    preemption: Preemption
    goodput: Goodput

    def doing(self, what: str, phase: str) -> None:
        """Something begins, which counts as `phase` in goodput.jsonl."""
        self.watchdog.doing(what)
        self.goodput.begin(phase)

    def alive(self) -> None:
        """A batch of it is done, on all processes; raises Stopped where a signal has come."""
        self.watchdog.alive()
        self.preemption.check()


def _run(settings: config.Config, folder: RunFolder, clock: Clock) -> None:
    from jaxft.learn import metrics

    clock.doing("reading rows", "load")
    job = prepare(settings)
    folder.processes.same("the data", job.data.facts["fingerprint"])
    folder.processes.same("the base model's commit", job.source.commit)
    clock.doing("reading weights and compiling", "load")
    started = start(job, folder, clock.goodput)
    started.answerer.generator.answered = clock.alive
    if started.stand is None:
        clock.doing("measuring the base model", "evaluate")
        _measure_tasks(job, started, folder, "base", started.state.trainable)
    clock.goodput.begin("load")
    evaluator = _evaluator(job, started, clock)
    resumed = None if started.stand is None else int(started.state.step)
    with metrics.opened(folder, settings, resumed, started.stand) as told:
        if started.stand is None:
            told.histogram("data/train_row_tokens", job.data.parts["train"].lengths, 0)
        loop, reason = _train(job, started, folder, clock, evaluator, told)
        best = _best(started, loop)
        tell(f"{reason}; best step {loop.stand.best_step}")
        clock.doing("measuring the best adapter", "evaluate")
        _measure_tasks(job, started, folder, "tuned", best)
        told.scores(metrics.final_scores(folder, loop.stand.best_loss), loop.step)
    clock.doing("writing results", "export")
    if evaluator is not None:
        started.examples.write(evaluator.rows, _texts(job), loop.stand.best_step, loop.step)
    _finish(job, started, folder, clock, loop, reason, best)


def _say_finished(folder: RunFolder) -> None:
    """Nothing to do, but for a report that a kill has kept from being written."""
    tell(f"{folder.place}: this run has ended ({folder.results.get('ended')}); nothing to do")
    if not (folder.place / "report.html").exists():
        _report(folder)
        folder.send()


def _alike(settings: config.Config) -> dict[str, Any]:
    """What has to be the same on all processes of a run."""
    from jaxft.parallel.processes import OWN

    sections = config.to_dict(settings).items()
    values = {f"{name}.{key}": v for name, section in sections for key, v in (section or {"": None}).items()}
    return {"jaxft": jaxft.__version__, **{key: value for key, value in values.items() if key not in OWN}}


def prepare(settings: config.Config) -> Job:
    """Reads rows, headers and the tokenizer, and checks all of them. Raises UserError."""
    from jaxft.data import chat, dataset, rows
    from jaxft.evals import tasks
    from jaxft.learn.writers import check_tracker
    from jaxft.parallel.mesh import check_batch, make_mesh
    from jaxft.weights import model

    check_tracker(settings.run.wandb)
    splits = rows.load(settings.data, settings.run.seed)
    tasks.check(settings.eval.tasks, (splits.test or splits.validation)[: settings.eval.limit])
    source = model.find(settings.model, settings.lora)
    tokenizer = chat.load_tokenizer(source.tokenizer)
    mesh = make_mesh(settings.mesh)
    check_batch(settings.optim, mesh)
    data = dataset.build(settings, splits, tokenizer, source.arch.vocab_size, source.arch.max_positions)
    total = data.train.total_steps(settings.optim.epochs)
    return Job(settings, source, tokenizer, mesh, data, min(total, settings.optim.max_steps or total))


def start(job: Job, folder: RunFolder, goodput: Goodput) -> Started:
    """Reads the weights, opens the run folder, and restores its newest checkpoint where there is one."""
    from jaxft.evals.tasks import Answerer
    from jaxft.learn import description, optim, recompute, step
    from jaxft.learn.examples import Examples
    from jaxft.learn.stand import Stand
    from jaxft.parallel.mesh import usable_bytes
    from jaxft.plans import row
    from jaxft.weights import model
    from jaxft.weights.checkpoint import Checkpoints

    settings, mesh = job.config, job.mesh
    _check_commit(folder.results, job.source, settings.model)
    room = folder.processes.from_first(lambda: usable_bytes(mesh))  # on what fits depends which program is run
    arguments = settings, job.source, mesh, job.steps, job.data.train.largest_batch, room
    with ThreadPoolExecutor(1) as pool:  # compiling holds neither Python's lock nor the disk
        compiling = pool.submit(recompute.compile_step, *arguments)
        outlined = model.outline(job.source, mesh, attention=settings.model.attention)
        loaded = model.materialise(job.source, mesh, outlined, seed=settings.run.seed)
        goodput.begin("compile")
        try:
            compiled = compiling.result()
        except recompute.DoesNotFit as error:
            tell(row.needs(settings, job.source, mesh, error))
            raise
    goodput.begin("load")
    loaded = replace(loaded, graphdef=compiled.outlined.graphdef)
    state, stand = step.initial_state(loaded, compiled.optimizer, mesh), None
    planned = row.expected(settings, job.source, mesh, compiled.policy, compiled.shape[1])
    before = folder.results
    facts = description.facts(job, loaded, compiled, planned, before.get("started"))
    folder.start({"jaxft": jaxft.__version__} | facts)
    checkpoints = Checkpoints(folder.place / "checkpoints", settings.run.keep, folder.processes, tell)
    latest = folder.processes.from_first(lambda: checkpoints.latest)
    if latest is not None:
        state, progress = checkpoints.restore(latest, state)
        stand = Stand(**progress)
    goodput.open(folder.path, latest, writes=folder.processes.first)
    description.tell_all(job, folder, latest, before)
    tell(compiled.said())
    answerer = Answerer(loaded.decoder(), job.tokenizer, job.data.template, settings.eval.max_new_tokens)
    schedule = optim.schedule(settings.optim, job.steps)
    examples = Examples(folder.path, writes=folder.processes.first)
    return Started(loaded, compiled, schedule, state, stand, checkpoints, answerer, examples)


def _check_commit(results: dict[str, Any], source: Source, model: config.Model) -> None:
    """Raises UserError where the run began on another commit of the base: an adapter belongs to the weights it saw."""
    began = results.get("model", {}).get("commit")
    if began is not None and began != source.commit:
        raise UserError(
            f"model.name: {model.name} is now at commit {source.commit}, and this run began on {began}; "
            f"go on with --model.revision {began}, or give another run.dir"
        )


def _measure_tasks(job: Job, started: Started, folder: RunFolder, side: str, trainable: dict[str, Any]) -> None:
    """Measures each of eval.tasks on one side (base or tuned); keeps its scores in results.json, and every answer."""
    from jaxft.evals import tasks

    rows = job.data.task_rows[: job.config.eval.limit]
    for task in job.config.eval.tasks:
        scores, problems = tasks.measure(task, rows, started.answerer, trainable)
        started.examples.keep_answers(task, side, problems)
        known = folder.results["tasks"]
        folder.update({"tasks": known | {task: known.get(task, {}) | {side: scores}}})
        low, high = scores["exact_match_interval"]
        tell(
            f"{task}, {side}: exact match {100 * scores['exact_match']:.1f} % of {scores['problems']} problems "
            f"(95 % interval {100 * low:.1f} to {100 * high:.1f})"
        )


def _evaluator(job: Job, started: Started, clock: Clock) -> Evaluator | None:
    """None where nothing is held out."""
    from jaxft.learn import step
    from jaxft.learn.evaluator import Evaluator

    sets = {name: part.loader for name, part in job.data.measured.items()}
    eval_step = step.make_eval_step(started.loaded, job.mesh)
    return Evaluator(eval_step, started.loaded.frozen, job.mesh, sets, clock.alive) if sets else None


def _train(
    job: Job,
    started: Started,
    folder: RunFolder,
    clock: Clock,
    evaluator: Evaluator | None,
    metrics: Metrics,
) -> tuple[Loop, str]:
    from jaxft.learn import step
    from jaxft.learn.loop import Loop, Parts

    accumulation, compiled = job.config.optim.accumulation_steps, started.compiled
    parts = Parts(
        mesh=job.mesh,
        schedule=started.schedule,
        train=job.data.train,
        evaluator=evaluator,
        train_step=step.make_train_step(started.loaded, compiled.optimizer, job.mesh, accumulation_steps=accumulation),
        compiled={job.data.train.largest_batch: compiled.executable},
        flops_per_token=job.source.arch.flops_per_token(frozen=job.config.lora is not None),
        frozen=started.loaded.frozen,
        checkpoints=started.checkpoints,
        metrics=metrics,
        examples=started.examples,
        observers=_observers(job, started, metrics),
        processes=folder.processes,
        watchdog=clock.watchdog,
        preemption=clock.preemption,
        goodput=clock.goodput,
        tensorboard=folder.path / "tensorboard",
        sent=folder.send,
    )
    loop = Loop(job.config, parts, job.steps, started.state, started.stand, clock.began)
    return loop, loop.run()


def _observers(job: Job, started: Started, metrics: Metrics) -> list[Observer]:
    """What is shown at every evaluation: answers to the first held-out rows, and how far the adapter has moved."""
    from jaxft.evals import tasks
    from jaxft.learn.norms import adapter_norms

    rows, norms = job.data.held_out[: job.config.eval.samples], None
    if job.config.lora is not None:
        norms = adapter_norms(started.loaded.rows, job.source.plan, job.mesh)

    def sample(step: int, trainable: dict[str, Any]) -> dict[str, float]:
        text, stopped = tasks.samples(rows, started.answerer, trainable, SAMPLE_TOKENS)
        metrics.text("samples", text, step)
        return {"eval_samples_stopped": stopped}

    def moved(step: int, trainable: dict[str, Any]) -> dict[str, float]:
        for name, values in norms(trainable).items():
            metrics.histogram(f"lora_norm/{name}", values, step)
        return {}

    wanted = [moved] if norms is not None else []
    return [*wanted, sample] if rows and rows[0].turns[-1].role != "text" else wanted


def _texts(job: Job) -> dict[str, list[Text]]:
    """What the rows that evaluations measure ask and answer."""
    from jaxft.evals.tasks import question
    from jaxft.learn.examples import Text

    return {
        name: [Text(row.origin, question(row), row.turns[-1].content) for row in part.rows]
        for name, part in job.data.measured.items()
    }


def _best(started: Started, loop: Loop) -> dict[str, Any]:
    """The trainable parameters of the best step."""
    best, state = loop.stand.best_step, loop.state
    if best != loop.step:
        state, _ = started.checkpoints.restore(best, state)
    started.checkpoints.close()
    return state.trainable


def _finish(
    job: Job, started: Started, folder: RunFolder, clock: Clock, loop: Loop, reason: str, best: dict[str, Any]
) -> None:
    from jaxft.learn import result

    stand = loop.stand
    folder.update({
        "ended": reason, "step": loop.step, "best_step": stand.best_step, "best_loss": stand.best_loss,
        "train_seconds": stand.seconds, "wall_seconds": loop.wall_seconds(), "tokens": stand.tokens,
        "skipped_steps": stand.skipped,
    })  # fmt: skip
    result.export(job, started.loaded, folder, best)
    folder.update({"state": "finished"})
    clock.goodput.begin("export")
    _report(folder)
    clock.goodput.close()  # before it is sent
    folder.send()


def _report(folder: RunFolder) -> None:
    from jaxft import report

    if folder.processes.first:
        report.write(folder.path)
        tell(f"report: {folder.place / 'report.md'}")


if __name__ == "__main__":
    run_process(main)
