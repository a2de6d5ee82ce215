"""Where queries and keys stand, in a row and on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.parallel.sharding import spec

# The name, for `saved`, of the values that a kernel's backward pass reads and that its forward pass computed.
SAVED = "attention"
_named = jax.checkpoint_policies.save_only_these_names(SAVED)


def saved(primitive: Any, *avals: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: keep what spares a kernel's forward pass from being run again.

    That is the output `[B,S,N,H]`, and the softmax's normalisers `[B,N,S]` of splash and cuDNN, whose call cannot be named.
    """
    return _named(primitive, *avals, **params) or primitive.name == "dot_product_attention_fwd_wrapper"


class Places(NamedTuple):
    """Where queries `[B,S]` and keys `[B,T]` stand: int32 position within a row, and the number of its segment."""

    q_positions: jax.Array
    kv_positions: jax.Array
    q_segments: jax.Array
    kv_segments: jax.Array

    def cut(self, queries: slice, keys: slice) -> Places:
        """Those of some queries and some keys."""
        q, kv = (slice(None), queries), (slice(None), keys)
        return Places(self.q_positions[q], self.kv_positions[kv], self.q_segments[q], self.kv_segments[kv])

    def visible(self, window: int | None) -> jax.Array:
        """Which keys a query sees, bool `[B,S,T]`."""
        behind = self.q_positions[:, :, None] - self.kv_positions[:, None, :]
        seen = (self.q_segments[:, :, None] == self.kv_segments[:, None, :]) & (behind >= 0)
        return seen if window is None else seen & (behind < window)


def lengthen(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, length: int
) -> tuple[jax.Array, jax.Array, jax.Array, Places]:
    """Queries and keys that are the same tokens, filled up to `length` of them with zeros in a segment of their own."""
    more = length - q.shape[1]
    if more == 0:
        return q, k, v, places
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q, k, v))
    positions = jnp.pad(places.q_positions, ((0, 0), (0, more)))
    # No real segment has a negative number. Each filler sees itself at least, so that no softmax is empty.
    segments = jnp.pad(places.q_segments, ((0, 0), (0, more)), constant_values=-1)
    return q, k, v, Places(positions, positions, segments, segments)


def on_each_device(
    local: Callable[..., jax.Array], mesh: Mesh | None, q: jax.Array, k: jax.Array, v: jax.Array, places: Places
) -> jax.Array:
    """`local(q, k, v, places)` of each device's own rows and heads; attention needs nothing from another device."""
    if mesh is None or mesh.size == 1:
        return local(q, k, v, places)
    queries = spec(("batch", None, "heads", None), mesh, q.shape)
    keys = spec(("batch", None, "kv_heads", None), mesh, k.shape)
    rows = spec(("batch", None), mesh, places.q_positions.shape)
    # check_vma knows nothing of what a custom kernel returns.
    split = jax.shard_map(local, mesh=mesh, in_specs=(queries, keys, keys, rows), out_specs=queries, check_vma=False)
    return split(q, k, v, places)
