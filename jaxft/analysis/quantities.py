"""The quantities that reports of fine-tuning runs print, from a run's metric lines, each with its definition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jaxft.analysis import token_accuracy, trends

TRAIN = "train_loss_decrease_percent"
VALIDATION = "validation_loss_decrease_percent"
FINAL = "final_steps_change_percent"
ACCURACY = "token_accuracy"


def of_lines(
    train: Sequence[Mapping[str, float]],
    evaluations: Sequence[Mapping[str, float]],
    best_step: int | None = None,
    *,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """JSON-ready: name -> value, definition, and what it was computed from; value None where the lines do not suffice.

    `train` and `evaluations` are lines of metrics.jsonl by step: `step`, `loss`, `num_tokens` so far, `learning_rate`, and
    `step`, `eval_loss`, `eval_mean_token_accuracy`. Validation has no interval here, because one line has no examples:
    `trends.of_examples` gives it from losses per example.
    """
    at = {line["step"]: line for line in evaluations}
    return {
        TRAIN: _train(train),
        VALIDATION: _validation(at, best_step),
        FINAL: _final(train, evaluations, seed),
        ACCURACY: _accuracy(at, best_step),
    }


def _train(lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    if len(lines) < 2:
        return _unknown("mean logged train loss of the first steps against the last", "fewer than two log lines")
    found = trends.of_log([line["step"] for line in lines], [line["loss"] for line in lines], _tokens(lines))
    return {"value": _finite(found.percent), "before": found.before, "after": found.after, "nats": found.nats,
            "definition": found.definition}  # fmt: skip


def _tokens(lines: Sequence[Mapping[str, float]]) -> list[float] | None:
    """The tokens of each log line, from the count so far; None where a line lacks it or it does not rise."""
    so_far = [line.get("num_tokens") for line in lines]
    if any(count is None for count in so_far):
        return None
    each = [b - a for a, b in zip([0, *so_far], so_far)]
    return each if min(each) > 0 else None


def _validation(at: Mapping[float, Mapping[str, float]], best_step: int | None) -> dict[str, Any]:
    definition = (
        "100 · (start - best) / start of the validation loss (Σ nll / Σ supervised tokens, dropout off): start is step 0, "
        "before any training, best is the step whose weights are kept; to the end it is the same with the last evaluation"
    )
    steps = sorted(at)
    if 0 not in at or best_step not in at:
        return _unknown(definition, "no evaluation at step 0 or at the best step")
    start, best, end = (at[step]["eval_loss"] for step in (0, best_step, steps[-1]))
    return {"value": _fall(start, best), "to_end": _fall(start, end), "before": start, "after": best, "nats": start - best,
            "best_step": best_step, "definition": definition}  # fmt: skip


def _final(
    train: Sequence[Mapping[str, float]], evaluations: Sequence[Mapping[str, float]], seed: int
) -> dict[str, Any]:
    definition = (
        f"Theil-Sen slope of the logged train loss over the last {100 * trends.FINAL_SHARE:g} % of steps × their number / mean "
        "loss, in percent, with a 95 % moving-block bootstrap interval; still improving only where the whole interval is "
        "below 0 and validation loss falls there too; a learning rate near 0 flattens it by itself"
    )
    found = (
        trends.final_steps([line["step"] for line in train], [line["loss"] for line in train], seed=seed)
        if train
        else None
    )
    if found is None:
        return _unknown(
            definition,
            f"fewer than {trends.LEAST_POINTS} log lines in the last {100 * trends.FINAL_SHARE:g} % of steps",
        )
    improving = trends.still_improving(
        found, [line["step"] for line in evaluations], [line["eval_loss"] for line in evaluations]
    )
    return {
        "value": 100 * found.change,
        "interval": [100 * bound for bound in found.change_interval],
        "still_improving": improving,
        "learning_rate_at_end": train[-1].get("learning_rate"),
        "trend": asdict(found),
        "definition": definition,
    }


def _accuracy(at: Mapping[float, Mapping[str, float]], best_step: int | None) -> dict[str, Any]:
    definition = (
        f"{token_accuracy.LABEL}: Σ correct / Σ supervised tokens on validation rows, at step 0, at the best step and at the "
        "last one"
    )
    steps = sorted(step for step in at if at[step].get("eval_mean_token_accuracy") is not None)
    if 0 not in steps:
        return _unknown(definition, "no evaluation at step 0")
    start, end = (at[step]["eval_mean_token_accuracy"] for step in (0, steps[-1]))
    best = at[best_step]["eval_mean_token_accuracy"] if best_step in steps else None
    return {"value": end, "start": start, "best": best, "end": end, "definition": definition}


def _fall(start: float, end: float) -> float | None:
    return _finite(100 * (start - end) / start) if start else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _unknown(definition: str, why: str) -> dict[str, Any]:
    return {"value": None, "why": why, "definition": definition}
