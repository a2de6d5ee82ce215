"""Attention on an NVIDIA GPU: cuDNN's fused kernel, and Tokamax's where scores are capped."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.errors import UserError
from jaxft.models.attention.places import Places, lengthen, on_each_device

# Rows are filled up to a multiple of this: of both kernels' tiles, and even, as cuDNN's backward pass wants them.
LENGTHS = 128


@dataclass(frozen=True)
class Limits:
    """What a kernel can do: heads up to `head_dim` (a multiple of 8) in 16 bits, on which GPUs, with a soft-cap or not."""

    head_dim: int
    capability: tuple[float, float]  # from, and below; NVIDIA's compute capability
    cap: bool


LIMITS = {
    # jax._src.cudnn: heads beyond 128 from Hopper on.
    "cudnn": Limits(256, (8.0, float("inf")), cap=False),
    # Its Mosaic kernel for Hopper; on Blackwell it has no backward pass for heads beyond 64.
    "tokamax": Limits(256, (9.0, 10.0), cap=True),
}
HOPPER, WIDEST_BEFORE = 9.0, 128


def lacks(name: str, head_dim: int, cap: float | None, dtype: Any, capability: float | None = None) -> str | None:
    """Why a kernel of LIMITS cannot compute this, as the end of a sentence; None where it can."""
    limits = LIMITS[name]
    if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return "is not installed; `pip install 'jaxft[tokamax]'` and then `pip install --no-deps tokamax`"
    if cap is not None and not limits.cap:
        return f"cannot cap scores (here at {cap:g})"
    if jnp.dtype(dtype).itemsize != 2:
        return f"computes in bfloat16 or float16, not in {jnp.dtype(dtype)}"
    if head_dim > limits.head_dim or head_dim % 8:
        return f"takes heads of at most {limits.head_dim} and a multiple of 8, not of {head_dim}"
    if capability is None:
        return None
    first, beyond = limits.capability
    if not first <= capability < beyond:
        until = "" if beyond == float("inf") else f" to below {beyond:g}"
        return f"is for GPUs of compute capability {first:g}{until or ' or more'}, not {capability:g}"
    if head_dim > WIDEST_BEFORE and capability < HOPPER:
        return f"takes heads of {head_dim} from compute capability {HOPPER:g} on, not on {capability:g}"
    return None


def _check(name: str, q: jax.Array, cap: float | None) -> None:
    why = lacks(name, q.shape[-1], cap, q.dtype)
    if why:
        raise UserError(f"model.attention: {name} {why}; set it to auto or dense")


def cudnn(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    places: Places,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """cuDNN's flash attention, in 16 bits. Raises UserError where it cannot compute what is asked.

    Segments and window are a mask `[B,1,S,S]`. cuDNN's own packing by offsets is private to JAX, wants a bound on the
    segments of a row, and in jax 0.10.2 multiplies the keys' offsets by the number of query heads.
    """
    _check("cudnn", q_BSNH, cap)
    local = functools.partial(_cudnn, scale=scale, window=window, implementation="cudnn")
    return on_each_device(local, mesh, q_BSNH, k_BTKH, v_BTKH, places)


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, *, scale: float, window: int | None, implementation: str
) -> jax.Array:
    S = q.shape[1]
    q, k, v, places = lengthen(q, k, v, places, -(-S // LENGTHS) * LENGTHS)
    mask = places.visible(window)[:, None]
    # Causal besides, which the mask already is, so that what nobody sees is skipped.
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True, implementation=implementation)
    return out[:, :S]


def tokamax(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    places: Places,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Tokamax's flash attention for Hopper, in 16 bits. Raises UserError where it is not installed or cannot compute this.

    Segments and window are a mask `[B,1,S,S]`, because its public function has no other way to say them. `saved` cannot
    reach into it, so that its forward pass is run again where activations are recomputed.
    """
    _check("tokamax", q_BSNH, cap)
    local = functools.partial(_tokamax, scale=scale, window=window, cap=cap, implementation="mosaic_gpu")
    return on_each_device(local, mesh, q_BSNH, k_BTKH, v_BTKH, places)


def _tokamax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    *,
    scale: float,
    window: int | None,
    cap: float | None,
    implementation: str,
) -> jax.Array:
    S = q.shape[1]
    q, k, v, places = lengthen(q, k, v, places, -(-S // LENGTHS) * LENGTHS)
    mask = places.visible(window)[:, None]
    out = _library().dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=True, logits_soft_cap=cap, implementation=implementation
    )
    return out[:, :S]


@functools.cache
def _library() -> ModuleType:
    """Tokamax, imported without its run-time type checks: it pins a typeguard older than tyro's, which fails on them."""
    import typeguard
    from absl import flags

    checked, typeguard.typechecked = typeguard.typechecked, lambda function: function
    try:
        import tokamax as library
    finally:
        typeguard.typechecked = checked
    flags.FLAGS.mark_as_parsed()  # or Tokamax reads this program's command line as its own flags, and fails
    return library
