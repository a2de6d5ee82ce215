"""One layer of the decoder: attention and gated FFN, each after a norm and around a residual.

B batch, S query, T key, D model, N heads, K kv heads, H head dim, F ffn, V vocab, R rank, L stacked layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxft.models import ops
from jaxft.models.adaptation import Adaptation
from jaxft.models.arch import BIASES, NORMS, Arch
from jaxft.models.attention import KERNELS, Places
from jaxft.models.lora import Linear, base, read

LINEAR_AXES = {
    "q_proj": ("embed", "heads"), "k_proj": ("embed", "kv_heads"), "v_proj": ("embed", "kv_heads"),
    "qkv_proj": ("embed", "heads"), "o_proj": ("heads", "embed"), "gate_proj": ("embed", "ffn"), "up_proj": ("embed", "ffn"),
    "gate_up_proj": ("embed", "ffn"), "down_proj": ("ffn", "embed"),
}  # fmt: skip
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj")
OUT, DOWN = ("o_proj",), ("down_proj",)
SITES = 4  # of dropout in a layer: the inputs of q, k, v; of o; of gate and up; of down


class Context(NamedTuple):
    """What every layer needs to know of the tokens."""

    places: Places
    start: jax.Array | None  # first cache slot to write, int32 scalar; None without a cache
    mesh: Mesh | None


class Norm(nnx.Module):
    """RMSNorm of L stacked layers, `weight` `[L,D]` (or `[D]` for the final one)."""

    def __init__(self, paths: tuple[str, ...], shape: tuple[int, ...], plan: Adaptation, arch: Arch, dtype: Any):
        self.weight = base(plan, paths, shape, ("layers", "norm")[-len(shape) :], dtype)
        self.eps, self.plus_one = arch.norm_eps, arch.norm_plus_one

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.rms_norm(x, self.weight[...], self.eps, self.plus_one)


class Block(nnx.Module):
    """One layer of the scan's period: attention and gated FFN, each after a norm and around a residual.

    Gemma 2 norms what either gives as well, before it is added.
    """

    def __init__(self, arch: Arch, layers: tuple[int, ...], plan: Adaptation, dtype: Any, kernel: str):
        spec = arch.layers[layers[0]]
        self.spec, self.arch, self.kernel = spec, arch, kernel
        for name in NORMS:
            width = spec.head_dim if name in ("q_norm", "k_norm") else arch.dim
            paths = tuple(arch.module_path(i, name) for i in layers)
            present = name in arch.norms
            setattr(self, name, Norm(paths, (len(layers), width), plan, arch, dtype) if present else _unchanged)
        for name in arch.linears:
            paths, shape = tuple(arch.module_path(i, name) for i in layers), arch.linear_shape(layers[0], name)
            bias = getattr(spec, BIASES[name])
            setattr(self, name, Linear(paths, shape, LINEAR_AXES[name], plan, bias=bias, dtype=dtype))

    def __call__(
        self, h: jax.Array, context: Context, window: int | None, cache: Any, seeds: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """h `[B,S,D]` -> h, and the cache `(keys, values)`, each `[B,T,K,H]`, with this call's written in.

        `seeds` uint32 `[SITES,2]` turn dropout on.
        """
        mixed, cache = self._attend(self.input_norm(h), context, window, cache, seeds)
        h = h + self.attention_norm(*self._read(mixed, seeds, 1, OUT))
        inner = self._gated(self.mlp_norm(h), seeds)
        return h + self.mlp_output_norm(*self._read(inner, seeds, 3, DOWN)), cache

    def _attend(
        self, x: jax.Array, context: Context, window: int | None, cache: Any, seeds: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        spec, places, (B, S, _) = self.spec, context.places, x.shape
        q, k, v = self._qkv(x, seeds)
        frequencies = ops.rope_frequencies(self.arch.rope, spec.head_dim)
        q, k = (ops.rotate(t, places.q_positions, frequencies) for t in (self.q_norm(q), self.k_norm(k)))
        q, k, v = (checkpoint_name(t, "qkv") for t in (q, k, v))
        if cache is not None:
            at = (0, context.start, 0, 0)
            k, v = (jax.lax.dynamic_update_slice(old, new, at) for old, new in zip(cache, (k, v)))
            cache = (k, v)
        # The other kernels want keys in order, which a cache does not promise.
        kernel = KERNELS["dense" if cache is not None else self.kernel]
        scale = spec.head_dim**-0.5 if self.arch.query_scale is None else self.arch.query_scale
        settings = {"scale": scale, "window": window, "cap": self.arch.attention_cap, "mesh": context.mesh}
        mixed = kernel(q, k, v, places, **settings)
        return mixed.reshape(B, S, spec.heads * spec.head_dim), cache

    def _qkv(self, x: jax.Array, seeds: jax.Array | None) -> list[jax.Array]:
        """Queries `[B,S,N,H]`, keys and values `[B,S,K,H]`, from one fused projection or three."""
        heads = (self.spec.heads, self.spec.kv_heads, self.spec.kv_heads)
        parts = self._read(x, seeds, 0, QKV)
        if len(parts) == 1:
            ends = [self.spec.head_dim * sum(heads[: i + 1]) for i in range(2)]
            parts = jnp.split(parts[0], ends, axis=-1)
        return [part.reshape(*x.shape[:2], n, self.spec.head_dim) for part, n in zip(parts, heads)]

    def _gated(self, x: jax.Array, seeds: jax.Array | None) -> jax.Array:
        """activation(gate) · up, `[B,S,F]`, from one fused projection or two."""
        parts = self._read(x, seeds, 2, GATE_UP)
        gate, up = parts if len(parts) == 2 else jnp.split(parts[0], 2, axis=-1)
        return ops.ACTIVATIONS[self.arch.activation](gate) * up

    def _read(self, x: jax.Array, seeds: jax.Array | None, site: int, names: tuple[str, ...]) -> list[jax.Array]:
        """What those of the named linears that the family has make of x; `site` counts the inputs of a layer's linears."""
        readers = [getattr(self, name) for name in names if name in self.arch.linears]
        made = read(readers, x, None if seeds is None else seeds[site])
        return [checkpoint_name(part, "narrow" if names in (OUT, DOWN) else "wide") for part in made]


def _unchanged(x: jax.Array) -> jax.Array:
    """Stands where a family has no norm."""
    return x
