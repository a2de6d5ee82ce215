"""AdamW, its schedule and clipping, from optax, and LoRA+."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
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
    """Clip by global norm, Adam, decoupled decay of matrices (not of norms and biases), scheduled rate.

    Moments are float32 whatever the parameters are, and updates too. With LoRA+ (arXiv:2402.12354) rate and decay of what
    `_learns_faster` are those times `loraplus_lr_ratio`.
    """
    rows = [row for row in rows if row.trainable]
    decayed = {row.path: len(row.hub_shape) > 1 for row in rows}
    ratios = {row.path: optim.loraplus_lr_ratio for row in rows if _learns_faster(row)}
    parts = [] if optim.clip is None else [optax.clip_by_global_norm(optim.clip)]
    parts.append(optax.scale_by_adam(optim.beta1, optim.beta2, optim.epsilon))
    if optim.weight_decay:
        parts.append(optax.add_decayed_weights(optim.weight_decay, mask=decayed))
    chain = optax.chain(*parts, optax.scale_by_learning_rate(schedule(optim, steps)))

    def init(parameters: Any) -> Any:
        return chain.init(jax.tree.map(lambda value: value.astype(jnp.float32), parameters))

    def update(gradients: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        updates, state = chain.update(gradients, state, parameters)
        if optim.loraplus_lr_ratio != 1:
            updates = {path: update * ratios.get(path, 1.0) for path, update in updates.items()}
        return updates, state

    return optax.GradientTransformation(init, update)


def _learns_faster(row: Tensor) -> bool:
    """B of a pair, and every vector: biases, norms and DoRA's magnitudes (as PEFT's and the authors' optimizer)."""
    return row.names[0].endswith("lora_B.weight") or len(row.hub_shape) == 1
