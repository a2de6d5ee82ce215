"""Layers of equal shapes as one scan over their stacked variables, and what of them is kept for the backward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxft.models.adaptation import Adaptation
from jaxft.models.arch import Arch, nest
from jaxft.models.attention import SAVED, saved
from jaxft.models.block import Block, Context
from jaxft.models.lora import Trainable, gathered_codes, gathered_pairs
from jaxft.parallel.sharding import constrain

HIDDEN_AXES = ("batch", None, None)

# What a policy keeps for the backward pass; the rest is computed again. Norms, rope and activations always are: of matmuls,
# dots repeats none, qkv the gated layer's first two, full all but those with A, whose few columns cost next to nothing. nested
# keeps of a group of layers what goes in, computes the group again and then is full within it.
KEPT = {
    "dots": ("wide", "narrow", "low", SAVED),
    "qkv": ("qkv", "narrow", "low", SAVED),
    "full": ("low",),
    "nested": ("low",),
}


class Stage(nnx.Module):
    """`repeats` times a period of blocks, whose windows may differ from turn to turn."""

    def __init__(self, arch: Arch, cut: tuple[int, int, int], plan: Adaptation, dtype: Any, kernel: str):
        first, period, repeats = cut
        self.first, self.period, self.repeats = first, period, repeats
        self.windows = tuple(layer.window for layer in arch.layers[first : first + period * repeats])
        layers = [tuple(range(first + p, first + period * repeats, period)) for p in range(period)]
        self.blocks = nnx.List([Block(arch, indices, plan, dtype, kernel) for indices in layers])

    def __call__(
        self, h: jax.Array, context: Context, cache: Any, seeds: jax.Array | None, remat: str, mesh: Mesh | None
    ) -> tuple[jax.Array, Any]:
        """`seeds` are uint32 `[all layers,SITES,2]`."""
        graphdef, stacked = nnx.split(self.blocks)
        stacked = gathered_pairs(stacked, h.dtype, mesh)
        if seeds is not None:
            own = seeds[self.first : self.first + self.repeats * self.period]
            seeds = own.reshape(self.repeats, self.period, *seeds.shape[1:])
        # A window that no row outgrows is none, and layers that differ in it alone are then one body to compile.
        keys = context.places.kv_segments.shape[1]
        windows = [None if window is None or window >= keys else window for window in self.windows]
        turns = _turns(windows, self.period, self.repeats)

        def one(h: jax.Array, layers: Any, windows: Sequence[int | None]) -> tuple[jax.Array, Any]:
            state, drawn, kv = layers
            written = []
            for p, block in enumerate(nnx.merge(graphdef, gathered_codes(state, mesh))):
                seed = None if drawn is None else drawn[p]
                h, new = block(h, context, windows[p], None if kv is None else kv[p], seed)
                h = constrain(h, HIDDEN_AXES, mesh)
                written.append(new)
            return h, (None if kv is None else tuple(written))

        def several(h: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
            written = []
            for t in range(turns):
                h, new = one(h, jax.tree.map(lambda x: x[t], layers), windows[t * self.period :])  # noqa: B023
                written.append(new)
            return h, jax.tree.map(lambda *x: jnp.stack(x), *written)

        variables, body = (stacked, seeds, cache), several
        if turns == 1:  # by itself, because a CPU's compiler copies every weight that is reshaped for the scan
            body = lambda h, layer: one(h, layer, windows)  # noqa: E731
        else:
            variables = jax.tree.map(lambda x: x.reshape(self.repeats // turns, turns, *x.shape[1:]), variables)
        if remat == "nested" and cache is None and nest(self.repeats // turns)[0] > 1:
            return _nested(body, h, *variables[:2], self.repeats // turns), None
        h, written = jax.lax.scan(_remat(body, remat, alone=turns == self.repeats), h, variables)
        return h, written if turns == 1 else jax.tree.map(lambda x: x.reshape(self.repeats, *x.shape[2:]), written)


def _turns(windows: Sequence[int | None], period: int, repeats: int) -> int:
    """Of how many periods one turn of the scan consists, so that the windows are the same in all turns."""
    for turns in range(1, repeats + 1):
        length = turns * period
        if repeats % turns == 0 and all(w == windows[i % length] for i, w in enumerate(windows)):
            return turns
    raise AssertionError("all of them in one turn are the same in all turns")


def _nested(body: Any, h: jax.Array, stacked: Any, seeds: Any, units: int) -> jax.Array:
    """`body` over so many units as a scan over groups of a scan over a group's, what goes into either kept for the backward
    pass; a rest that is no whole group comes last.

    What is not trained is indexed where a unit computes with it: as operands of two scans a group of weights would be copied.
    """
    groups, size, rest = nest(units)
    trained, constant = nnx.split_state(stacked, Trainable, ...)

    def unit(h: jax.Array, own: Any) -> tuple[jax.Array, None]:
        index, trained = own
        at = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
        state, drawn = jax.tree.map(at, (constant, seeds))
        return body(h, (nnx.merge_state(trained, state), drawn, None))[0], None

    def group(h: jax.Array, own: Any) -> tuple[jax.Array, None]:
        return jax.lax.scan(_remat(unit, "nested"), h, own)

    def cut(first: int, *shape: int) -> Any:
        return jax.tree.map(lambda x: x[first : first + math.prod(shape)].reshape(*shape, *x.shape[1:]), each)

    each = jnp.arange(units, dtype=jnp.int32), trained
    h, _ = jax.lax.scan(jax.checkpoint(group, prevent_cse=False), h, cut(0, groups, size))
    return jax.checkpoint(group)(h, cut(groups * size, rest))[0] if rest else h


def in_groups(stages: Sequence[Stage], h: jax.Array, context: Context, seeds: Any, mesh: Mesh | None) -> jax.Array:
    """The same over stages of one layer, which differ and are in no scan."""

    def group(first: int, h: jax.Array) -> jax.Array:
        for stage in stages[first : first + size]:
            h, _ = stage(h, context, None, seeds, "full", mesh)
        return h

    groups, size, _ = nest(len(stages))
    for first in range(0, len(stages), size):
        whole = functools.partial(group, first)
        h = jax.checkpoint(whole)(h) if groups > 1 else whole(h)
    return h


def _remat(body: Any, policy: str, *, alone: bool = False) -> Any:
    if policy == "none":
        return body
    policies, names = jax.checkpoint_policies, KEPT[policy]
    kept = policies.save_only_these_names(*names)
    if SAVED in names:  # also where a kernel's results have no name
        kept = policies.save_from_both_policies(kept, saved)
    # Inside a scan nothing can be merged across the boundary, so the barrier that prevents it would only cost. Of a scan that
    # turns once the compiler makes none, and would merge what is computed again with what was.
    return jax.checkpoint(body, policy=kept, prevent_cse=alone)
