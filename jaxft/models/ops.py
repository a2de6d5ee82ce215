"""The decoder's mathematics as pure functions: fp32 inside, the caller's dtype outside."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.arch import Llama3Scaling, Rope

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, plus_one: bool = False) -> jax.Array:
    """x `[..., D]` over its root mean square in fp32, rounded to x's dtype, then scaled by `weight` `[D]` (as transformers).

    `plus_one` is Gemma's: scaled by 1 + weight in fp32, and rounded after that.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if plus_one:
        return (normed * (1 + _like(weight, normed))).astype(x.dtype)
    return normed.astype(x.dtype) * _like(weight, x)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(x / cap), which keeps x within ±cap; x itself where None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position, fp32 `[H/2]`, one per pair (i, i + H/2)."""
    frequencies = 1.0 / (rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)) / rope.linear
    if rope.llama3 is not None:
        frequencies = _llama3(frequencies, rope.llama3)
    return frequencies.astype(np.float32)


def _llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    turns = scaling.original_positions * frequencies / (2 * math.pi)  # within the original context
    ramp = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    kept = np.clip(ramp, 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotates pairs (i, i + H/2) by position, in Hugging Face's rotate-half layout.

    x `[B,S,N,H]`, positions `[B,S]` int32; angles in fp32, because bfloat16 rounds 257 to 256.
    """
    angles = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequencies)[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def dropout(x: jax.Array, rate: float, seed: jax.Array) -> jax.Array:
    """x `[B,S,F]` with each element zeroed with probability `rate` and the rest scaled by 1 / (1 - rate).

    `seed` is uint32 `[2]`.
    """
    keep = random_bits(x.shape, seed) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def random_bits(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Uint32 of `shape` `[..., F]`, drawn by `seed` uint32 `[2]`.

    A hash of an element's place: a tenth of Threefry's arithmetic, nothing to keep for a backward pass, and the same on any
    mesh. Rows number below 2³², and so do the elements of one.
    """
    leading = (*shape[:-1], 1)
    row = jnp.zeros(leading, jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        row = row * np.uint32(size) + _index(leading, axis)
    rows = _mixed(_mixed(row + seed[0]) ^ seed[1])
    return _mixed(rows + _index(shape, len(shape) - 1) * np.uint32(0x9E3779B9))


def apart(x: jax.Array) -> jax.Array:
    """x as an array of its own on a TPU, fused into nothing that reads it."""
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)


def _index(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.uint32, shape, axis)


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit of the input moves half of the output's (Wellons' lowbias32, public domain)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _like(weight: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.expand_dims(weight.astype(x.dtype), tuple(range(x.ndim - weight.ndim)))
