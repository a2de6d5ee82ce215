"""Which categories of documents a model fails on more than on others: a table with intervals, and real examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.analysis.comparison import compare
from jaxft.analysis.outliers import excess
from jaxft.analysis.statistics import benjamini_hochberg, wilson
from jaxft.errors import UserError

LEAST = 30  # documents of a category, and outside it, below which it is not shown
LEVEL = 0.05
LEFT_OUT = ("no", "none")  # classes that only say that something is absent
_RIDGE = 1e-3


@dataclass(frozen=True)
class Category:
    """One class of one dimension, on `documents` documents.

    `tuned` and `base` are the shares right, with 95 % Wilson intervals, `difference` is tuned - base with its paired
    bootstrap interval (None without a base model). `loss` is the tuned model's mean NLL per token there. `share_of_errors`
    is its share of all the tuned model's errors. `odds_ratio` compares the odds of a wrong answer in the class with those
    outside it, in a logistic regression that holds all other dimensions fixed, so that many steps are not mistaken for a
    long question; below 1 it is easier. `p_value` is its likelihood-ratio test's, adjusted by Benjamini and Hochberg over
    the table. `flag`: hard or easy where that is below 0.05, else nothing.
    """

    dimension: str
    name: str
    documents: int
    tuned: float
    tuned_interval: tuple[float, float]
    base: float | None
    base_interval: tuple[float, float] | None
    difference: float | None
    difference_interval: tuple[float, float] | None
    loss: float | None
    share_of_errors: float
    odds_ratio: float
    p_value: float
    flag: str


def table(
    classes: Sequence[Mapping[str, str]],
    tuned: Sequence[bool],
    base: Sequence[bool] | None = None,
    *,
    nll: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
    least: int = LEAST,
) -> list[Category]:
    """A row per class with at least `least` documents inside and outside, the surest deviation first.

    `classes` gives each document's class in every dimension, as `categories.classes` does; `tuned` and `base` say which
    documents each model got right; `nll` are summed over each document's `tokens`.
    """
    if not classes or any(given is not None and len(given) != len(classes) for given in (tuned, base, nll, tokens)):
        raise UserError(f"a table of categories needs the same documents in every column; found {len(classes)} classes")
    wrong = ~np.asarray(tuned, bool)
    shown = _shown(classes, least)
    if not shown:
        return []
    tested = _adjusted(shown, wrong)
    adjusted = benjamini_hochberg([p for _, p in tested])
    rows = [
        _row(key, member, wrong, base, nll, tokens, odds, p)
        for (key, member), (odds, _), p in zip(shown.items(), tested, adjusted)
    ]
    return sorted(rows, key=lambda row: (row.p_value, -abs(math.log(row.odds_ratio))))


@dataclass(frozen=True)
class LossCategory:
    """One class of one dimension by the losses of its documents, where nothing was graded.

    `loss` is the mean NLL per token there, before training `base`. `factor` is by how much losses per token exceed what the
    documents' lengths let expect, beside documents outside the class: the ratio of geometric means of loss / expected, with
    its 95 % interval (Welch). `p_value` is that test's, two-sided, adjusted by Benjamini and Hochberg over the table.
    `flag`: hard or easy where that is below 0.05, else nothing.
    """

    dimension: str
    name: str
    documents: int
    base: float | None
    loss: float
    factor: float
    factor_interval: tuple[float, float]
    p_value: float
    flag: str


def by_loss(
    classes: Sequence[Mapping[str, str]],
    nll: Sequence[float],
    tokens: Sequence[int],
    base: Sequence[float] | None = None,
    *,
    least: int = LEAST,
) -> list[LossCategory]:
    """A row per class with at least `least` documents inside and outside, the surest deviation first; NLL are sums."""
    if not classes or any(len(given) != len(classes) for given in (nll, tokens, nll if base is None else base)):
        raise UserError(f"a table of categories needs the same documents in every column; found {len(classes)} classes")
    shown = _shown(classes, least)
    if not shown:
        return []
    order = sorted(excess(nll, tokens), key=lambda e: e.document)
    residual = np.log([max(e.loss, 1e-12) / e.expected for e in order])
    tests = [_welch(residual[member], residual[~member]) for member in shown.values()]
    adjusted = benjamini_hochberg([p for *_, p in tests])
    counted, after = np.asarray(tokens, np.float64), np.asarray(nll, np.float64)
    rows = []
    for ((dimension, name), member), (away, low, high, _), p in zip(shown.items(), tests, adjusted):
        size = counted[member].sum()
        before = None if base is None else float(np.asarray(base, np.float64)[member].sum() / size)
        flag = "" if p >= LEVEL else "hard" if away > 0 else "easy"
        factors = tuple(float(np.exp(np.clip(x, -50, 50))) for x in (away, low, high))
        rows.append(LossCategory(dimension, name, int(member.sum()), before, float(after[member].sum() / size),
                                 factors[0], factors[1:], p, flag))  # fmt: skip
    return sorted(rows, key=lambda row: (row.p_value, -abs(math.log(row.factor))))


def _welch(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float, float, float]:
    """The difference of means with its 95 % interval and two-sided p; variances may differ."""
    from scipy.stats import ttest_ind

    if np.ptp(inside) == 0 and np.ptp(outside) == 0:
        away = float(inside[0] - outside[0])
        return away, away, away, 1.0
    found = ttest_ind(inside, outside, equal_var=False)
    low, high = found.confidence_interval()
    return float(inside.mean() - outside.mean()), float(low), float(high), float(found.pvalue)


def _shown(classes: Sequence[Mapping[str, str]], least: int) -> dict[tuple[str, str], np.ndarray]:
    """(dimension, class) -> which documents are in it."""
    counts = Counter(item for of_document in classes for item in of_document.items())
    return {
        key: np.array([of_document.get(key[0]) == key[1] for of_document in classes])
        for key, n in sorted(counts.items())
        if key[1] not in LEFT_OUT and least <= n <= len(classes) - least
    }


def _row(
    key: tuple[str, str],
    member: np.ndarray,
    wrong: np.ndarray,
    base: Sequence[bool] | None,
    nll: Sequence[float] | None,
    tokens: Sequence[int] | None,
    odds: float,
    p: float,
) -> Category:
    n, right = int(member.sum()), int((member & ~wrong).sum())
    before = None if base is None else compare(np.asarray(base, bool)[member], ~wrong[member])
    loss = None
    if nll is not None and tokens is not None:
        loss = float(np.asarray(nll)[member].sum() / np.asarray(tokens)[member].sum())
    return Category(
        dimension=key[0],
        name=key[1],
        documents=n,
        tuned=right / n,
        tuned_interval=wilson(right, n),
        base=before and before.first,
        base_interval=before and before.first_interval,
        difference=before and before.difference,
        difference_interval=before and before.difference_interval,
        loss=loss,
        share_of_errors=float((member & wrong).sum() / max(1, wrong.sum())),
        odds_ratio=odds,
        p_value=p,
        flag="" if p >= LEVEL else "hard" if odds > 1 else "easy",
    )


def _adjusted(shown: dict[tuple[str, str], np.ndarray], wrong: np.ndarray) -> list[tuple[float, float]]:
    """Each class's odds ratio given all other dimensions, and the p-value of its likelihood-ratio test."""
    from scipy.stats import chi2  # here, because importing it takes longer than all else in this file

    without: dict[str, tuple[np.ndarray, float, np.ndarray]] = {}
    found = []
    for (dimension, _), member in shown.items():
        if dimension not in without:
            others = [column for key, column in shown.items() if key[0] != dimension]
            design = np.stack([np.ones(len(wrong)), *others], 1)
            without[dimension] = design, *_logistic(design, wrong, np.zeros(design.shape[1]))
        design, reached, weights = without[dimension]
        more, within = _logistic(np.concatenate([design, member[:, None]], 1), wrong, np.append(weights, 0.0))
        p = float(chi2.sf(max(0.0, 2 * (more - reached)), 1))
        found.append((float(np.exp(np.clip(within[-1], -20, 20))), p))
    return found


def _logistic(design: np.ndarray, outcome: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The greatest penalised log-likelihood of a logistic regression, and its weights; Newton's method from `weights`.

    The small ridge on all but the intercept (column 0) keeps separated and collinear columns finite.
    """
    ridge = np.full(design.shape[1], _RIDGE)
    ridge[0] = 0

    def likelihood(w: np.ndarray) -> float:
        scores = design @ w
        return float(np.sum(outcome * scores - np.logaddexp(0, scores)) - 0.5 * np.sum(ridge * w * w))

    reached = likelihood(weights)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -500, 500)))
        slope = design.T @ (outcome - p) - ridge * weights
        # Not a matmul: for so small a product BLAS's threads take longer to meet than to multiply.
        curve = np.einsum("ni,nj->ij", design * (p * (1 - p))[:, None], design) + np.diag(ridge + 1e-9)
        step, scale = np.linalg.solve(curve, slope), 1.0
        while (tried := likelihood(weights + scale * step)) < reached and scale > 1e-6:
            scale /= 2
        if tried <= reached:
            break
        weights, gained, reached = weights + scale * step, tried - reached, tried
        if gained < 1e-9:
            break
    return reached, weights


def examples(
    category: Category, classes: Sequence[Mapping[str, str]], tuned: Sequence[bool], count: int = 3
) -> list[int]:
    """Numbers of up to `count` documents of the category that the tuned model got wrong (right ones, where it is easy).

    Evenly spaced among all of them, so that nobody chose: show each with its question, gold answer and model output.
    """
    wanted = category.flag == "easy"
    found = [
        i
        for i, (of_document, right) in enumerate(zip(classes, tuned))
        if of_document.get(category.dimension) == category.name and bool(right) == wanted
    ]
    return found if len(found) <= count else [found[(2 * i + 1) * len(found) // (2 * count)] for i in range(count)]
