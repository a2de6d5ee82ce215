"""Attention in plain XLA, for every platform: `dense`, the oracle, and `blocked`, a CPU's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxft.models.attention.places import SAVED, Places
from jaxft.models.ops import soft_cap

MIN_BLOCK, MAX_BLOCKS = 64, 16


def dense(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    places: Places,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """All scores at once, softmax in fp32. Keys may lie in any order, so that a cache needs no other mask."""
    return checkpoint_name(_dense(q_BSNH, k_BTKH, v_BTKH, places, scale, window, cap), SAVED)


def _dense(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    places: Places,
    scale: float,
    window: int | None,
    cap: float | None,
) -> jax.Array:
    B, S, N, H = q_BSNH.shape
    K = k_BTKH.shape[2]
    q_BSKGH = q_BSNH.reshape(B, S, K, N // K, H)
    scores = _scores(q_BSKGH, k_BTKH) * scale
    visible = places.visible(window)
    # Finite, so that a row that sees nothing (an unused cache row) is uniform and not NaN.
    scores = jnp.where(visible[:, None, None], soft_cap(scores, cap), jnp.float32(-1e30))
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("BKGST,BTKH->BSKGH", weights, v_BTKH).reshape(B, S, N, H)


@jax.custom_vjp
def _scores(q_BSKGH: jax.Array, k_BTKH: jax.Array) -> jax.Array:
    """Products `[B,K,G,S,T]` in fp32, whose gradient is rounded to q's dtype: else a GPU multiplies in fp32 backwards."""
    return jnp.einsum("BSKGH,BTKH->BKGST", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32)


def _scores_forward(q: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _scores(q, k), (q, k)


def _scores_backward(kept: tuple[jax.Array, jax.Array], given: jax.Array) -> tuple[jax.Array, jax.Array]:
    (q, k), given = kept, given.astype(kept[0].dtype)
    return jnp.einsum("BKGST,BTKH->BSKGH", given, k), jnp.einsum("BKGST,BSKGH->BTKH", given, q)


_scores.defvjp(_scores_forward, _scores_backward)


def blocked(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    places: Places,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """`dense` by blocks of queries, each against the keys that it can see at most, and recomputed in the backward pass.

    On a CPU three times as fast as `dense` at S = 512, because a block's scores stay in the cache and half of them are
    never formed.
    """
    return checkpoint_name(_blocked(q_BSNH, k_BTKH, v_BTKH, places, scale, window, cap), SAVED)


@functools.partial(jax.checkpoint, static_argnums=(4, 5, 6))
def _blocked(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, scale: float, window: int | None, cap: float | None
) -> jax.Array:
    S = q.shape[1]
    size = max(MIN_BLOCK, -(-S // MAX_BLOCKS))
    parts = []
    for start in range(0, S, size):
        first = 0 if window is None else max(0, start - window + 1)
        here, seen = slice(start, start + size), slice(first, start + size)
        parts.append(_dense(q[:, here], k[:, seen], v[:, seen], places.cut(here, seen), scale, window, cap))
    return jnp.concatenate(parts, axis=1)
