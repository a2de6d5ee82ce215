"""Intervals, paired tests and corrections for many comparisons. Resampling takes a seed and repeats bit for bit."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_DRAWN = 2_000_000  # random indices held at once
Z95 = 1.959964


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % by default); (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean: stdev(ddof=1) / √n, as lm-evaluation-harness prints it; NaN below two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p that the two are right equally often: binomial on the documents where one alone is right."""
    discordant = only_first + only_second
    if not discordant:
        return 1.0
    from scipy.stats import binomtest  # here, because importing it takes longer than all else in this file

    return float(binomtest(min(only_first, only_second), discordant).pvalue)


def detectable_difference(discordant_share: float, documents: int) -> float:
    """The difference of two paired proportions found with 80 % power at the 5 % level: about 2.8 √(d / n)."""
    return 2.8 * math.sqrt(discordant_share / documents) if documents else math.inf


@dataclass(frozen=True)
class Estimate:
    """A value, its percentile interval (95 % by default), and the one-sided p of the claim that it is above 0."""

    value: float
    low: float
    high: float
    p_above_zero: float


def bootstrap(
    numerators: Sequence[float],
    denominators: Sequence[float] | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Σ numerators / Σ denominators, one of each per document (denominators of 1: the mean); documents are resampled.

    A paired comparison passes its differences: of 0/1 for accuracies, of summed NLL with the tokens as denominators
    for losses, with the first NLL as denominators for a relative decrease. `clusters` names each document's group
    (DROP's passage, MMLU's subject); then whole groups are resampled. Percentile interval of `resamples` draws.
    """
    above = np.asarray(numerators, np.float64)
    below = np.ones_like(above) if denominators is None else np.asarray(denominators, np.float64)
    if clusters is not None:
        of = np.unique([str(c) for c in clusters], return_inverse=True)[1]
        above, below = np.bincount(of, above), np.bincount(of, below)
    if not len(above) or not below.sum():
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    drawn = _ratios(above, below, resamples, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    p = (1 + np.count_nonzero(drawn <= 0)) / (resamples + 1)
    return Estimate(float(above.sum() / below.sum()), float(low), float(high), float(p))


def _ratios(above: np.ndarray, below: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """The ratio in each resample `[resamples]`; one whose denominators are all 0 is left out."""
    pairs, counts = np.unique(np.stack([above, below], 1), axis=0, return_counts=True)
    if len(pairs) <= 64:  # Accuracies differ by -1, 0 or 1: how often each was drawn is multinomial.
        sums = rng.multinomial(len(above), counts / len(above), resamples) @ pairs
    else:
        rows = max(1, _DRAWN // len(above))
        sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
        parts = [rng.integers(0, len(above), (size, len(above))) for size in sizes]
        sums = np.concatenate([np.stack([above[p].sum(1), below[p].sum(1)], 1) for p in parts])
    sums = sums[sums[:, 1] != 0]
    return sums[:, 0] / sums[:, 1]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down rule: the chance of any false claim stays below the level. For few tests."""
    order = np.argsort(p_values, kind="stable")
    raised = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    found = np.empty_like(raised)
    found[order] = np.minimum(1.0, np.maximum.accumulate(raised))
    return found.tolist()


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by Benjamini and Hochberg: the share of false claims among all stays below the level."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(p_values).tolist() if len(p_values) else []


def robust_z(values: Sequence[float]) -> list[float]:
    """(value - median) / (1.4826 · MAD), which outliers do not move; 0 everywhere where the MAD is 0."""
    found = np.asarray(values, np.float64)
    if not len(found):
        return []
    away = found - np.median(found)
    spread = 1.4826 * np.median(np.abs(away))
    return (away / spread if spread > 0 else np.zeros_like(away)).tolist()
