"""Frozen weights in eight or four bits: how a matrix is coded, and what the model computes with instead.

A coded matrix is `codes` `[groups,inputs of a group,out]`, so that inputs that share a scale lie across a TPU's lanes and
nothing has to be moved about to decode it, and a few arrays of scales beside it. Eight four-bit codes share a 32-bit word, a
TPU's own (bytes would have to be widened, and JAX's four-bit arrays cannot go into a program that was compiled ahead of time
for a CPU, 0.10.2). All functions here take one matrix at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError

# The 16 quantiles of a normal distribution that QLoRA published (arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # weights that share a scale of nf4, in the order of the file
DOUBLE_BLOCK = 256  # such scales that share one of their own
MIDDLE = 8  # of int4's codes, which are 1 to 15
WORDS = {8: jnp.int32, 4: jnp.int16, 2: jnp.uint8}  # how many four-bit codes share one
SHIFTS = np.arange(0, 32, 4, dtype=np.int32)  # of the codes in a word
TINY = np.float32(1e-38)  # instead of the scale of a block of zeros


@dataclass(frozen=True)
class Scheme:
    """int8: symmetric, a scale per output. int4: symmetric, a scale per `group` inputs of an output. nf4: the NF4 code, a
    scale per 64 weights; with `double` these scales are held in eight bits, as bitsandbytes does."""

    name: str
    group: int = BLOCK
    double: bool = False

    def groups(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """`(groups, inputs of a group, out)` of weights `[in,out]` = `shape`; one group where scales do not go by groups of
        inputs. Raises UserError for a group that does not divide the inputs."""
        n_in, n_out = shape
        size = {"int8": n_in, "int4": self.group, "nf4": BLOCK if n_in % BLOCK == 0 else n_in}[self.name]
        least = 1 if self.name == "int8" else min(WORDS)
        if n_in % size or size % least:
            raise UserError(f"{n_in} inputs are not a multiple of {max(size % n_in, least)}")
        return n_in // size, size, n_out

    def codes(self, shape: tuple[int, int]) -> tuple[tuple[int, int, int], jnp.dtype]:
        """Shape and dtype of the codes of weights `[in,out]` = `shape`, as they are packed. Raises UserError as `groups`."""
        groups, size, n_out = self.groups(shape)
        if self.name == "int8":
            return (groups, size, n_out), jnp.dtype(jnp.int8)
        packed = _sharing(size)
        return (groups, size // packed, n_out), jnp.dtype(WORDS[packed])

    def packed(self, dtype: jnp.dtype) -> int:
        """How many inputs share an element of codes of this dtype."""
        return 1 if self.name == "int8" else 2 * jnp.dtype(dtype).itemsize

    def shape(self, codes: tuple[int, ...], dtype: jnp.dtype) -> tuple[int, int]:
        """`[in,out]` of the weights whose codes are of that shape, `[…,groups,inputs of a group,out]`, and dtype."""
        return math.prod(codes[-3:-1]) * self.packed(dtype), codes[-1]

    def scales(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
        """Name -> shape and dtype of what lies beside the codes of weights `[in,out]` = `shape`: a scale `[groups,out]`, or
        `[blocks]` where blocks run over the ends of a file's rows."""
        (groups, size, n_out), blocks = self.groups(shape), math.ceil(math.prod(shape) / BLOCK)
        held = (blocks,) if self.name == "nf4" and size != BLOCK else (groups, n_out)
        if not self.double:
            return {"scale": (held, jnp.dtype(jnp.float32))}
        return {
            "scale": (held, jnp.dtype(jnp.uint8)),
            "scale_of_scale": ((math.ceil(blocks / DOUBLE_BLOCK),), jnp.dtype(jnp.float32)),
            "scale_offset": ((1,), jnp.dtype(jnp.float32)),
        }

    def bits(self, shape: tuple[int, int]) -> float:
        """Of one weight, scales included."""
        held = sum(math.prod(of) * dtype.itemsize * 8 for of, dtype in self.scales(shape).values())
        return (8 if self.name == "int8" else 4) + held / math.prod(shape)

    def encode(self, weights: jax.Array) -> dict[str, jax.Array]:
        """`codes` and the scales of `[out,in]` weights, as a file has them, of any float dtype. int8 and int4 round half to
        even."""
        weights = weights.astype(jnp.float32)
        parts = weights.T.reshape(self.groups(weights.shape[::-1]))
        if self.name == "nf4":
            return self._encode_nf4(weights, parts.shape)
        scale = jnp.maximum(jnp.max(jnp.abs(parts), axis=1), TINY) / (127 if self.name == "int8" else MIDDLE - 1)
        codes = jnp.round(parts / scale[:, None, :])
        codes = codes.astype(jnp.int8) if self.name == "int8" else _packed(codes.astype(jnp.int32) + MIDDLE)
        return {"codes": codes, "scale": scale}

    def _encode_nf4(self, weights: jax.Array, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        scaled, scale = _blocks(weights, BLOCK)
        codes = _nearest(scaled, np.array(NF4, np.float32)).reshape(-1)[: weights.size]
        found = {"codes": _packed(codes.reshape(weights.shape).T.reshape(shape))}
        if not self.double:
            return found | {"scale": _by_output(scale, weights.shape)}
        offset = jnp.mean(scale)
        scaled, outer = _blocks(scale - offset, DOUBLE_BLOCK)
        inner = _nearest(scaled, dynamic_code()).reshape(-1)[: scale.size].astype(jnp.uint8)
        return found | {
            "scale": _by_output(inner, weights.shape),
            "scale_of_scale": outer,
            "scale_offset": offset[None],
        }

    def decode(
        self,
        codes: jax.Array,
        scales: Mapping[str, jax.Array],
        dtype: jnp.dtype,
        shifts: jax.Array | np.ndarray = SHIFTS,
    ) -> jax.Array:
        """The weights `[in,out]` that the codes stand for, in `dtype`; products in float32, as bitsandbytes has them.

        `shifts` may be SHIFTS as an array of this matrix alone: a compiler makes one loop of what reads the same array, and
        matrices that are decoded in one loop are all held at once.
        """
        values = self.values(codes, shifts)
        groups, parts, rows, n_out = values.shape
        size = parts * rows
        scale = self._scale(scales, (n_out, groups * size))
        if scale.ndim == 2:
            wide = scale[:, None, None, :]
        else:
            blocks = jnp.broadcast_to(scale[:, None], (scale.shape[0], BLOCK)).reshape(-1)[: size * n_out]
            wide = blocks.reshape(n_out, size).T.reshape(values.shape)
        return (values * wide).astype(dtype).reshape(-1, n_out)

    def values(self, codes: jax.Array, shifts: jax.Array | np.ndarray = SHIFTS) -> jax.Array:
        """What the codes stand for before they are scaled, float32 `[groups,parts,inputs of a part,out]`: in their order.

        All parts are shifted out by one operation, so that the compiler has one loop to make of a matrix.
        """
        if self.name == "int8":
            return codes.astype(jnp.float32)[:, None]
        index = (codes.astype(jnp.int32)[:, None] >> shifts[None, : self.packed(codes.dtype), None, None]) & 15
        return _looked_up(index) if self.name == "nf4" else (index - MIDDLE).astype(jnp.float32)

    def _scale(self, scales: Mapping[str, jax.Array], shape: tuple[int, int]) -> jax.Array:
        scale = scales["scale"]
        if not self.double:
            return scale
        outer = jnp.repeat(scales["scale_of_scale"], DOUBLE_BLOCK)[: scale.size]
        inner = jnp.asarray(dynamic_code())[scale.astype(jnp.int32)]
        return inner * _by_output(outer, shape) + scales["scale_offset"][0]


def _sharing(size: int) -> int:
    """How many codes of a group of `size` inputs share a word."""
    return next(packed for packed in WORDS if size % packed == 0)


def _packed(codes: jax.Array) -> jax.Array:
    """int32 codes 0 to 15 `[groups,size,out]` as words `[groups,size / 8,out]`, or shorter ones where 8 does not divide the
    size: a group's first inputs in the lowest four bits, the next as many above."""
    groups, size, n_out = codes.shape
    packed = _sharing(size)
    parts = codes.reshape(groups, packed, size // packed, n_out) << SHIFTS[None, :packed, None, None]
    return functools.reduce(jnp.bitwise_or, (parts[:, i] for i in range(packed))).astype(WORDS[packed])


def _by_output(scale: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Scales in the order of a file's weights `[out,in]` = `shape`, as `[in / block,out]` where blocks end with rows."""
    n_out, n_in = shape
    return scale.reshape(n_out, -1).T if n_in % BLOCK == 0 else scale


def encode_rows(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An embedding or head `[V,D]` as int8 codes `[V,D]` and a float32 scale per row `[V]`."""
    table = table.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(table), axis=1), TINY) / 127
    return jnp.round(table / scale[:, None]).astype(jnp.int8), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(scheme: Scheme, x: jax.Array, codes: jax.Array, scales: Mapping[str, jax.Array]) -> jax.Array:
    """x `[B,S,in]` times the weights that `codes` stand for: `[B,S,out]`.

    The gradient goes to x alone, through the decoded weights. They are decoded again for it, and not before: a compiler that
    keeps them from the forward pass holds two layers of the model in full.
    """
    return _product(scheme, x, codes, scales)


def _product(scheme: Scheme, x: jax.Array, codes: jax.Array, scales: Mapping[str, jax.Array]) -> jax.Array:
    if scheme.name != "int8":
        x, weights = _decoded_for(scheme, x, codes, scales)
        return jnp.einsum("BSi,io->BSo", x, weights)
    # A scale per output is for what comes out, in float32; codes up to 127 are exact in bfloat16.
    made = jnp.einsum("BSi,io->BSo", x, codes[0].astype(x.dtype), preferred_element_type=jnp.float32)
    return (made * scales["scale"][None]).astype(x.dtype)


def _decoded_for(
    scheme: Scheme, x: jax.Array, codes: jax.Array, scales: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """x, and the weights in its dtype, decoded no sooner than x is there."""
    x, scales, shifts = jax.lax.optimization_barrier((x, scales, jnp.asarray(SHIFTS)))
    return x, scheme.decode(codes, scales, x.dtype, shifts)


def _forward(
    scheme: Scheme, x: jax.Array, codes: jax.Array, scales: Mapping[str, jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, Mapping[str, jax.Array]]]:
    return _product(scheme, x, codes, scales), (codes, scales)


def _backward(scheme: Scheme, kept: Any, g: jax.Array) -> tuple[jax.Array, None, None]:
    codes, scales = kept
    if scheme.name != "int8":
        g, weights = _decoded_for(scheme, g, codes, scales)
        return jnp.einsum("BSo,io->BSi", g, weights), None, None
    scaled = (g.astype(jnp.float32) * scales["scale"][None]).astype(g.dtype)
    return jnp.einsum("BSo,io->BSi", scaled, codes[0].astype(g.dtype)), None, None


product.defvjp(_forward, _backward)


def _blocks(values: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """`[blocks,size]` of the values in order, each over its block's greatest, in -1 to 1, and those; the last is filled up."""
    flat = values.reshape(-1)
    parts = jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size)
    scale = jnp.max(jnp.abs(parts), axis=1)
    return jnp.clip(parts * (1 / jnp.maximum(scale, TINY))[:, None], -1, 1), scale


def _nearest(values: jax.Array, code: np.ndarray) -> jax.Array:
    """Index of the nearest of a sorted code, the lower of two as near, int32."""
    return jnp.searchsorted(jnp.asarray((code[:-1] + code[1:]) / 2), values, side="left", method="compare_all").astype(
        jnp.int32
    )


def _looked_up(index: jax.Array) -> jax.Array:
    """NF4 of int32 codes, float32, by four rounds of selection: a gather of single weights would take far longer."""
    values = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        chosen = (index >> bit) & 1 == 1
        values = [jnp.where(chosen, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]


def dynamic_code() -> np.ndarray:
    """The 256 values in which bitsandbytes holds scales of scales, float32: seven decades, finer towards one
    (Dettmers 2016, 8-bit approximations for parallelism)."""
    values = [0.0, 1.0]
    for decade in range(7):
        ends = _line(np.float32(0.1), np.float32(1), 2**decade)
        magnitudes = np.float32(10.0 ** (decade - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))
        values += [*magnitudes.tolist(), *(-magnitudes).tolist()]
    return np.sort(np.array(values, np.float32))


def _line(start: np.float32, end: np.float32, steps: int) -> np.ndarray:
    """`steps` equal steps from both ends to the middle, rounded once each, to the last bit as torch.linspace in float32."""
    step, i = np.float64((end - start) / np.float32(steps)), np.arange(steps + 1)
    return np.where(i < (steps + 1) // 2, start + step * i, end - step * (steps - i)).astype(np.float32)
