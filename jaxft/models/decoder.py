"""The only model: a decoder-only transformer built from an Arch, scanned over stacked layers, with a KV cache.

B batch, S query, T key, D model, N heads, K kv heads, H head dim, F ffn, V vocab, R rank, L stacked layers.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxft.models import ops
from jaxft.models.adaptation import Adaptation
from jaxft.models.arch import Arch, LayerSpec, stages
from jaxft.models.attention import Places
from jaxft.models.block import SITES, Context, Norm
from jaxft.models.lora import Trainable, table
from jaxft.models.stage import HIDDEN_AXES, Stage, in_groups
from jaxft.models.vocabulary import look_up, table_axes
from jaxft.parallel.sharding import check_split, constrain


class Cache(NamedTuple):
    """Keys and values already computed; slots need not be in order of position. Segment 0 marks an empty slot."""

    layers: Any  # per stage: per layer of the period: (keys, values), each [L,B,T,K,H]
    positions: jax.Array
    segments: jax.Array
    used: jax.Array


class Decoder(nnx.Module):
    """The whole model. Construct it under `nnx.eval_shape`; `weights.load` fills it."""

    def __init__(
        self,
        arch: Arch,
        plan: Adaptation | None = None,
        dtype: Any = jnp.float32,
        *,
        remat: str = "none",
        attention: str = "dense",
        mesh: Mesh | None = None,
    ):
        plan = plan or Adaptation()
        self.arch, self.remat, self.mesh, self.dtype = arch, remat, mesh, jnp.dtype(dtype)
        _check_heads(arch, mesh)
        names, shape = arch.names, (arch.vocab_size, arch.dim)
        also = (names.head,) if plan.keeps_tied else ()
        axes = table_axes(arch.vocab_size, mesh)
        self.embed, self.embed_scale = table(plan, names.embed, shape, axes, dtype, also=also)
        cuts = stages([self._record(i, plan) for i in range(len(arch.layers))])
        self.stages = nnx.List([Stage(arch, cut, plan, dtype, attention) for cut in cuts])
        self.norm = Norm((names.norm,), (arch.dim,), plan, arch, dtype)
        self.head, self.own_head_scale = self._head(plan, dtype)

    def _head(self, plan: Adaptation, dtype: Any) -> tuple[nnx.Variable | None, nnx.Variable | None]:
        """The output matrix, or None where it is the embedding itself.

        A tied head that parts from the embedding begins as it, because that is what PEFT makes of such an adapter.
        """
        arch, names = self.arch, self.arch.names
        if arch.tied_head and not plan.parts(arch):
            return None, None
        stored = names.embed if arch.tied_head else None
        axes = table_axes(arch.vocab_size, self.mesh)
        return table(plan, names.head, (arch.vocab_size, arch.dim), axes, dtype, stored=stored)

    def _record(self, layer: int, plan: Adaptation) -> tuple[LayerSpec, tuple[Any, ...]]:
        """What must be equal for two layers to be stacked: shapes, and what is trained module by module; not the window."""
        paths = [self.arch.module_path(layer, name) for name in (*self.arch.norms, *self.arch.linears)]
        return replace(self.arch.layers[layer], window=None), tuple(plan.of(path) for path in paths)

    def __call__(self, tokens: Any, positions: Any = None, segment_ids: Any = None) -> jax.Array:
        """Float32 logits `[B,S,V]` of int tokens `[B,S]`; positions count from 0 and segments are all 1 where None."""
        tokens = jnp.asarray(tokens, jnp.int32)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        positions, segments = jnp.asarray(positions, jnp.int32), jnp.asarray(segment_ids, jnp.int32)
        return _logits(*split(self), tokens, positions, segments)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        *,
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The normed last layer `[B,S,D]` and the cache with these tokens added.

        `key` turns adapter dropout on. With a cache, `cache.used + S` must not exceed its T slots.
        """
        h = constrain(self._embedded(tokens), HIDDEN_AXES, self.mesh)
        if self.arch.embed_scale is not None:
            h = h * jnp.asarray(
                self.arch.embed_scale, h.dtype
            )  # rounded to the weights' dtype, as transformers rounds it
        if cache is None:
            places = Places(positions, positions, segments, segments)
            context, layers = Context(places, None, self.mesh), [None] * len(self.stages)
        else:
            cache, context = _extend(cache, positions, segments, self.mesh)
            layers = cache.layers
        seeds = None if key is None else jax.random.bits(key, (len(self.arch.layers), SITES, 2), jnp.uint32)
        if self.remat == "nested" and cache is None and all(stage.repeats == 1 for stage in self.stages):
            return self.norm(in_groups(list(self.stages), h, context, seeds, self.mesh)), None
        written = []
        for stage, kv in zip(self.stages, layers):
            h, new = stage(h, context, kv, seeds, self.remat, self.mesh)
            written.append(new)
        return self.norm(h), (None if cache is None else cache._replace(layers=tuple(written)))

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        """`[B,S,D]` in the activations' dtype."""
        if self.embed_scale is None:
            return look_up(self.embed[...].astype(self.dtype), tokens, self.mesh)
        codes = look_up(self.embed[...], tokens, self.mesh).astype(jnp.float32)
        return (codes * self.embed_scale[...][tokens][..., None]).astype(self.dtype)

    @property
    def head_scale(self) -> jax.Array | None:
        """The scale `[V]` of the output matrix's rows where that holds int8 codes."""
        scale = self.embed_scale if self.head is None else self.own_head_scale
        return None if scale is None else scale[...]

    @property
    def head_VD(self) -> jax.Array:
        """The output matrix `[V,D]`, or its codes; the embedding where the head is tied."""
        return (self.embed if self.head is None else self.head)[...]

    def logits(self, h: jax.Array) -> jax.Array:
        """h `[...,D]` -> float32 `[...,V]`, capped where the family caps them."""
        head_VD = self.head_VD.astype(h.dtype)
        logits = jnp.einsum("...D,VD->...V", h, head_VD, preferred_element_type=jnp.float32)
        if self.head_scale is not None:
            logits = logits * self.head_scale.reshape((1,) * (logits.ndim - 1) + (-1,))
        return ops.soft_cap(logits, self.arch.logit_cap)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache of `slots` tokens per row."""
        layers = []
        for stage in self.stages:
            specs = [block.spec for block in stage.blocks]
            shapes = [(stage.repeats, batch, slots, s.kv_heads, s.head_dim) for s in specs]
            layers.append(tuple((jnp.zeros(s, self.dtype), jnp.zeros(s, self.dtype)) for s in shapes))
        empty = jnp.zeros((batch, slots), jnp.int32)
        return Cache(tuple(layers), empty, empty, jnp.zeros((), jnp.int32))


def _check_heads(arch: Arch, mesh: Mesh | None) -> None:
    """Raises UserError where tensor parallelism would cut a head in two: N·H may divide where N does not."""
    for i, layer in enumerate(arch.layers if mesh is not None else ()):
        fused = arch.names.qkv_proj is not None
        check_split(mesh, "heads", layer.heads, arch.module_path(i, "qkv_proj" if fused else "q_proj"))
        check_split(mesh, "kv_heads", layer.kv_heads, arch.module_path(i, "qkv_proj" if fused else "k_proj"))


def _extend(cache: Cache, positions: jax.Array, segments: jax.Array, mesh: Mesh | None) -> tuple[Cache, Context]:
    at = (jnp.zeros((), jnp.int32), cache.used)
    kv_positions = jax.lax.dynamic_update_slice(cache.positions, positions, at)
    kv_segments = jax.lax.dynamic_update_slice(cache.segments, segments, at)
    context = Context(Places(positions, kv_positions, segments, kv_segments), cache.used, mesh)
    used = cache.used + positions.shape[1]
    return cache._replace(positions=kv_positions, segments=kv_segments, used=used), context


def abstract(arch: Arch, plan: Adaptation | None = None, dtype: Any = jnp.float32, **options: Any) -> Decoder:
    """A Decoder whose variables are shapes only."""
    return nnx.eval_shape(lambda: Decoder(arch, plan, dtype, **options))


def split(model: Decoder) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """`(graphdef, trainable, frozen)`: the variables as flat dicts from dotted path to array, by variable type."""
    graphdef, trainable, frozen = nnx.split(model, Trainable, ...)
    return graphdef, _flat(trainable), _flat(frozen)


def join(graphdef: Any, trainable: dict[str, Any], frozen: dict[str, Any]) -> Decoder:
    """The inverse of `split`."""
    pairs = [(_path(name), value) for part in (trainable, frozen) for name, value in part.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(pairs))


def _flat(state: Any) -> dict[str, Any]:
    return {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(state)}


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, trainable: Any, frozen: Any, tokens: Any, positions: Any, segments: Any) -> jax.Array:
    """Compiled once per shape, where calling the module layer by layer would compile its scan at every call."""
    model = join(graphdef, trainable, frozen)
    return model.logits(model.hidden(tokens, positions, segments)[0])
