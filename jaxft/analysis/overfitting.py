"""Whether a run overfitted, by a rule that is printed beside the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.analysis.statistics import bootstrap, wilson
from jaxft.errors import UserError

LEVEL = 0.05
GAP_NATS = 0.15
GAP_POINTS = 30.0
EXACT_POINTS = 15.0
UNMEASURED = "not measured"
RULE = (
    "raised when (i) the validation loss at the end is above that at the best step, paired over examples, one-sided "
    f"p < {LEVEL:g}; or (ii) the gap between validation loss and the loss on a fixed sample of training rows grew by more "
    f"than {GAP_NATS:g} nats per token, or the latter fell by {GAP_POINTS:g} percentage points more than the former (each as a "
    f"share of its own start); or (iii) exact match on that sample is more than {EXACT_POINTS:g} points above that on "
    "validation rows and their 95 % Wilson intervals do not overlap"
)


@dataclass(frozen=True)
class Losses:
    """Summed NLL in nats of each example at the start (step 0), at the best step and at the end, eval mode; its tokens."""

    start: Sequence[float]
    best: Sequence[float]
    end: Sequence[float]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Sign:
    """One clause of RULE: whether it was raised (None: not measured), and the figures it was decided by, in words."""

    clause: str
    raised: bool | None
    figures: str


@dataclass(frozen=True)
class Verdict:
    """`flag`: True where any clause is raised; else None where one of the two on losses was not measured, else False.

    Exact match on training rows takes generating answers to them, which few runs do: where it is missing, say so beside it.
    """

    flag: bool | None
    signs: tuple[Sign, ...]
    rule: str = RULE


def verdict(
    validation: Losses | None = None,
    probe: Losses | None = None,
    exact: tuple[Sequence[bool], Sequence[bool]] | None = None,
    *,
    means: tuple[float, float, float] | None = None,
    train_means: tuple[float, float] | None = None,
    train_means_are: str = "",
    seed: int = 0,
) -> Verdict:
    """Applies RULE; `probe` is a fixed sample of training rows, `exact` rightness on it and on validation rows.

    Where losses per example are not at hand, `means` are the validation losses per token at the start, the best step and the
    end, and `train_means` those of training rows at the start and the end, with a word on where they come from.
    """
    signs = (
        _rise_of(validation, means, seed),
        _gap_of(validation, probe, means, train_means, train_means_are),
        Sign("exact match", None, UNMEASURED) if exact is None else _exact(*exact),
    )
    raised = [sign.raised for sign in signs]
    return Verdict(True if True in raised else None if None in raised[:2] else False, signs)


def _rise_of(validation: Losses | None, means: tuple[float, float, float] | None, seed: int) -> Sign:
    if validation is not None:
        return _rise(validation, seed)
    if means is None:
        return Sign("rise", None, UNMEASURED)
    _, best, end = means
    if end <= best:
        return Sign("rise", False, "the validation loss at the end is not above that at the best step")
    words = f"{end - best:+.4f} nats per token; whether that is chance, losses per example would tell"
    return Sign("rise", None, words)


def _gap_of(
    validation: Losses | None,
    probe: Losses | None,
    means: tuple[float, float, float] | None,
    train_means: tuple[float, float] | None,
    train_means_are: str,
) -> Sign:
    if validation is not None and probe is not None:
        return _gap(validation, probe)
    if means is None or train_means is None:
        return Sign("gap", None, UNMEASURED)
    if min(train_means[0], means[0]) <= 0:
        return Sign("gap", None, "the losses at the start are not above 0")
    found = gap(*train_means, means[0], means[2])
    return Sign("gap", found.raised, f"{found.figures}{train_means_are and f' ({train_means_are})'}")


def gap(train_start: float, train_end: float, validation_start: float, validation_end: float) -> Sign:
    """Clause (ii) from four losses per token; logged train losses instead of a probe's are said to be such by the caller."""
    if min(train_start, validation_start) <= 0:
        raise UserError("losses at the start have to be above 0")
    grew = (validation_end - train_end) - (validation_start - train_start)
    fell = 100 * (1 - train_end / train_start), 100 * (1 - validation_end / validation_start)
    raised = grew > GAP_NATS or fell[0] - fell[1] > GAP_POINTS
    words = (
        f"gap grew by {grew:+.3f} nats; training rows' loss fell by {fell[0]:.1f} %, validation loss by {fell[1]:.1f} %"
    )
    return Sign("gap", raised, words)


def _rise(losses: Losses, seed: int) -> Sign:
    best, end, tokens = (np.asarray(v, np.float64) for v in (losses.best, losses.end, losses.tokens))
    if np.array_equal(best, end):
        return Sign("rise", False, "the last step is the best one")
    found = bootstrap(end - best, tokens, seed=seed)
    words = f"{found.value:+.4f} nats per token ({found.low:+.4f} to {found.high:+.4f}), p = {found.p_above_zero:.2g}"
    return Sign("rise", bool(found.value > 0 and found.p_above_zero < LEVEL), words)


def _gap(validation: Losses, probe: Losses) -> Sign:
    def mean(nll: Sequence[float], of: Losses) -> float:
        return float(np.sum(nll) / np.sum(of.tokens))

    train = mean(probe.start, probe), mean(probe.end, probe)
    return gap(*train, mean(validation.start, validation), mean(validation.end, validation))


def _exact(probe: Sequence[bool], validation: Sequence[bool]) -> Sign:
    seen, held = wilson(sum(probe), len(probe)), wilson(sum(validation), len(validation))
    shares = sum(probe) / max(1, len(probe)), sum(validation) / max(1, len(validation))
    apart = bool(seen[0] > held[1] and 100 * (shares[0] - shares[1]) > EXACT_POINTS)
    words = (
        f"{100 * shares[0]:.1f} % of training rows ({100 * seen[0]:.1f} to {100 * seen[1]:.1f}), "
        f"{100 * shares[1]:.1f} % of validation rows ({100 * held[0]:.1f} to {100 * held[1]:.1f})"
    )
    return Sign("exact match", apart, words)
