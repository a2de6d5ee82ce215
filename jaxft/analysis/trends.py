"""How losses moved: decreases between named windows, the trend of the final steps, drops at epoch boundaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.analysis.statistics import bootstrap
from jaxft.errors import UserError

FINAL_SHARE = 0.1
POINTS = 200
"""Points of a trend; longer series are averaged in groups first."""
LEAST_POINTS = 8
RESAMPLES = 1000
DROP_Z = 3.5


@dataclass(frozen=True)
class Decrease:
    """From `before` to `after`, in nats per token: `nats` = before - after, `percent` = 100 · (before - after) / before.

    The interval is that of `percent`, a 95 % paired bootstrap over examples; None for logged losses, which are not of the
    same examples. `p_above_zero` is the one-sided p of the claim that the loss fell.
    """

    before: float
    after: float
    nats: float
    percent: float
    percent_interval: tuple[float, float] | None
    p_above_zero: float | None
    definition: str


def of_examples(
    before: Sequence[float], after: Sequence[float], tokens: Sequence[int], definition: str, *, seed: int = 0
) -> Decrease:
    """Token-weighted loss of the same examples at two times, in eval mode; NLL are sums over each example's `tokens`."""
    first, last, counted = (np.asarray(v, np.float64) for v in (before, after, tokens))
    if not len(first) or len(first) != len(last) or len(first) != len(counted) or first.sum() <= 0:
        raise UserError("a decrease needs the losses of the same examples, not all 0, before and after")
    found = bootstrap(first - last, first, seed=seed)
    a, b = float(first.sum() / counted.sum()), float(last.sum() / counted.sum())
    return Decrease(a, b, a - b, 100 * found.value, (100 * found.low, 100 * found.high), found.p_above_zero, definition)


def of_log(steps: Sequence[int], losses: Sequence[float], tokens: Sequence[float] | None = None) -> Decrease:
    """Mean logged train loss over the first against the last W optimizer steps, W = max(10, 1 % of all steps).

    A log line counts where its step lies in the window (the first or last line, where none does), weighted by its
    `tokens`. Logged means: dropout on, while the weights change, on data being learnt: no measure of generalisation.
    """
    at, loss = _series(steps, losses)
    weights = np.ones_like(loss) if tokens is None else np.asarray(tokens, np.float64)
    window = max(10, math.ceil(0.01 * at[-1]))
    first, last = at <= max(window, at[0]), at > min(at[-1] - window, at[-2] if len(at) > 1 else 0)
    a, b = (float(np.average(loss[part], weights=weights[part])) for part in (first, last))
    words = (
        f"mean logged train loss (dropout on, seen data) of the first {window:,} steps against the last {window:,}, "
        f"{int(first.sum())} and {int(last.sum())} log lines"
    )
    if (first & last).any():
        words += "; the two windows overlap"
    return Decrease(a, b, a - b, 100 * (a - b) / a if a else math.nan, None, None, words)


@dataclass(frozen=True)
class Trend:
    """The slope of a loss over steps by Theil and Sen, in nats per step, with a 95 % interval.

    `change` is slope · (last - first step of the window) / mean loss of the window: the relative change over it, below 0
    where the loss falls, with the same interval. Moving-block bootstrap of the residuals, because neighbouring steps
    may be alike; `block` is its length in points, chosen from their correlation. The interval is somewhat short: of
    simulated series of 100 points it held the slope in 91, 85 and 74 % at correlations of 0, 0.5 and 0.8.
    """

    first_step: int
    last_step: int
    points: int
    block: int
    slope: float
    slope_interval: tuple[float, float]
    change: float
    change_interval: tuple[float, float]

    @property
    def falling(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.slope_interval[1] < 0


def final_steps(
    steps: Sequence[int], losses: Sequence[float], share: float = FINAL_SHARE, *, seed: int = 0
) -> Trend | None:
    """The trend of the logged loss over the last `share` of steps; None with fewer than eight points there."""
    at, loss = _series(steps, losses)
    inside = at > at[-1] - share * at[-1]
    return trend(at[inside], loss[inside], seed=seed) if inside.sum() >= LEAST_POINTS else None


def trend(steps: Sequence[int] | np.ndarray, losses: Sequence[float] | np.ndarray, *, seed: int = 0) -> Trend:
    """Theil-Sen slope with its interval; series of more than 200 points are averaged in equal groups of neighbours."""
    at, loss = _series(steps, losses)
    if len(at) < 3:
        raise UserError(f"a trend needs at least 3 points, found {len(at)}")
    groups = np.array_split(np.arange(len(at)), min(POINTS, len(at)))
    x, y = (np.array([series[g].mean() for g in groups]) for series in (at, loss))
    slope = float(_slopes(x, y[None])[0])
    residuals = y - slope * x
    block = _block(residuals)
    drawn = _slopes(x, slope * x + _blocks(residuals, block, np.random.default_rng(seed)))
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    mean = float(loss.mean())
    scale = float(at[-1] - at[0]) / mean if mean else math.nan
    return Trend(
        int(at[0]), int(at[-1]), len(at), block, slope, (low, high), slope * scale, (low * scale, high * scale)
    )


def _slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The median of the slopes between all pairs of points, for each row of y `[R,n]`."""
    i, j = np.triu_indices(len(x), 1)
    apart = x[j] - x[i]
    return np.array([np.median((row[j] - row[i]) / apart) for row in y])


def _block(residuals: np.ndarray) -> int:
    """The length that suits the correlation of neighbours, for a mean (Politis and White 2004, of order one)."""
    n, around = len(residuals), residuals - residuals.mean()
    total = float(np.sum(around**2))
    rho = min(0.95, max(0.0, float(np.sum(around[1:] * around[:-1])) / total)) if total else 0.0
    return max(1, min(n // 4, math.ceil((math.sqrt(6) * rho / (1 - rho * rho)) ** (2 / 3) * n ** (1 / 3))))


def _blocks(residuals: np.ndarray, block: int, rng: np.random.Generator) -> np.ndarray:
    """RESAMPLES series `[R,n]` of residuals, each made of blocks of neighbours."""
    n = len(residuals)
    starts = rng.integers(0, n - block + 1, (RESAMPLES, -(-n // block)))
    index = (starts[:, :, None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :n]
    return residuals[index]


def still_improving(train: Trend | None, validation_steps: Sequence[int], validation: Sequence[float]) -> bool | None:
    """Whether training would go on to help: the train trend falls for sure, and validation loss over the same steps too.

    None where there is no trend, or fewer than two evaluations from the window's first step on (the last one before it
    counts too). A schedule that ends near 0 flattens the trend by itself: print the learning rate beside it.
    """
    if train is None:
        return None
    pairs = list(zip(validation_steps, validation))
    before = [pair for pair in pairs if pair[0] < train.first_step][-1:]
    inside = before + [pair for pair in pairs if pair[0] >= train.first_step]
    if len(inside) < 2:
        return None
    x, y = (np.array(column, np.float64) for column in zip(*inside))
    return train.falling and float(_slopes(x, y[None])[0]) < 0


@dataclass(frozen=True)
class Drop:
    """The logged loss around an epoch boundary: mean of the lines before - mean of those after, and its robust z."""

    step: int
    nats: float
    z: float
    sudden: bool


def epoch_drops(
    steps: Sequence[int], losses: Sequence[float], boundaries: Sequence[int], lines: int = 10
) -> list[Drop]:
    """How much the loss falls at each epoch's end, beside how much it falls elsewhere within as many lines.

    `boundaries` are the last steps of epochs. A staircase of sudden drops (z above 3.5) says that rows seen before are
    being remembered. Boundaries without `lines` log lines on either side are left out.
    """
    at, loss = _series(steps, losses)
    cuts = np.arange(lines, len(at) - lines + 1)
    if not len(cuts):
        return []
    total = np.concatenate([[0.0], np.cumsum(loss)])
    falls = (2 * total[cuts] - total[cuts - lines] - total[cuts + lines]) / lines
    ends = {int(np.searchsorted(at, b, side="right")): b for b in boundaries}
    near = np.array([any(abs(cut - end) < lines for end in ends) for cut in cuts])
    if near.all():
        return []
    middle, spread = np.median(falls[~near]), 1.4826 * np.median(np.abs(falls[~near] - np.median(falls[~near])))
    found = []
    for end, boundary in sorted(ends.items()):
        if lines <= end <= len(at) - lines:
            fall = float(falls[end - lines])
            z = (fall - middle) / spread if spread > 0 else math.inf if fall > middle else 0.0
            found.append(Drop(boundary, fall, float(z), bool(z > DROP_Z)))
    return found


def bits_per_byte(nll: float, texts: Sequence[str]) -> float:
    """Summed NLL in nats / (ln 2 · UTF-8 bytes of the answers): comparable between tokenizers, unlike loss per token."""
    size = sum(len(text.encode()) for text in texts)
    return nll / (math.log(2) * size) if size else math.nan


def _series(steps: Sequence[int] | np.ndarray, losses: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at, loss = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if not len(at) or len(at) != len(loss) or (np.diff(at) <= 0).any() or not np.isfinite(loss).all():
        raise UserError("a series of losses needs rising steps and as many finite losses, at least one")
    return at, loss
