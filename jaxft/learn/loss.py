"""Cross-entropy and token accuracy in one pass over chunks of positions, so that no `[B,S,V]` array need exist."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.models.decoder import Decoder

CHUNK_ELEMENTS = 1 << 25  # logits held at once: 128 MiB in float32


class Tally(NamedTuple):
    """Sums over supervised tokens, float32 scalars; their quotients do not depend on how the tokens were batched."""

    nll: jax.Array
    correct: jax.Array
    weight: jax.Array

    def __add__(self, other: Tally) -> Tally:  # type: ignore[override]
        return Tally(*(a + b for a, b in zip(self, other)))


def tally(model: Decoder, h: jax.Array, targets: jax.Array, weights: jax.Array) -> Tally:
    """Loss and accuracy sums of hidden `[B,S,D]` against int32 targets `[B,S]` under float32 weights `[B,S]`.

    Logits are formed `[B,chunk,V]` at a time and formed again in the backward pass.
    """
    (B, S, _), V = h.shape, model.arch.vocab_size
    chunks = _chunks(S, max(1, CHUNK_ELEMENTS // (B * V)))
    if chunks == 1:
        return _tally(model, h, targets, weights)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, chunks, S // chunks, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(total: Tally, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Tally, None]:
        return total + _tally(model, *part), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(one, Tally(zero, zero, zero), (cut(h), cut(targets), cut(weights)))[0]


def _tally(model: Decoder, h: jax.Array, targets: jax.Array, weights: jax.Array) -> Tally:
    logits = model.logits(h)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    right = (jnp.argmax(logits, axis=-1).astype(jnp.int32) == targets).astype(jnp.float32)
    return Tally(jnp.sum(nll * weights), jnp.sum(right * weights), jnp.sum(weights))


def _chunks(positions: int, largest: int) -> int:
    """The fewest equal chunks of at most `largest` positions."""
    return next(n for n in range(1, positions + 1) if positions % n == 0 and positions // n <= largest)
