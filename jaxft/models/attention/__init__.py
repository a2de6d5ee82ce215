"""Attention: one signature, several kernels; the plain XLA one, `dense`, is the oracle of every other.

B batch, S query, T key, N heads, K kv heads, H head dim. `kernel(q_BSNH, k_BTKH, v_BTKH, places, *, scale, window, cap,
mesh)` gives `[B,S,N,H]` in q's dtype. A query sees a key of its own segment whose position is not after its own, and
with a `window` less than that many before it. Query head n uses key head n // (N/K). `cap` bounds the scores softly,
before the mask. `mesh` is the one that the arrays lie on, which a fused kernel has to know: the partitioner cannot look
into it. All but `dense` need queries and keys that are the same tokens, those of a segment in order of position.
"""

from jaxft.models.attention.kernels import KERNELS, kernel_for
from jaxft.models.attention.places import SAVED, Places, saved
from jaxft.models.attention.xla import MAX_BLOCKS, MIN_BLOCK, blocked, dense

__all__ = ["KERNELS", "MAX_BLOCKS", "MIN_BLOCK", "SAVED", "Places", "blocked", "dense", "kernel_for", "saved"]
