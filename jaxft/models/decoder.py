"""The only model: a decoder-only transformer built from an Arch, scanned over stacked layers, with a KV cache.

B batch, S query, T key, D model, N heads, K kv heads, H head dim, F ffn, V vocab, R rank, L stacked layers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxft.models import ops
from jaxft.models.arch import BIASES, NORMS, Arch, LayerSpec, stages
from jaxft.models.attention import KERNELS, SAVED, Places
from jaxft.models.lora import Adaptation, Linear, Trainable, base, gathered_pairs, read
from jaxft.models.vocabulary import look_up, table_axes
from jaxft.parallel.sharding import check_split, constrain

LINEAR_AXES = {
    "q_proj": ("embed", "heads"), "k_proj": ("embed", "kv_heads"), "v_proj": ("embed", "kv_heads"),
    "qkv_proj": ("embed", "heads"), "o_proj": ("heads", "embed"), "gate_proj": ("embed", "ffn"), "up_proj": ("embed", "ffn"),
    "gate_up_proj": ("embed", "ffn"), "down_proj": ("ffn", "embed"),
}  # fmt: skip
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj")
OUT, DOWN = ("o_proj",), ("down_proj",)
HIDDEN_AXES = ("batch", None, None)
SITES = 4  # of dropout in a layer: the inputs of q, k, v; of o; of gate and up; of down


class Context(NamedTuple):
    """What every layer needs to know of the tokens."""

    places: Places
    start: jax.Array | None  # first cache slot to write, int32 scalar; None without a cache
    mesh: Mesh | None


class Cache(NamedTuple):
    """Keys and values already computed; slots need not be in order of position. Segment 0 marks an empty slot."""

    layers: Any  # per stage: per layer of the period: (keys, values), each [L,B,T,K,H]
    positions: jax.Array
    segments: jax.Array
    used: jax.Array


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

    def __call__(self, h: jax.Array, context: Context, cache: Any, seeds: jax.Array | None) -> tuple[jax.Array, Any]:
        """h `[B,S,D]` -> h, and the cache `(keys, values)`, each `[B,T,K,H]`, with this call's written in.

        `seeds` uint32 `[SITES,2]` turn dropout on.
        """
        mixed, cache = self._attend(self.input_norm(h), context, cache, seeds)
        h = h + self.attention_norm(*self._read(mixed, seeds, 1, OUT))
        inner = self._gated(self.mlp_norm(h), seeds)
        return h + self.mlp_output_norm(*self._read(inner, seeds, 3, DOWN)), cache

    def _attend(self, x: jax.Array, context: Context, cache: Any, seeds: jax.Array | None) -> tuple[jax.Array, Any]:
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
        settings = {"scale": scale, "window": spec.window, "cap": self.arch.attention_cap, "mesh": context.mesh}
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


class Stage(nnx.Module):
    """`repeats` times a period of blocks, run as one scan over their stacked variables."""

    def __init__(self, arch: Arch, cut: tuple[int, int, int], plan: Adaptation, dtype: Any, kernel: str):
        first, period, repeats = cut
        self.first, self.period, self.repeats = first, period, repeats
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

        def body(h: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            state, drawn, kv = layer
            written = []
            for p, block in enumerate(nnx.merge(graphdef, state)):
                h, new = block(h, context, None if kv is None else kv[p], None if drawn is None else drawn[p])
                h = constrain(h, HIDDEN_AXES, mesh)
                written.append(new)
            return h, (None if kv is None else tuple(written))

        return jax.lax.scan(_remat(body, remat), h, (stacked, seeds, cache))


# What a policy keeps for the backward pass; the rest is computed again. Norms, rope and activations always are: of matmuls,
# dots repeats none, qkv the gated layer's first two, full all.
KEPT = {
    "dots": ("wide", "narrow", "low", SAVED),
    "qkv": ("qkv", "narrow", "low", SAVED),
    "full": (),
}


def _remat(body: Any, policy: str) -> Any:
    if policy == "none":
        return body
    kept = jax.checkpoint_policies.save_only_these_names(*KEPT[policy])
    # Inside a scan nothing can be merged across the boundary, so the barrier that prevents it would only cost.
    return jax.checkpoint(body, policy=kept, prevent_cse=False)


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
        self.embed = base(plan, (names.embed,), shape, table_axes(arch.vocab_size, mesh), dtype, also=also)
        cuts = stages([self._record(i, plan) for i in range(len(arch.layers))])
        self.stages = nnx.List([Stage(arch, cut, plan, dtype, attention) for cut in cuts])
        self.norm = Norm((names.norm,), (arch.dim,), plan, arch, dtype)
        self.head = self._head(plan, dtype)

    def _head(self, plan: Adaptation, dtype: Any) -> nnx.Variable | None:
        """The output matrix, or None where it is the embedding itself.

        A tied head that parts from the embedding begins as it, because that is what PEFT makes of such an adapter.
        """
        arch, names = self.arch, self.arch.names
        if arch.tied_head and not plan.parts(arch):
            return None
        stored = (names.embed,) if arch.tied_head else None
        axes = table_axes(arch.vocab_size, self.mesh)
        return base(plan, (names.head,), (arch.vocab_size, arch.dim), axes, dtype, stored=stored)

    def _record(self, layer: int, plan: Adaptation) -> tuple[LayerSpec, tuple[Any, ...]]:
        """What must be equal for two layers to be stacked: shapes, and what is trained module by module."""
        paths = [self.arch.module_path(layer, name) for name in (*self.arch.norms, *self.arch.linears)]
        return self.arch.layers[layer], tuple(plan.of(path) for path in paths)

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
        h = constrain(look_up(self.embed[...].astype(self.dtype), tokens, self.mesh), HIDDEN_AXES, self.mesh)
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
        written = []
        for stage, kv in zip(self.stages, layers):
            h, new = stage(h, context, kv, seeds, self.remat, self.mesh)
            written.append(new)
        return self.norm(h), (None if cache is None else cache._replace(layers=tuple(written)))

    @property
    def head_VD(self) -> jax.Array:
        """The output matrix `[V,D]`, which is the embedding where the head is tied."""
        return (self.embed if self.head is None else self.head)[...]

    def logits(self, h: jax.Array) -> jax.Array:
        """h `[...,D]` -> float32 `[...,V]`, capped where the family caps them."""
        head_VD = self.head_VD.astype(h.dtype)
        logits = jnp.einsum("...D,VD->...V", h, head_VD, preferred_element_type=jnp.float32)
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
