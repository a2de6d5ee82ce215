"""The adapter layer, written by hand: variable types, targets, and a linear layer with a low-rank pair beside it."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxft.config import Lora
from jaxft.errors import UserError
from jaxft.models import ops
from jaxft.models.arch import Arch
from jaxft.models.quantize import Scheme, product
from jaxft.parallel.sharding import Axis, constrain


class Frozen(nnx.Variable):
    """A base tensor that no gradient reaches."""


class Codes(Frozen):
    """A quantised base tensor."""


class Scale(Frozen):
    """What lies beside the codes of one."""


class Trainable(nnx.Variable):
    """A tensor that the optimizer moves; float32 always."""


class LoraParam(Trainable):
    """A or B of a low-rank pair, or DoRA's magnitude beside it."""


class Tuned(Trainable):
    """A base tensor trained in place."""


@dataclass(frozen=True)
class Adapter:
    """One pair: y = x W + scale · dropout(x) A B; with `dora`, that times a trained magnitude over its weights' length."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    own_mask: bool = False  # of dropout, apart from those of modules that read the same input

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (as PEFT)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Adaptation:
    """What is trained, by Hub path: modules with a pair, modules in full, biases alone; or every base tensor in place.

    A tied head and embedding part as soon as one of them is trained in full, unless `keeps_tied`. Matrices of linear modules
    that are not trained are held as `quantized` says, but for those of the modules `whole`; with `tables` the embedding and
    the head are held in int8.
    """

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    biases: frozenset[str] = frozenset()
    keeps_tied: bool = False
    every_weight: bool = False
    quantized: Scheme | None = None
    whole: frozenset[str] = frozenset()
    tables: bool = False

    def trains(self, path: str, leaf: str) -> bool:
        """Whether the base tensor `path.leaf` is trained."""
        return self.every_weight or path in self.modules or (leaf == "bias" and path in self.biases)

    def scheme(self, path: str) -> Scheme | None:
        """How the weight of a linear module is quantised, None where it is not."""
        return None if path in self.whole or self.trains(path, "weight") else self.quantized

    def of(self, path: str) -> tuple[Adapter | None, bool, bool, Scheme | None]:
        """All that is planned for one module; layers can be stacked where this agrees."""
        return self.adapters.get(path), path in self.modules, path in self.biases, self.scheme(path)

    def parts(self, arch: Arch) -> bool:
        """Whether a tied head and embedding are no longer the same, because one is trained in full or both are, apart."""
        ends = {arch.names.embed, arch.names.head}
        return arch.tied_head and arch.names.head is not None and not self.keeps_tied and bool(self.modules & ends)

    @property
    def bias(self) -> str:
        """PEFT's name for the biases trained: none, lora_only (of the modules with a pair) or all."""
        return "none" if not self.biases else "lora_only" if self.biases <= self.adapters.keys() else "all"


def adaptation(lora: Lora | None, arch: Arch) -> Adaptation:
    """What `lora` means for `arch`; None trains every weight. Raises UserError for a name that matches nothing."""
    if lora is None:
        return Adaptation(every_weight=True)
    paths = targets(lora.targets, arch)
    ranks = by_pattern(lora.rank_pattern, paths, lora.rank, "lora.rank_pattern")
    alphas = by_pattern(lora.alpha_pattern, paths, lora.alpha, "lora.alpha_pattern")
    kind = {
        "dropout": lora.dropout,
        "rslora": lora.rslora,
        "dora": lora.dora,
        "own_mask": lora.dropout_masks == "separate",
    }
    adapters = {p: Adapter(ranks[p], float(alphas[p]), **kind) for p in paths}
    modules = in_full(lora.train_modules, arch)
    both = sorted(modules & adapters.keys())
    if both:
        raise UserError(
            f"lora.train_modules and lora.targets both name {both[0]}; a module has a pair or is trained in full"
        )
    biased = {"none": (), "lora_only": paths, "all": arch.linear_shapes()}[lora.bias]
    return Adaptation(adapters, modules, arch.biased_paths().intersection(biased))


def described(plan: Adaptation) -> str:
    """What is trained, in a line: pairs by rank and module, modules in full, biases."""
    if plan.every_weight:
        return "every weight"
    kinds = Counter((pair.rank, pair.alpha, path.rpartition(".")[2]) for path, pair in plan.adapters.items())
    settings = list(dict.fromkeys(kind[:2] for kind in kinds))
    said = []
    for rank, alpha in settings:
        leaves = " ".join(f"{leaf}×{n}" for (r, a, leaf), n in kinds.items() if (r, a) == (rank, alpha))
        said.append(f"{'DoRA' if next(iter(plan.adapters.values())).dora else 'LoRA'} r={rank} α={alpha:g} on {leaves}")
    if plan.modules:
        said.append(f"in full {', '.join(sorted(plan.modules))}")
    if plan.biases:
        said.append(f"{len(plan.biases)} biases")
    return "; ".join(said)


def matching(patterns: Iterable[str], path: str) -> str | None:
    """PEFT's rule: the first of `patterns` that matches the end of a module path. Raises re.error."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", path)), None)


def by_pattern(patterns: Mapping[str, float], paths: Sequence[str], default: float, key: str) -> dict[str, Any]:
    """Path -> the value of the first of `patterns` that matches the path's end, by PEFT's rule; else `default`.

    Raises UserError for what is no regular expression, and for one that matches none of `paths`.
    """
    try:
        found = {path: matching(patterns, path) for path in paths}
        idle = [p for p in patterns if not any(matching([p], path) for path in paths)]
    except re.error as error:
        raise UserError(f"{key}: {error.pattern!r} is not a regular expression: {error}") from error
    if idle:
        raise UserError(f"{key}: {idle[0]!r} matches no adapted module (e.g. {paths[0]})")
    return {path: default if pattern is None else patterns[pattern] for path, pattern in found.items()}


def quantized(plan: Adaptation, scheme: Scheme, skip: Sequence[str], tables: bool, arch: Arch) -> Adaptation:
    """`plan` with the linear modules' frozen weights held as `scheme` says, but for those that `skip` names; see Adaptation.

    Raises UserError for a name that matches none, and for a group that does not divide a module's inputs.
    """
    shapes = arch.linear_shapes()
    idle = [name for name in skip if not any(_named(path, name) for path in shapes)]
    if idle:
        existing = sorted({path.rpartition(".")[2] for path in shapes})
        raise UserError(
            f"model.quantize_skip: {idle[0]!r} matches no linear module; {arch.family} has {', '.join(existing)}"
        )
    whole = frozenset(path for path in shapes if any(_named(path, name) for name in skip))
    found = replace(plan, quantized=scheme, whole=whole, tables=tables)
    for path, shape in shapes.items():
        try:
            if found.scheme(path) is not None:
                scheme.codes(shape)
        except UserError as error:
            raise UserError(
                f"model.quantize_group: {path}: {error}; take another group or scheme, or name it in model.quantize_skip"
            ) from None
    return found


def in_full(names: Sequence[str], arch: Arch) -> frozenset[str]:
    """Hub paths of the modules that `names` select: those that equal one or end in `.name`. UserError for an idle name."""
    paths = arch.module_paths()
    idle = [name for name in names if not any(_named(path, name) for path in paths)]
    if idle:
        existing = sorted({path.rpartition(".")[2] for path in paths})
        raise UserError(f"lora.train_modules: {idle[0]!r} matches no module; {arch.family} has {', '.join(existing)}")
    return frozenset(path for path in paths if any(_named(path, name) for name in names))


def targets(wanted: str | tuple[str, ...], arch: Arch) -> list[str]:
    """Hub paths of the linear modules that `wanted` selects, by PEFT's rules.

    `all-linear`: every one. A sequence of names: a path that equals one or ends in `.name`. Any other string: a
    regular expression over the whole path, or a single name. UserError, with what exists, where a name matches nothing.
    """
    paths = list(arch.linear_shapes())
    if wanted == "all-linear":
        return paths
    if isinstance(wanted, str):
        try:
            selected = [p for p in paths if re.fullmatch(wanted, p)]
        except re.error as error:
            raise UserError(f"lora.targets: {wanted!r} is not a regular expression: {error}") from error
        if selected:
            return selected
        wanted = (wanted,)
    unmatched = [name for name in wanted if not any(_named(p, name) for p in paths)]
    if unmatched or not wanted:
        existing = sorted({p.rpartition(".")[2] for p in paths})
        raise UserError(
            f"lora.targets: {', '.join(map(repr, unmatched)) or 'an empty list'} matches no linear module; "
            f"{arch.family} has {', '.join(existing)} (e.g. {paths[0]})"
        )
    return [p for p in paths if any(_named(p, name) for name in wanted)]


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


class Linear(nnx.Module):
    """y = x W (+ bias) (+ the pair), for one module of each of L stacked layers; a scan strips the leading axis.

    `kernel` `[L,out,in]`, as the files have it, so that loading copies rows, or `codes` and `scales` (`quantize`); `bias`
    `[L,out]`, `a` `[L,in,R]`, `b` `[L,R,out]`, `magnitude` `[L,out]`. Every variable carries its logical `axes`, the Hub
    `names` of its L tensors, and whether the file holds its transpose.
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        shape: tuple[int, int],
        axes: tuple[str, str],
        plan: Adaptation,
        *,
        bias: bool,
        dtype: jnp.dtype,
    ):
        L, (n_in, n_out) = len(paths), shape
        self.adapter = plan.adapters.get(paths[0])
        self.scheme = plan.scheme(paths[0])
        if self.scheme is None:
            self.kernel = base(plan, paths, (L, n_out, n_in), ("layers", axes[1], axes[0]), dtype)
        else:
            self.codes, scales = _coded(self.scheme, paths, shape, axes)
            self.scales = nnx.Dict(scales)
        self.bias = base(plan, paths, (L, n_out), ("layers", axes[1]), dtype, leaf="bias") if bias else None
        if self.adapter is not None:
            R = self.adapter.rank
            inputs, outputs = map(_spread, axes)
            self.a = _pair(paths, "lora_A.weight", (L, n_in, R), ("layers", inputs, None))
            self.b = _pair(paths, "lora_B.weight", (L, R, n_out), ("layers", None, outputs))
            if self.adapter.dora:
                self.magnitude = _pair(paths, "lora_magnitude_vector", (L, n_out), ("layers", outputs))

    def __call__(self, x: jax.Array, low: jax.Array | None = None) -> jax.Array:
        """x `[B,S,in]` -> `[B,S,out]`; `low` `[B,S,R]` is what A made of x, where there is a pair."""
        if self.scheme is None:
            y = jnp.einsum("BSi,oi->BSo", x, self.kernel[...].astype(x.dtype))
        else:
            y = product(self.scheme, x, self.codes[...], self._scale_values())
        if self.adapter is not None:
            # x A first: A B as a matrix would cost in · out a token.
            y = y + _raised(low * self.adapter.scale, self.b[...].astype(x.dtype))
            if self.adapter.dora:
                # In fp32: bfloat16 would round a factor near 1 to steps of 0.4 %, and small changes would do nothing.
                factor = (self.magnitude[...] / self._norm())[None, None, :]
                y = (y.astype(jnp.float32) * factor).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, None, :]

    def _scale_values(self) -> dict[str, jax.Array]:
        return {name: scale[...] for name, scale in self.scales.items()}

    def _norm(self) -> jax.Array:
        """Length of each output's weights W + scale · A B, fp32 `[out]`, constant in the backward pass (as DoRA's authors).

        Expanded as |W|² + 2 W·AB + |AB|², so that A B is never formed.
        """
        scale, a, b = self.adapter.scale, self.a[...], self.b[...]
        if self.scheme is None:
            kernel = self.kernel[...].astype(jnp.float32)
        else:
            kernel = self.scheme.decode(self.codes[...], self._scale_values(), jnp.float32).T
        crossed = jnp.sum((kernel @ a).T * b, axis=0)
        added = jnp.sum(((a.T @ a) @ b) * b, axis=0)
        square = jnp.sum(jnp.square(kernel), axis=1) + 2 * scale * crossed + scale**2 * added
        return jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny)))


def read(readers: Sequence[Linear], x: jax.Array, seed: jax.Array | None) -> list[jax.Array]:
    """What several linear layers make of x `[B,S,in]`, each `[B,S,out]`; `seed` uint32 `[2]` turns adapters' dropout on."""
    adapted = [reader for reader in readers if reader.adapter is not None]
    if not adapted:
        return [reader(x) for reader in readers]
    if seed is not None and adapted[0].adapter.own_mask:
        seeds = [seed + np.uint32(i) for i in range(len(adapted))]
        parts = [_lowered([reader], x, own)[0] for reader, own in zip(adapted, seeds)]
    else:
        parts = _lowered(adapted, x, seed)
    lows = iter(parts)
    return [reader(x, None if reader.adapter is None else next(lows)) for reader in readers]


def _lowered(readers: Sequence[Linear], x: jax.Array, seed: jax.Array | None) -> list[jax.Array]:
    """dropout(x) A of each reader, `[B,S,R]`, under one mask; in one product, because a few columns take as long as many."""
    rate = max(reader.adapter.dropout for reader in readers)
    a = readers[0].a[...].astype(x.dtype)
    if len(readers) > 1:
        a = ops.apart(jnp.concatenate([reader.a[...] for reader in readers], axis=1).astype(x.dtype))
    low = _dropped_product(x, a, None if rate == 0 else seed, rate)
    ends = np.cumsum([reader.adapter.rank for reader in readers])[:-1]
    return jnp.split(checkpoint_name(low, "low"), ends, axis=2)


def gathered_pairs(state: nnx.State, dtype: Any, mesh: Mesh | None) -> nnx.State:
    """`state` with every A and B whole over fsdp and in `dtype`, the activations'.

    Gathered once before the scan, they are a few megabytes; in each of its turns they would be a dozen small transfers, and
    the partitioner would rather move activations. DoRA's stay as they are: it takes lengths of them in float32.
    """
    if mesh is None or mesh.size == 1:
        return state
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        if isinstance(variable, LoraParam) and (*path[:-1], "magnitude") not in flat:
            axes = tuple(axis[0] if isinstance(axis, tuple) else None for axis in variable.axes)
            flat[path] = variable.replace(constrain(variable.get_value().astype(dtype), axes, mesh))
    return nnx.from_flat_state(flat)


def gathered_codes(state: nnx.State, mesh: Mesh | None) -> nnx.State:
    """One layer's `state` with quantised weights whole over fsdp.

    They travel as codes, which are a half or a quarter of what they decode to; the partitioner by itself sends that.
    """
    if mesh is None or mesh.size == 1:
        return state
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        if isinstance(variable, (Codes, Scale)):
            axes = tuple(axis[0] if isinstance(axis, tuple) else axis for axis in variable.axes[1:])
            axes = tuple(None if axis == "embed" else axis for axis in axes)
            flat[path] = variable.replace(constrain(variable.get_value(), axes, mesh))
    return nnx.from_flat_state(flat)


# A TPU's compiler takes long over a product of few columns that has much fused into it, so what those with A and B read and
# make are arrays of their own: a fifth of the compiling or more, for -5 to +3 % of the bytes (tests/benchmarks/step.md).


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dropped_product(x: jax.Array, a: jax.Array, seed: jax.Array | None, rate: float) -> jax.Array:
    """dropout(x) A, for x `[B,S,in]` and A `[in,R]`; without dropout where `seed` is None."""
    return _dropped_forward(x, a, seed, rate)[0]


def _dropped_forward(x: jax.Array, a: jax.Array, seed: jax.Array | None, rate: float) -> tuple[jax.Array, Any]:
    dropped = x if seed is None else ops.apart(ops.dropout(x, rate, seed))
    return dropped @ a, (dropped, a, seed)


def _dropped_backward(rate: float, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    dropped, a, seed = kept
    g = ops.apart(g)
    of_a = jax.lax.dot_general(g, dropped, (((0, 1), (0, 1)), ((), ()))).T
    of_x = ops.apart(jax.lax.dot_general(g, a, (((2,), (1,)), ((), ()))))
    return of_x if seed is None else ops.dropout(of_x, rate, seed), of_a, None


_dropped_product.defvjp(_dropped_forward, _dropped_backward)


@jax.custom_vjp
def _raised(low: jax.Array, b: jax.Array) -> jax.Array:
    """low `[B,S,R]` times B `[R,out]`, with B's gradient on a CPU as lowᵀ g.

    JAX's own is (gᵀ low)ᵀ, for which XLA on a CPU writes gᵀ `[out,B·S]` out, and what g is made of with it. On a TPU lowᵀ g
    computes the same and takes longer to compile.
    """
    return _raised_forward(low, b)[0]


def _raised_forward(low: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return ops.apart(low @ b), (low, b)


def _raised_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, b = kept
    of_b = jax.lax.platform_dependent(
        low,
        g,
        cpu=lambda low, g: jnp.einsum("BSR,BSo->Ro", low, g),
        default=lambda low, g: jax.lax.dot_general(g, low, (((0, 1), (0, 1)), ((), ()))).T,
    )
    return jax.lax.dot_general(g, b, (((2,), (1,)), ((), ()))), of_b


_raised.defvjp(_raised_forward, _raised_backward)


def _spread(axis: str) -> Axis:
    """The axis of a pair whose other axis is the rank: split over fsdp as well, so that no device holds all of it."""
    return axis if axis == "embed" else (axis, "spare")


def _pair(paths: tuple[str, ...], leaf: str, shape: tuple[int, ...], axes: tuple[Axis, ...]) -> LoraParam:
    names = _names(paths, leaf)
    return LoraParam(jnp.zeros(shape, jnp.float32), axes=axes, names=names, saved=names, transposed=len(shape) == 3)


def table(
    plan: Adaptation,
    path: str,
    shape: tuple[int, int],
    axes: tuple[Axis, Axis],
    dtype: jnp.dtype,
    *,
    stored: str | None = None,
    also: tuple[str, ...] = (),
) -> tuple[nnx.Variable, Scale | None]:
    """An embedding or head `[V,D]`, and where it is held in int8 the scale `[V]` of its rows.

    `stored` and `also` are as `base` has them.
    """
    holders = None if stored is None else (stored,)
    if not plan.tables or plan.trains(path, "weight"):
        return base(plan, (path,), shape, axes, dtype, stored=holders, also=also), None
    about = {"names": _names(holders or (path,), "weight"), "saved": None, "transposed": False}
    codes = Codes(jnp.zeros(shape, jnp.int8), axes=axes, scheme=Scheme("int8"), **about)
    return codes, Scale(jnp.zeros(shape[:1], jnp.float32), axes=(axes[0],), **about)


def _coded(
    scheme: Scheme, paths: tuple[str, ...], shape: tuple[int, int], axes: tuple[str, str]
) -> tuple[Codes, dict[str, Scale]]:
    """The codes `[L,groups,inputs,out]` of L quantised matrices, and their scales by name."""
    shapes, scales = scheme.codes(shape), scheme.scales(shape)
    inputs = None if axes[0] == "embed" else axes[0]  # fsdp splits outputs, whose number no group has to divide
    along = ("layers", *((inputs, None) if shapes[0] > 1 else (None, inputs)), _spread(axes[1]))
    L, about = len(paths), {"names": _names(paths, "weight"), "saved": None}
    codes = Codes(jnp.zeros((L, *shapes), scheme.dtype), axes=along, transposed=True, scheme=scheme, **about)
    split = {1: ("layers", None), 2: (*along[:2], along[3])}
    return codes, {
        name: Scale(jnp.zeros((L, *of), dtype), axes=split[len(of)], transposed=False, **about)
        for name, (of, dtype) in scales.items()
    }


def base(
    plan: Adaptation,
    paths: tuple[str, ...],
    shape: tuple[int, ...],
    axes: tuple[Axis, ...],
    dtype: jnp.dtype,
    *,
    leaf: str = "weight",
    stored: tuple[str, ...] | None = None,
    also: tuple[str, ...] = (),
) -> nnx.Variable:
    """A variable for the base tensors `path.leaf`: frozen in `dtype`, or trained in place in float32.

    `stored` are the paths under which the checkpoint holds them, where those are others; `also` are paths under which an
    adapter holds them a second time.
    """
    trained = plan.trains(paths[0], leaf)
    saved = _names(paths, f"base_layer.{leaf}" if paths[0] in plan.adapters else leaf)  # as PEFT nests and saves them
    return (Tuned if trained else Frozen)(
        jnp.zeros(shape, jnp.float32 if trained else dtype),
        axes=axes,
        names=_names(stored or paths, leaf),
        saved=saved + _names(also, leaf) if trained and not plan.every_weight else None,
        copied=paths[0] in plan.modules,
        transposed=False,
    )


def _names(paths: tuple[str, ...], leaf: str) -> tuple[str, ...]:
    return tuple(f"{path}.{leaf}" for path in paths)
