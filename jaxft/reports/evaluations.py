"""Evaluations in a run folder: what `python -m jaxft.evaluate` wrote, as records."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxft.analysis.comparison import PanelRow
from jaxft.analysis.hardness import Category
from jaxft.reports.fitting import Fitter
from jaxft.reports.records import found, object_of


@dataclass(frozen=True)
class Metric:
    """One metric of one side of a task."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Side:
    """Base or tuned on one task."""

    metrics: dict[str, Metric]
    invalid: dict[str, float] = field(default_factory=dict)
    truncated: float | None = None
    documents: int | None = None


@dataclass(frozen=True)
class Change:
    """Two sides on the same documents, as `analysis.comparison.Comparison`; the last eight only where documents are right
    or wrong."""

    documents: int
    difference: float
    difference_interval: tuple[float, float]
    first: float | None = None
    second: float | None = None
    both_right: int | None = None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
    both_wrong: int | None = None
    p_value: float | None = None
    detectable: float | None = None


@dataclass(frozen=True)
class Shown:
    """A real example of a category or of a kind of mistake."""

    question: str
    reference: str
    output: Any = None
    doc_id: int | str | None = None
    evidence: str | None = None


@dataclass(frozen=True)
class Mistakes:
    """One kind of wrong answer, as `analysis.gsm8k.mistakes.counts` counts it."""

    kind: str
    meaning: str
    count: int
    share: float
    share_interval: tuple[float, float]
    examples: list[Shown] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """What one kind of sharing found; `offenders` are the first ones."""

    kind: str
    documents: int
    shared: int
    share: float
    share_interval: tuple[float, float]
    offenders: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Contamination:
    """A task's questions against the questions trained on."""

    trained: int
    kinds: list[Kind]
    nearest_similarity: float | None = None
    with_and_without: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Task:
    """One task of an evaluation."""

    documents: int
    primary: str
    protocol: dict[str, Any]
    sides: dict[str, Side]
    member_of: str | None = None
    seen: bool = False  # whether the rows are those trained on
    comparisons: dict[str, Change] = field(default_factory=dict)
    refinement: dict[str, dict[str, Change]] = field(default_factory=dict)
    categories: list[tuple[Category, list[Shown]]] = field(default_factory=list)
    mistakes: dict[str, list[Mistakes]] = field(default_factory=dict)
    contamination: Contamination | None = None


@dataclass(frozen=True)
class Evaluation:
    """A folder of evaluations/: one call of `python -m jaxft.evaluate`."""

    name: str
    date: str
    model: str | None
    tasks: dict[str, Task]
    panel: list[PanelRow]
    rows: dict[str, str] = field(default_factory=dict)  # task -> the file or data set that was asked, where it was told


def evaluations(folder: Path, damage: list[str]) -> list[Evaluation]:
    """Every evaluation in the run folder, the oldest first."""
    read = []
    for at in found(folder / "evaluations", "*", damage):
        if at.is_dir():
            value = object_of(at / "results.json", damage, f"evaluations/{at.name}/results.json")
            if value is not None:
                read.append(_evaluation(at.name, value, damage))
    return sorted(read, key=lambda e: (e.date, e.name))


def seen_and_held(read: list[Evaluation]) -> tuple[Task, Task] | None:
    """Training rows and held-out rows asked alike, in the newest evaluation that asked both."""
    for evaluation in reversed(read):
        for name, task in evaluation.tasks.items():
            held = evaluation.tasks.get(name.removesuffix("_train_rows"))
            if task.seen and held is not None and not held.seen:
                return task, held
    return None


def _evaluation(name: str, value: dict[str, Any], damage: list[str]) -> Evaluation:
    fit = Fitter()
    tasks = {
        task: read
        for task, told in (value.get("tasks") if isinstance(value.get("tasks"), dict) else {}).items()
        if (read := _task(told, fit)) is not None
    }
    model = value.get("model")
    named = model.get("model") if isinstance(model, dict) else None
    date, panel = fit.one(str, value.get("date")), fit.many(PanelRow, value.get("panel"))
    if fit.left_out:
        damage.append(
            f"evaluations/{name}/results.json: {fit.left_out} parts left out that are not as an evaluation writes them"
        )
    if not tasks:
        damage.append(f"evaluations/{name}/results.json tells of no task")
    told = value.get("rows")
    rows = {
        task: of["rows"].rpartition("/")[2] or of["rows"]
        for task, of in (told.items() if isinstance(told, dict) else ())
        if isinstance(of, dict) and isinstance(of.get("rows"), str)
    }
    return Evaluation(name, date or "", named if isinstance(named, str) else None, tasks, panel, rows)


def _task(told: Any, fit: Fitter) -> Task | None:
    """The rows that fit of a task that fits."""
    keep = ("documents", "primary", "protocol", "sides", "member_of", "seen")
    task = fit.one(Task, {key: told[key] for key in keep if key in told} if isinstance(told, dict) else told or 0)
    if task is None or not task.sides:
        return None
    refinement = told.get("refinement")
    return replace(
        task,
        comparisons=fit.named(Change, told.get("comparisons")),
        refinement={
            side: fit.named(Change, of) for side, of in (refinement if isinstance(refinement, dict) else {}).items()
        },
        categories=_categories(told.get("categories"), fit),
        mistakes={
            side: fit.many(Mistakes, rows)
            for side, rows in (told["mistakes"] if isinstance(told.get("mistakes"), dict) else {}).items()
        },
        contamination=fit.one(Contamination, told.get("contamination")),
    )


def _categories(rows: Any, fit: Fitter) -> list[tuple[Category, list[Shown]]]:
    kept = []
    for row in rows if isinstance(rows, list) else []:
        category = fit.one(Category, row)
        if category is not None and category.odds_ratio > 0:
            kept.append((category, fit.many(Shown, row.get("examples"))))
    return kept
