"""Attention on a TPU: JAX's Splash kernel, which never forms the scores in HBM and skips what no query sees."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.models.attention.places import SAVED, Places, lengthen, on_each_device

LANES, MAX_TILE = 128, 512
# The one-kernel backward pass writes dq once per tile of keys, and sums it afterwards; beyond this many tiles that costs
# more HBM (1 GB at S = 8192, H = 256, 16 heads) than a second kernel for dq costs time.
MAX_PARTIAL_DQ = 4


def splash(
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
    """Splash attention on each device's rows and heads; scores and softmax in fp32.

    Its backward pass needs the output and the softmax's normaliser, both named SAVED.
    """
    local = functools.partial(_splash, scale=scale, window=window, cap=cap)
    return on_each_device(local, mesh, q_BSNH, k_BTKH, v_BTKH, places)


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    *,
    scale: float,
    window: int | None,
    cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    S = q.shape[1]
    length, tile = tiles(S)
    q, k, v, places = lengthen(q, k, v, places, length)
    q_BNSH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    one_row = _kernel(q.shape[2], length, tile, window, cap, interpret)
    return jax.vmap(one_row)(q_BNSH, k_BKTH, v_BKTH, _segments(places)).swapaxes(1, 2)[:, :S]


def tiles(S: int) -> tuple[int, int]:
    """The length that S queries are filled up to, and the tile that divides it: at most 512, the fewest and the smallest."""
    count = -(-S // MAX_TILE)
    tile = -(-S // (count * LANES)) * LANES
    return count * tile, tile


def _segments(places: Places):
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention.SegmentIds(places.q_segments, places.kv_segments)


def _kernel(heads: int, length: int, tile: int, window: int | None, cap: float | None, interpret: bool):
    """Splash attention of one row: q `[N,S,H]`, k and v `[K,S,H]`, segments `[S]` -> `[N,S,H]`.

    The mask is a function of two indices, computed in the kernel: within a segment positions count up by one, so that
    they differ as the indices do.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    square = (length, length)
    mask = library.CausalMask(square) if window is None else library.LocalMask(square, (window - 1, 0), 0)
    fused = length // tile <= MAX_PARTIAL_DQ
    sizes = library.BlockSizes(
        block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, use_fused_bwd_kernel=fused,
        block_q_dq=None if fused else tile, block_kv_dq=None if fused else tile,
    )  # fmt: skip
    return library.make_splash_mha(
        library.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
