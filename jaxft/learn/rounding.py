"""Stochastic rounding: updates of weights that are held in bfloat16.

A bfloat16 has eight bits of precision, so that rounding to the nearest loses an update below a 512th of the weight, step after
step. Rounded up or down at random, in proportion to how near either is, the sum is right in expectation (Gupta et al. 2015,
arXiv:1502.02551; for training in bfloat16 alone Zamirai et al. 2020, arXiv:2010.06192).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.ops import random_bits

SIGN, LARGEST = np.uint32(0x80000000), np.uint32(0x7F7FFFFF)  # float32's sign, and its largest finite number


def stochastic(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 x as bfloat16: one of the two next to it, x on average over uniform uint32 `bits` of its shape.

    Values of bfloat16 stay as they are, infinities and NaN too; what lies beyond the largest finite one becomes that.
    """
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Sign and magnitude: the lower half of the bits is what has to go, on a scale that is even between two neighbours.
    magnitude = jnp.minimum((raw & ~SIGN) + (bits >> 16), LARGEST)
    upper = (((raw & SIGN) | magnitude) >> 16).astype(jnp.uint16)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(upper, jnp.bfloat16), x.astype(jnp.bfloat16))


def updated(
    parameters: Mapping[str, jax.Array], updates: Mapping[str, jax.Array], key: jax.Array
) -> dict[str, jax.Array]:
    """Path -> parameter plus its float32 update, in the parameter's dtype: float32, or bfloat16 by stochastic rounding.

    What is drawn depends on `key`, the path and an element's place: not on the mesh, nor on what else is trained.
    """
    narrow = [path for path, value in parameters.items() if value.dtype == jnp.bfloat16]
    sums = {path: value.astype(jnp.float32) + updates[path] for path, value in parameters.items()}
    if not narrow:
        return sums
    places = jnp.asarray([zlib.crc32(path.encode()) for path in narrow], jnp.uint32)
    seeds = jax.vmap(lambda place: jax.random.bits(jax.random.fold_in(key, place), (2,), jnp.uint32))(places)
    return sums | {
        path: stochastic(sums[path], random_bits(sums[path].shape, seed)) for path, seed in zip(narrow, seeds)
    }
