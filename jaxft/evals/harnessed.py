"""Tasks of lm-evaluation-harness on every side of a subject: the same prompts for each, measured document by document."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, one_line
from jaxft.evals.measurement import Answer, Document, Measurement, Side, check_pairs, sha256
from jaxft.evals.subject import Subject

SHOT_SEED = 1234
PREFERRED = ("acc_norm", "f1", "exact_match", "acc")
"""Metrics of which the first that a task has stands for it, as leaderboards do; else its own first one."""


SHOT_OF_KEYS = "answer|join(',')"
"""In DROP's task file: the shots' answers are the joined names of fields, since `answer` has those (harness issue 2137)."""


def loaded(
    names: Sequence[str], include_path: str | None, native: Sequence[str], task_data: str | None = None
) -> dict[str, Any]:
    """The harness's tasks and groups of these names, with their data. Raises UserError for unknown names and missing data.

    `native` are names that are known beside the harness's, to suggest. `task_data` is a folder with data sets under their
    Hub names; relative paths in task files begin there too.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tasks: {', '.join(names)}: tasks of lm-evaluation-harness need it; install jaxft[eval]. "
            f"Without it there are {', '.join(native)}"
        ) from error
    for name in ("lm_eval", "datasets", "huggingface_hub"):  # lines on stderr before the one that says what is wrong
        logging.getLogger(name).setLevel(logging.ERROR)
    for option, folder in (("--include-path", include_path), ("--task-data", task_data)):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"{option}: no folder {folder}")
    manager = _manager(include_path and str(Path(include_path).absolute()))
    known = [*native, *manager.all_tasks]
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, sorted(set(known)), 3, 0.5)
            raise UserError(
                f"--tasks: unknown task {name!r}; " + (f"nearest: {', '.join(near)}" if near else "give --include-path")
            )
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        part = _load(manager, name, task_data)
        for kind, of_kind in found.items():
            of_kind.update(part[kind])
    for task in found["tasks"].values():
        _keep_from_underflow(task)
    return found


def cautions(tasks: Mapping[str, Any], shots: int | None) -> dict[str, str]:
    """Task -> what is wrong with the harness's own way of asking it so."""
    said = (
        "{}: as a shot's answer lm-evaluation-harness shows the names of DROP's fields (number,date,spans,…), never an answer "
        "(its issue 2137), so that this is no few-shot score and compares with none; without --num-fewshot the task is sound"
    )
    asked = {name: task.get_config("num_fewshot") if shots is None else shots for name, task in tasks["tasks"].items()}
    return {
        name: said.format(name)
        for name, task in tasks["tasks"].items()
        if asked[name] and SHOT_OF_KEYS in str(task.get_config("doc_to_target"))
    }


def _keep_from_underflow(task: Any) -> None:
    """truthfulqa_mc2 divides probabilities by their sum, which is 0 where all are below e^-745: the same after a shift."""
    scores = task.config.process_results
    if getattr(scores, "__name__", "") == "process_results_mc2":

        @functools.wraps(scores)
        def shifted(doc: Any, results: Sequence[tuple[float, bool]]) -> Any:
            most = max(value for value, _ in results)
            return scores(doc, [(value - most, greedy) for value, greedy in results])

        task.config.process_results = shifted


@functools.lru_cache(maxsize=1)
def _manager(include_path: str | None) -> Any:
    """All task files, read once: there are thousands."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _load(manager: Any, name: str, task_data: str | None) -> dict[str, Any]:
    try:
        # `datasets` takes a relative folder of a data set's name for the data set.
        with contextlib.chdir(task_data or "."):
            return manager.load([name])
    except Exception as error:  # of `datasets` and of whatever a task runs: dozens of types; the chain keeps them
        what = one_line(error) or type(error).__name__
        raise UserError(
            f"--tasks: {name}: its data cannot be loaded ({type(error).__name__}: {what:.300}); connect to the network once, "
            "or download the data set elsewhere and give by --task-data the folder in which it lies under its own name, or "
            "give a task with local files by --include-path"
        ) from error


def measure(
    tasks: dict[str, Any],
    subject: Subject,
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 16,
    seed: int = SHOT_SEED,
    chat: bool = False,
    told: Callable[[str, Side], None] = lambda side, found: None,
) -> tuple[list[Measurement], dict[str, Any]]:
    """Each group's whole and each task, and what the harness says of versions, shots and configurations. `told` hears of each
    side when it is done: all tasks in one."""
    from jaxft.evals.harness import JaxftLM

    lm = JaxftLM(subject, batch_size=batch_size, seed=seed)
    sides = {}
    for name in subject.sides:
        lm.side = name
        sides[name] = _evaluated(lm, tasks, limit, shots, chat)
        answers = [answer for task in tasks["tasks"] for answer in _side(sides[name], task).answers]
        told(name, Side(answers, sides[name]["seconds"], sides[name]["tokens"], {}))
    last = sides[list(sides)[-1]]["results"]
    single = [_measurement(name, task, sides, last) for name, task in tasks["tasks"].items()]
    grouped = [_group(name, group, single, sides, last) for name, group in tasks["groups"].items()]
    for measurement in single:
        check_pairs(measurement)
    return _placed([*(g for g in grouped if g is not None), *single], tasks), {
        key: last[key] for key in ("versions", "n-shot", "configs", "higher_is_better", "n-samples", "group_subtasks")
    }


def _placed(measurements: list[Measurement], tasks: dict[str, Any]) -> list[Measurement]:
    """With the group to which each belongs; MMLU's tasks belong to its four parts, and these to MMLU."""
    owner = {member: name for name, members in tasks["group_map"].items() for member in members}
    return [replace(m, member_of=owner.get(m.task)) for m in measurements]


def _evaluated(lm: Any, tasks: dict[str, Any], limit: int | None, shots: int | None, chat: bool) -> dict[str, Any]:
    """One side's results, what it says to itself and how long it took; shots are drawn anew, and so alike for every side."""
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if shots is not None and own != 0:  # 0 in a task's file is not to be changed, says the harness
            task.set_config(key="num_fewshot", value=shots)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SHOT_SEED)
    lm.truncated, lm.generated_tokens = {}, 0
    began = time.perf_counter()
    found = evaluate(
        lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True, apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    seconds = time.perf_counter() - began
    return {"results": found, "truncated": lm.truncated, "seconds": seconds, "tokens": lm.generated_tokens}


def _side(measured: dict[str, Any], task: str) -> Side:
    results = measured["results"]
    rows = _by_document(results["samples"].get(task, []))
    answers = [_answer(of_document, measured["truncated"].get((task, i))) for i, of_document in rows.items()]
    return Side(answers, measured["seconds"], measured["tokens"], results["results"].get(task, {}))


def _by_document(samples: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Document -> its sample under each filter."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample["doc_id"], []).append(sample)
    return dict(sorted(found.items()))


def _answer(samples: Sequence[Mapping[str, Any]], truncated: bool | None) -> Answer:
    values: dict[str, float] = {}
    weights: dict[str, float] = {}
    found: dict[str, str] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            key, value = f"{metric},{sample['filter']}", sample[metric]
            if isinstance(value, tuple | list) and len(value) == 2:  # perplexities: Σ log p, and its words or bytes
                values[key], weights[key] = -float(value[0]), float(value[1])
            elif isinstance(value, bool | int | float) or hasattr(value, "item"):
                values[key] = float(value)
        if isinstance(sample["filtered_resps"][0], str):
            found[sample["filter"]] = sample["filtered_resps"][0]
    said = [part for of_request in samples[0]["resps"] for part in of_request]
    texts = all(isinstance(part, str) for part in said)
    output = (said[0] if len(said) == 1 else said) if texts else [_likelihood(part) for part in said]
    return Answer(output, values, weights, found, truncated)


def _likelihood(part: Any) -> float:
    return float(part[0] if isinstance(part, tuple | list) else part)


def _measurement(name: str, task: Any, sides: dict[str, dict[str, Any]], results: Mapping[str, Any]) -> Measurement:
    rows = _by_document(results["samples"][name])
    for side in sides.values():
        asked = [of[0]["prompt_hash"] for of in _by_document(side["results"]["samples"][name]).values()]
        assert asked == [of[0]["prompt_hash"] for of in rows.values()], f"{name}: the sides were asked differently"
    documents = [
        Document(i, of[0]["prompt_hash"], _text(task, of[0]["doc"]), str(of[0]["target"])) for i, of in rows.items()
    ]
    found = {side: _side(measured, name) for side, measured in sides.items()}
    caution = cautions({"tasks": {name: task}}, None).get(name)  # the task was told its shots
    config = results["configs"][name]
    keys = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "generation_kwargs", "filter_list",
            "dataset_path", "dataset_name", "dataset_kwargs", "test_split", "validation_split")  # fmt: skip
    protocol = {
        "protocol": f"lm-evaluation-harness {_version()} {name}, version {results['versions'].get(name)}",
        "shots": results["n-shot"].get(name),
        "shot_seed": SHOT_SEED,
        **({"caution": caution} if caution else {}),
        **{key: config[key] for key in keys if config.get(key) is not None},
    }
    choices = [len(of[0]["arguments"]) for of in rows.values()]
    guessing = config.get("output_type") == "multiple_choice" and "mc2" not in name
    chance = sum(1 / count for count in choices) / len(choices) if guessing else None
    passages = [of[0]["doc"].get("passage") for of in rows.values()]
    clusters = None if None in passages else [sha256(passage) for passage in passages]
    metrics = _metrics(name, found, results)
    return Measurement(name, "lm-eval", protocol, documents, found, metrics, clusters=clusters, chance=chance)


def _metrics(name: str, found: Mapping[str, Side], results: Mapping[str, Any]) -> dict[str, bool]:
    """Metrics that every document has on every side, the one that stands for the task first."""
    held = set.intersection(*(set(answer.values) for side in found.values() for answer in side.answers))
    better = results["higher_is_better"].get(name, {})
    first = next(iter(found.values())).answers[0].values
    order = sorted(
        (key for key in first if key in held),
        key=lambda key: PREFERRED.index(key.split(",")[0]) if key.split(",")[0] in PREFERRED else math.inf,
    )
    # Two numbers are a sum of log p, turned to a loss: the less the better, whatever the harness makes of them.
    losses = next(iter(found.values())).answers[0].weights
    return {key: key not in losses and better.get(key.split(",")[0]) is not False for key in order}


def _text(task: Any, doc: Any) -> str:
    """The document's own question; some tasks give the number of a choice instead."""
    text = task.doc_to_text(doc)
    return text if isinstance(text, str) else ""


def _group(
    name: str, group: Any, single: Sequence[Measurement], sides: dict[str, Any], results: Mapping[str, Any]
) -> Measurement | None:
    """All documents of a group's tasks as one measurement, drawn by task; None where its tasks share no metric."""
    names = {task.task_name for task in group.get_all_tasks(recursive=True)}
    parts = [m for m in single if m.task in names]
    shared = [key for key in parts[0].metrics if all(key in part.metrics for part in parts)] if parts else []
    if not shared:
        return None
    found = {
        side: Side(
            [answer for part in parts for answer in part.sides[side].answers],
            sides[side]["seconds"],
            sides[side]["tokens"],
            sides[side]["results"]["results"].get(name, {}) | sides[side]["results"].get("groups", {}).get(name, {}),
        )
        for side in sides
    }
    return Measurement(
        task=name,
        backend="lm-eval",
        protocol={"protocol": f"lm-evaluation-harness {_version()} group {name}", "tasks": [part.task for part in parts],
                  "weight": "every document counts alike", "shots": results["n-shot"].get(name)},
        documents=[document for part in parts for document in part.documents],
        sides=found,
        metrics={key: parts[0].metrics[key] for key in shared},
        clusters=[part.task for part in parts for _ in part.documents],
        group=True,
        chance=parts[0].chance if all(part.chance is not None for part in parts) else None,
    )  # fmt: skip


def _version() -> str:
    from importlib.metadata import version

    return version("lm-eval")
