"""Single examples that training tells apart: unexpectedly high losses, examples made worse, and rows to look at first."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.analysis.statistics import robust_z
from jaxft.errors import UserError

THRESHOLD = 3.5
"""Robust z above which an example stands out (Iglewicz and Hoaglin 1993)."""
LENGTH_BINS = 10


@dataclass(frozen=True)
class Excess:
    """An example's loss beside what its length and category let expect.

    `loss` is its mean NLL per token in nats; `expected` is what a regression of log loss on length bin (deciles of the
    token count) and category predicts for it; `z` is the robust z of the residual; `outlier`: z above 3.5. A high loss is
    no proof of hardness: `faults` says what is wrong with the row itself, which is to be looked at first.
    """

    document: int
    loss: float
    expected: float
    z: float
    outlier: bool
    faults: tuple[str, ...]


def excess(
    nll: Sequence[float],
    tokens: Sequence[int],
    categories: Sequence[str] | None = None,
    faults: Sequence[Sequence[str]] | None = None,
) -> list[Excess]:
    """All examples, the greatest excess first; `nll` are sums in nats over each example's supervised `tokens`."""
    summed, counted = np.asarray(nll, np.float64), np.asarray(tokens, np.float64)
    _check(summed, counted)
    if (counted <= 0).any() or not np.isfinite(summed).all():
        raise UserError("outliers need finite losses over at least one token each")
    log_loss = np.log(np.maximum(summed / counted, 1e-12))
    design = [_bins(counted)]
    if categories is not None:
        _check(summed, categories)
        names = sorted(set(categories))
        design.append(np.array([[c == name for name in names] for c in categories], np.float64))
    columns = np.concatenate(design, 1)
    predicted = columns @ np.linalg.lstsq(columns, log_loss, rcond=None)[0]
    scores = robust_z(log_loss - predicted)
    found = [
        Excess(
            document=i,
            loss=float(summed[i] / counted[i]),
            expected=math.exp(predicted[i]),
            z=scores[i],
            outlier=scores[i] > THRESHOLD,
            faults=tuple(faults[i]) if faults is not None else (),
        )
        for i in range(len(summed))
    ]
    return sorted(found, key=lambda e: -e.z)


def _bins(counted: np.ndarray) -> np.ndarray:
    edges = np.unique(np.quantile(counted, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]))
    return np.eye(len(edges) + 1)[np.searchsorted(edges, counted, side="right")]


@dataclass(frozen=True)
class Changed:
    """How training changed an example: loss per token before and after in nats; improvement = before - after.

    `hurt`: the improvement is negative. `harmful`: its robust z is below -3.5, so that training hurt this example more than its
    noise among examples explains.
    """

    document: int
    before: float
    after: float
    improvement: float
    z: float
    hurt: bool
    harmful: bool


def changes(before: Sequence[float], after: Sequence[float], tokens: Sequence[int]) -> list[Changed]:
    """All examples, the least improved first; NLL are sums over each example's `tokens`, in eval mode both times."""
    counted = np.asarray(tokens, np.float64)
    first, last = np.asarray(before, np.float64) / counted, np.asarray(after, np.float64) / counted
    _check(first, last)
    scores = robust_z(first - last)
    found = [
        Changed(i, float(a), float(b), float(a - b), z, bool(b > a), bool(b > a and z < -THRESHOLD))
        for i, (a, b, z) in enumerate(zip(first, last, scores))
    ]
    return sorted(found, key=lambda c: c.improvement)


@dataclass(frozen=True)
class Difficulty:
    """Instruction-following difficulty (arXiv 2308.12032): loss of the answer given the instruction / without it.

    Above 1 the instruction does not help to predict the answer: the two may not belong together.
    """

    document: int
    ratio: float
    mismatch: bool


def difficulty(given: Sequence[float], alone: Sequence[float]) -> list[Difficulty]:
    """All examples, the greatest ratio first, from the answers' summed NLL with and without the instruction."""
    _check(given, alone)
    ratios = [a / b if b > 0 else math.inf for a, b in zip(given, alone)]
    return sorted((Difficulty(i, r, r > 1) for i, r in enumerate(ratios)), key=lambda d: -d.ratio)


@dataclass(frozen=True)
class Course:
    """An example over the epochs (dataset cartography, arXiv 2009.10795).

    `confidence` and `variability` are mean and standard deviation (ddof 0) of the geometric-mean probability of its
    tokens, e^{-NLL/token}. `region`: ambiguous in the third of greatest variability, else easy or hard to learn above
    or below the median confidence. `forgotten` counts how often it went from right to wrong (arXiv 1812.05159); None
    where rightness was not recorded.
    """

    document: int
    confidence: float
    variability: float
    region: str
    forgotten: int | None


def cartography(
    nll: Sequence[Sequence[float]], tokens: Sequence[int], right: Sequence[Sequence[bool]] | None = None
) -> list[Course]:
    """A course per example; `nll` and `right` have one list over all examples per epoch, at least two."""
    summed = np.asarray(nll, np.float64)
    if summed.ndim != 2 or len(summed) < 2:
        raise UserError("cartography needs the losses of all examples in at least two epochs")
    _check(summed[0], tokens)
    sure = np.exp(-summed / np.asarray(tokens, np.float64))
    confidence, variability = sure.mean(0), sure.std(0)
    ambiguous = variability > np.quantile(variability, 2 / 3)
    easy = confidence >= np.median(confidence)
    lost = None if right is None else (np.diff(np.asarray(right, int), axis=0) < 0).sum(0)
    return [
        Course(
            i,
            float(confidence[i]),
            float(variability[i]),
            "ambiguous" if ambiguous[i] else "easy to learn" if easy[i] else "hard to learn",
            None if lost is None else int(lost[i]),
        )
        for i in range(summed.shape[1])
    ]


def faults(rows: Sequence[Mapping[str, str]], truncated: Sequence[bool] | None = None) -> list[tuple[str, ...]]:
    """What is wrong with each row (`prompt`, `answer`) before any model is asked.

    empty prompt, empty answer, duplicate (row and answer of an earlier one), same prompt (with another answer),
    answer repeats the prompt, cut (`truncated`, by the length limit), other script (most letters of the answer are of
    another script than most of the prompt's).
    """
    pairs = [(row["prompt"].strip(), row["answer"].strip()) for row in rows]
    twice = Counter(prompt for prompt, _ in pairs)
    seen: set[tuple[str, str]] = set()
    found = []
    for i, (prompt, answer) in enumerate(pairs):
        scripts = _script(prompt), _script(answer)
        held = {
            "empty prompt": not prompt,
            "empty answer": not answer,
            "duplicate": (prompt, answer) in seen,
            "same prompt": twice[prompt] > 1 and (prompt, answer) not in seen,
            "answer repeats the prompt": bool(prompt) and prompt == answer,
            "cut": truncated is not None and bool(truncated[i]),
            "other script": None not in scripts and scripts[0] != scripts[1],
        }
        seen.add((prompt, answer))
        found.append(tuple(name for name, wrong in held.items() if wrong))
    return found


def _script(text: str) -> str | None:
    """The script of most letters: the first word of their Unicode names (LATIN, CYRILLIC, CJK); None without letters."""
    counts = Counter("LATIN" if c.isascii() else unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    return counts.most_common(1)[0][0] if counts else None


def _check(first: Sequence[object] | np.ndarray, second: Sequence[object] | np.ndarray) -> None:
    if len(first) != len(second):
        raise UserError(f"expected the same examples in every list; found {len(first)} and {len(second)}")
