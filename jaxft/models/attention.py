"""Attention: one signature, the plain XLA kernel as the oracle of every other."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    scale: float,
) -> jax.Array:
    """Causal grouped-query attention within segments, softmax in fp32; returns `[B,S,N,H]` in q's dtype.

    Positions and segments are int32 `[B,S]` and `[B,T]`: a query sees a key of its own segment whose position is not
    after its own. Keys may lie in any order, so a cache needs no other mask. Query head n uses key head n // (N/K).
    """
    B, S, N, H = q_BSNH.shape
    K = k_BTKH.shape[2]
    q_BSKGH = q_BSNH.reshape(B, S, K, N // K, H)
    scores = jnp.einsum("BSKGH,BTKH->BKGST", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32) * scale
    visible = (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv_positions[:, None, :] <= q_positions[:, :, None])
    # Finite, so that a row that sees nothing (an unused cache row) is uniform and not NaN.
    scores = jnp.where(visible[:, None, None], scores, jnp.float32(-1e30))
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("BKGST,BTKH->BSKGH", weights, v_BTKH).reshape(B, S, N, H)
