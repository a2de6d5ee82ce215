"""Steps whose loss or gradient is not finite: what is said of them, and when a run stops for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError

SHOWN, KEPT = 4, 200  # rows named on a line, and in metrics.jsonl


class Skips:
    """The step on the devices leaves such an update out by itself. `origins(i)` are the rows of the batch of step i, from 0."""

    def __init__(self, most: int, origins: Callable[[int], Sequence[str]]):
        """`most` steps in a row stop the run."""
        self._most, self._origins = most, origins

    def told(self, step: int, nll: float, grad_norm: float, skipped: int) -> tuple[str, dict[str, Any]]:
        """A line, and a record for metrics.jsonl, about `step` (the number that the step led to), the `skipped`-th."""
        rows = list(self._origins(step - 1))
        more = f" and {len(rows) - SHOWN} more (metrics.jsonl)" if len(rows) > SHOWN else ""
        what = f"loss {nll:g}" if nll - nll != 0 else f"gradient norm {grad_norm:g}"
        line = f"step {step}: {what}, not finite: no update; its rows are {', '.join(rows[:SHOWN])}{more}"
        return line, {"step": step, "skipped": skipped, "skipped_rows": rows[:KEPT]}

    def check(self, step: int, in_row: int, latest: int | None) -> None:
        """Raises UserError where `step` was the last of too many; `latest` is the newest checkpoint."""
        if in_row >= self._most:
            raise UserError(
                f"loss or gradient not finite in {in_row} steps in a row, {step - in_row + 1} to {step}; step {step - in_row} "
                f"was the last good one, and the newest checkpoint, step {latest}, is good: look at these steps' rows "
                "(metrics.jsonl), or lower optim.learning_rate or set optim.clip and start in a new run.dir"
            )


def check_state(state: Any, latest: int | None) -> None:
    """Raises UserError where an array of a state that is to be saved is not finite, as far as it is on this process's devices.

    On the host, where a save copies it anyway: in the step it would be another pass over it each time.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        own = (shard.data for shard in leaf.addressable_shards if shard.replica_id == 0)
        if not all(np.isfinite(np.asarray(part)).all() for part in own):
            raise UserError(
                f"{jax.tree_util.keystr(path)} is no longer finite, from gradients that were; the newest checkpoint, step "
                f"{latest}, is good: lower optim.learning_rate, or raise optim.epsilon, and start in a new run.dir"
            )


def loss_not_finite(loss: float, step: int) -> UserError:
    """Where an evaluation comes to no number."""
    if step == 0:
        return UserError(
            f"eval_loss is {loss} before any step: the base model's weights are not finite, or its dtype too small"
        )
    return UserError(f"eval_loss is {loss} at step {step}; lower optim.learning_rate and start in a new run.dir")
