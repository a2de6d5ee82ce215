"""Two models on the same documents: accuracies side by side, what changed, and whether chance explains it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.analysis.statistics import bootstrap, detectable_difference, holm, mcnemar, wilson
from jaxft.errors import UserError

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """Two models (base and tuned, or first and second pass) on n documents, each graded right or wrong.

    Shares come with 95 % Wilson intervals. The four counts are the flip table. `difference` is second - first, with its
    95 % paired bootstrap interval over documents; `p_value` is McNemar's, exact and two-sided; `detectable` is the
    difference that n documents with this share of flips would show with 80 % power.
    """

    documents: int
    first: float
    first_interval: tuple[float, float]
    second: float
    second_interval: tuple[float, float]
    both_right: int
    right_to_wrong: int
    wrong_to_right: int
    both_wrong: int
    difference: float
    difference_interval: tuple[float, float]
    p_value: float
    detectable: float


def compare(
    first: Sequence[bool], second: Sequence[bool], *, clusters: Sequence[Hashable] | None = None, seed: int = 0
) -> Comparison:
    """Compares right/wrong of the same documents in the same order; `clusters` for the bootstrap alone."""
    a, b, n = np.asarray(first, bool), np.asarray(second, bool), len(first)
    _check(n, len(second))
    lost, won = int(np.sum(a & ~b)), int(np.sum(~a & b))
    found = bootstrap(b.astype(float) - a, clusters=clusters, seed=seed)
    return Comparison(
        documents=n,
        first=float(a.mean()),
        first_interval=wilson(int(a.sum()), n),
        second=float(b.mean()),
        second_interval=wilson(int(b.sum()), n),
        both_right=int(np.sum(a & b)),
        right_to_wrong=lost,
        wrong_to_right=won,
        both_wrong=int(np.sum(~a & ~b)),
        difference=found.value,
        difference_interval=(found.low, found.high),
        p_value=mcnemar(lost, won),
        detectable=detectable_difference((lost + won) / n, n),
    )


@dataclass(frozen=True)
class Measured:
    """One task of the regression panel: a value per document from each model.

    A right/wrong task has 0 and 1. A loss has each text's summed NLL, its tokens as `weights` and `higher_is_better`
    False. `chance` is what guessing scores, where that is known; `protocol` says how it was asked.
    """

    task: str
    protocol: str
    base: Sequence[float]
    tuned: Sequence[float]
    weights: Sequence[float] | None = None
    clusters: Sequence[Hashable] | None = None
    higher_is_better: bool = True
    chance: float | None = None


@dataclass(frozen=True)
class PanelRow:
    """A task of the panel: Σ values / Σ weights of both models, tuned - base with its 95 % paired bootstrap interval.

    `p_value` is two-sided, McNemar's for right/wrong and the bootstrap's otherwise, adjusted by Holm over the panel.
    `verdict`: worse or better where it is below 0.05, else no change shown. `near_chance` marks a base model whose
    interval holds the score of guessing: such a task cannot show a loss.
    """

    task: str
    protocol: str
    documents: int
    base: float
    tuned: float
    difference: float
    difference_interval: tuple[float, float]
    p_value: float
    verdict: str
    near_chance: bool | None = None


def panel(tasks: Sequence[Measured], *, seed: int = 0) -> list[PanelRow]:
    """What fine-tuning did to other abilities: one row per task, in the order given."""
    rows = [_compared(task, seed) for task in tasks]
    return [_judged(task, row, p) for task, row, p in zip(tasks, rows, holm([row.p_value for row in rows]))]


def _compared(task: Measured, seed: int) -> PanelRow:
    base, tuned = np.asarray(task.base, np.float64), np.asarray(task.tuned, np.float64)
    _check(len(base), len(tuned))
    below = np.ones_like(base) if task.weights is None else np.asarray(task.weights, np.float64)
    found = bootstrap(tuned - base, below, clusters=task.clusters, seed=seed)
    yes_no = task.weights is None and np.isin([base, tuned], (0, 1)).all()
    if yes_no and task.clusters is None:
        p = mcnemar(int(np.sum(base > tuned)), int(np.sum(base < tuned)))
    else:
        p = min(
            1.0,
            2 * min(found.p_above_zero, bootstrap(base - tuned, below, clusters=task.clusters, seed=seed).p_above_zero),
        )
    chance = None
    if yes_no and task.chance is not None:
        low, high = wilson(int(base.sum()), len(base))
        chance = low <= task.chance <= high
    before, after = float(base.sum() / below.sum()), float(tuned.sum() / below.sum())
    interval = found.low, found.high
    return PanelRow(task.task, task.protocol, len(base), before, after, found.value, interval, p, "", chance)


def _judged(task: Measured, row: PanelRow, p: float) -> PanelRow:
    direction = "better" if (row.difference > 0) == task.higher_is_better else "worse"
    verdict = direction if p < LEVEL else "no change shown"
    return PanelRow(**vars(row) | {"p_value": p, "verdict": verdict})


def _check(first: int, second: int) -> None:
    if first != second or not first:
        raise UserError(f"a paired comparison needs the same documents for both models; found {first} and {second}")
