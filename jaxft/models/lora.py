"""The adapter layer, written by hand: variable types, and a linear layer with a low-rank pair beside it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxft.models import ops
from jaxft.models.adaptation import Adaptation
from jaxft.models.quantize import Scheme, product
from jaxft.parallel.sharding import Axis, constrain


class Frozen(nnx.Variable):
    """A base tensor that no gradient reaches."""


class Codes(Frozen):
    """A quantised base tensor."""


class Scale(Frozen):
    """What lies beside the codes of one."""


class Trainable(nnx.Variable):
    """A tensor that the optimizer moves; float32, or where every weight is one bfloat16 by choice."""


class LoraParam(Trainable):
    """A or B of a low-rank pair, or DoRA's magnitude beside it."""


class Tuned(Trainable):
    """A base tensor trained in place."""


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
    the partitioner would rather move activations. On one device too they are narrowed here, as a TPU's compiler would do by
    itself: their gradients are then stacked in `dtype`, not in float32. DoRA's stay as they are: it takes lengths of them in
    float32.
    """
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
    (coded, dtype), scales = scheme.codes(shape), scheme.scales(shape)
    inputs = None if axes[0] == "embed" else axes[0]  # fsdp splits outputs, whose number no group has to divide
    along = ("layers", *((inputs, None) if coded[0] > 1 else (None, inputs)), _spread(axes[1]))
    L, about = len(paths), {"names": _names(paths, "weight"), "saved": None}
    codes = Codes(jnp.zeros((L, *coded), dtype), axes=along, transposed=True, scheme=scheme, **about)
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
    """A variable for the base tensors `path.leaf`: frozen in `dtype`, or trained in place in the plan's `param_dtype`.

    `stored` are the paths under which the checkpoint holds them, where those are others; `also` are paths under which an
    adapter holds them a second time.
    """
    trained = plan.trains(paths[0], leaf)
    saved = _names(paths, f"base_layer.{leaf}" if paths[0] in plan.adapters else leaf)  # as PEFT nests and saves them
    return (Tuned if trained else Frozen)(
        jnp.zeros(shape, plan.param_dtype if trained else dtype),
        axes=axes,
        names=_names(stored or paths, leaf),
        saved=saved + _names(also, leaf) if trained and not plan.every_weight else None,
        copied=paths[0] in plan.modules,
        transposed=False,
    )


def _names(paths: tuple[str, ...], leaf: str) -> tuple[str, ...]:
    return tuple(f"{path}.{leaf}" for path in paths)
