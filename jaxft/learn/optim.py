"""AdamW, its schedule and clipping, from optax."""

from __future__ import annotations

import math
from collections.abc import Iterable

import optax

from jaxft.config import Optim
from jaxft.models.tensors import Tensor


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then constant, or to 0 at step `steps` (as transformers' schedules)."""
    peak, warmup = optim.learning_rate, warmup_steps(optim.warmup, steps)
    rest = max(1, steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[optim.schedule]
    return (
        optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup]) if warmup else after
    )


def warmup_steps(warmup: float, steps: int) -> int:
    """A number of steps, given as one or as a fraction below 1."""
    return math.ceil(warmup * steps) if warmup < 1 else int(warmup)


def optimizer(optim: Optim, steps: int, rows: Iterable[Tensor]) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay of matrices (not of norms and biases), scheduled rate."""
    decayed = {row.path: len(row.hub_shape) > 1 for row in rows if row.trainable}
    parts = [] if optim.clip is None else [optax.clip_by_global_norm(optim.clip)]
    parts.append(optax.scale_by_adam(optim.beta1, optim.beta2, optim.epsilon))
    if optim.weight_decay:
        parts.append(optax.add_decayed_weights(optim.weight_decay, mask=decayed))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule(optim, steps)))
