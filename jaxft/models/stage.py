"""Layers of equal shapes as one scan over their stacked variables, and what of them is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxft.models.adaptation import Adaptation
from jaxft.models.arch import Arch
from jaxft.models.attention import SAVED, saved
from jaxft.models.block import Block, Context
from jaxft.models.lora import gathered_codes, gathered_pairs
from jaxft.parallel.sharding import constrain

HIDDEN_AXES = ("batch", None, None)

# What a policy keeps for the backward pass; the rest is computed again. Norms, rope and activations always are: of matmuls,
# dots repeats none, qkv the gated layer's first two, full all but those with A, whose few columns cost next to nothing.
KEPT = {
    "dots": ("wide", "narrow", "low", SAVED),
    "qkv": ("qkv", "narrow", "low", SAVED),
    "full": ("low",),
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

        variables = stacked, seeds, cache
        if turns == 1:  # by itself, because a CPU's compiler copies every weight that is reshaped for the scan
            return jax.lax.scan(_remat(lambda h, layer: one(h, layer, windows), remat), h, variables)
        parted = jax.tree.map(lambda x: x.reshape(self.repeats // turns, turns, *x.shape[1:]), variables)
        h, written = jax.lax.scan(_remat(several, remat), h, parted)
        return h, jax.tree.map(lambda x: x.reshape(self.repeats, *x.shape[2:]), written)


def _turns(windows: Sequence[int | None], period: int, repeats: int) -> int:
    """Of how many periods one turn of the scan consists, so that the windows are the same in all turns."""
    for turns in range(1, repeats + 1):
        length = turns * period
        if repeats % turns == 0 and all(w == windows[i % length] for i, w in enumerate(windows)):
            return turns
    raise AssertionError("all of them in one turn are the same in all turns")


def _remat(body: Any, policy: str) -> Any:
    if policy == "none":
        return body
    policies, names = jax.checkpoint_policies, KEPT[policy]
    kept = policies.save_only_these_names(*names)
    if SAVED in names:  # also where a kernel's results have no name
        kept = policies.save_from_both_policies(kept, saved)
    # Inside a scan nothing can be merged across the boundary, so the barrier that prevents it would only cost.
    return jax.checkpoint(body, policy=kept, prevent_cse=False)
