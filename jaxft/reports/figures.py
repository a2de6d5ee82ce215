"""The figures of a report: what report.json holds and the pages show."""

from __future__ import annotations

import math
import statistics
from typing import Any

from jaxft import chips
from jaxft.reports import planned
from jaxft.reports.fitting import number
from jaxft.reports.folder import RunRecord
from jaxft.reports.records import of_split
from jaxft.reports.sections import goodput, movement, teacher_forced

TOLD = ("versions", "device", "mesh", "model", "data", "steps", "step", "train_seconds", "wall_seconds", "tokens")
MEDIANS = ("tokens_per_second", "tokens_per_second_per_chip", "seconds_per_step", "data_wait", "mfu")
PEAKS = ("device_memory_gib", "host_memory_gib")
EVALUATED = (
    "eval_loss", "eval_bits_per_byte", "eval_mean_token_accuracy", "eval_token_accuracy_without_annotations",
    "eval_token_accuracy_final_answer", "probe_loss", "probe_mean_token_accuracy",
)  # fmt: skip


def summarise(run: RunRecord) -> dict[str, Any]:
    """The figures, JSON-ready; None stands for what the folder does not tell.

    `start` is step 0 (the base model) for eval figures and the first log line for train figures; `best` is the step of
    the exported weights, not each figure's own best; `end` is the last line.
    """
    best = best_step(run)
    evaluated = {key: _evaluated(run, key, best) for key in EVALUATED}
    if evaluated["eval_bits_per_byte"]["start"] is None:
        evaluated["eval_bits_per_byte"] = teacher_forced.bits_per_byte(of_split(run.examples, "validation"))
    eval_loss, train_loss = evaluated["eval_loss"], _trained(run, "loss", best)
    logged = _logged(run)
    return {
        "run": run.name,
        "state": _word(run.fact("state")),
        "ended": _word(run.fact("ended")),
        "started": _word(run.fact("started")),
        "jaxft": _word(run.fact("jaxft")),
        "versions": _flat(run.fact("versions")),
        "device": _flat(run.fact("device")),
        "mesh": _flat(run.fact("mesh")),
        "model": _flat(run.fact("model")),
        "data": _flat(run.fact("data")),
        "steps": run.count("steps"),
        "step": _last_step(run),
        "best_step": best,
        **evaluated,
        "eval_perplexity": {k: None if v is None or v > 700 else math.exp(v) for k, v in eval_loss.items()},
        "train_loss": train_loss,
        "train_mean_token_accuracy": _trained(run, "mean_token_accuracy", best),
        "last_evaluation_step": run.evaluations[-1]["step"] if run.evaluations else None,
        "train_start_step": run.train[0]["step"] if run.train else None,
        "decrease": _decreases(train_loss, eval_loss),
        "teacher_forced": teacher_forced.measure(run),
        **movement.measure(run, best),
        "tasks": _tasks(run),
        **_spent(run),
        **logged,
        "goodput_phases": goodput.measure(run),
        "planned_and_measured": planned.compare(run, logged),
        "missing": missing(run),
    }


def best_step(run: RunRecord) -> int | None:
    """The step whose weights are exported: as the run says, else that of the lowest eval_loss."""
    told = run.count("best_step")
    if told is not None:
        return int(told)
    return min(run.evaluations, key=lambda r: r["eval_loss"])["step"] if run.evaluations else None


def missing(run: RunRecord) -> list[str]:
    """What a whole run's folder would tell and this one does not, in words."""
    words = list(run.damage)
    if run.results and run.fact("state") != "finished":
        words.append("the end of the run: results.json was not rewritten, so the run is under way or was stopped")
    if not run.train:
        words.append("training lines: metrics.jsonl has none")
    if not run.evaluations:
        words.append("validation lines: metrics.jsonl has none")
    elif run.evaluations[0]["step"] != 0:
        words.append("the base model's evaluation at step 0")
    if run.results:
        absent = [key for key in TOLD if run.fact(key) is None]
        words += [f"in results.json: {', '.join(absent)}"] if absent else []
    wall, steps = run.count("wall_seconds"), run.count("train_seconds")
    if wall is not None and steps is not None and steps > wall:
        words.append("the wall time of earlier starts: wall_seconds is below train_seconds, so the cost is understated")
    asked, measured = run.setting("eval.tasks"), _tasks(run)
    for task in filter(lambda name: isinstance(name, str), asked if isinstance(asked, list) else []):
        absent = [model for model in ("base", "tuned") if model not in measured.get(task, {})]
        words += [f"task {task}: no scores of the {' and the '.join(absent)} model"] if absent else []
    return words


def _evaluated(run: RunRecord, key: str, best: int | None) -> dict[str, float | None]:
    at = {r["step"]: number(r.get(key)) for r in run.evaluations}
    return {"start": at.get(0), "best": at.get(best), "end": at[max(at)] if at else None}


def _trained(run: RunRecord, key: str, best: int | None) -> dict[str, float | None]:
    values = [(r["step"], number(r.get(key))) for r in run.train]
    until = [value for step, value in values if best is not None and step <= best]
    return {
        "start": values[0][1] if values else None,
        "best": until[-1] if until else None,
        "end": values[-1][1] if values else None,
    }


def _decreases(train_loss: dict[str, float | None], eval_loss: dict[str, float | None]) -> dict[str, float | None]:
    return {
        "train_loss": _fall(train_loss["start"], train_loss["end"]),
        "eval_loss": _fall(eval_loss["start"], eval_loss["end"]),
        "eval_loss_to_best": _fall(eval_loss["start"], eval_loss["best"]),
    }


def _fall(start: float | None, end: float | None) -> float | None:
    return None if not start or end is None else 1 - end / start


def _last_step(run: RunRecord) -> int | None:
    seen = [records[-1]["step"] for records in (run.train, run.evaluations) if records]
    told = run.count("step")
    return int(told) if told is not None else max(seen, default=None)


def _tasks(run: RunRecord) -> dict[str, dict[str, dict[str, Any]]]:
    tasks = run.fact("tasks")
    if not isinstance(tasks, dict):
        return {}
    return {
        name: {model: _scores(by_model[model]) for model in ("base", "tuned") if isinstance(by_model.get(model), dict)}
        for name, by_model in tasks.items()
        if isinstance(by_model, dict)
    }


def _scores(scores: dict[str, Any]) -> dict[str, Any]:
    """A model's numbers and intervals under the task's own names."""
    return {
        key: v for key, v in scores.items() if (_is_pair(v) if key.endswith("_interval") else number(v) is not None)
    }


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and None not in map(number, value)


def _spent(run: RunRecord) -> dict[str, Any]:
    """Time, tokens and money."""
    wall, train = run.count("wall_seconds"), run.count("train_seconds")
    tokens, count = run.count("tokens"), _chips(run)
    price = number(run.setting("run.usd_per_chip_hour"))
    chip_hours = None if wall is None or count is None else wall / 3600 * count
    return {
        "wall_seconds": wall,
        "train_seconds": train,
        "goodput": None if not wall or train is None or train > wall else train / wall,
        "tokens": tokens,
        "tokens_per_second": None if not train or tokens is None else tokens / train,
        "chip_hours": chip_hours,
        "usd_per_chip_hour": price,
        "cost_usd": None if chip_hours is None or price is None else chip_hours * price,
    }


def _chips(run: RunRecord) -> float | None:
    """The run's chips: its devices, unless the kind is known to have several to a chip."""
    devices = run.count("device.count")
    chip = chips.of_device(str(run.fact("device.kind")))
    return None if devices is None else devices / (chip.devices if chip else 1)


def _logged(run: RunRecord) -> dict[str, float | None]:
    """The median of each rate over the log lines, which a slow first line or one slow step does not move; peaks of memory."""

    def over(key: str, summary: Any) -> float | None:
        values = [value for r in run.train if (value := number(r.get(key))) is not None]
        return summary(values) if values else None

    medians = {f"median_{key}": over(key, statistics.median) for key in MEDIANS}
    return medians | {f"peak_{key}": over(key, max) for key in PEAKS}


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _flat(value: Any) -> dict[str, str | float | None]:
    """The names, numbers and words of a section; nothing nested, nothing that JSON cannot carry."""
    if not isinstance(value, dict):
        return {}
    return {k: v if isinstance(v, str) else number(v) for k, v in value.items() if not isinstance(v, (dict, list))}
