"""How far an adapter has moved: Frobenius norms of each module's pair, and of what it adds to the module's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.models.adaptation import Adaptation
from jaxft.models.tensors import Tensor
from jaxft.parallel.sharding import replicated

Norms = dict[str, np.ndarray]  # "A", "B" and "added" (scale · A B), float32, an element per module


def adapter_norms(
    rows: Sequence[Tensor], plan: Adaptation, mesh: Mesh
) -> Callable[[Mapping[str, jax.Array]], Norms] | None:
    """A function from trainable parameters to the norms of every adapted module; None where no module has a pair.

    DoRA's magnitudes are not in them.
    """
    suffix = ".lora_A.weight"
    pairs = {}
    for row in rows:
        if row.adapter and row.names[0].endswith(suffix):
            scales = [plan.adapters[name.removesuffix(suffix)].scale for name in row.names]
            pairs[row.path] = row.path.removesuffix("a") + "b", np.array(scales, np.float32)
    if not pairs:
        return None

    def norms(trainable: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        parts = [_norms(trainable[a], trainable[b], scales) for a, (b, scales) in pairs.items()]
        return {name: jnp.concatenate([part[name] for part in parts]) for name in parts[0]}

    compiled = jax.jit(norms, out_shardings=replicated(mesh))
    return lambda trainable: {name: np.asarray(value) for name, value in compiled(trainable).items()}


def _norms(a_LIR: jax.Array, b_LRO: jax.Array, scales: np.ndarray) -> dict[str, jax.Array]:
    """|AB|² is Σ (AᵀA) ∘ (BBᵀ), so that A B, as large as the weights, is never formed."""
    of_a, of_b = jnp.einsum("LIR,LIS->LRS", a_LIR, a_LIR), jnp.einsum("LRO,LSO->LRS", b_LRO, b_LRO)
    product = jnp.sqrt(jnp.maximum(jnp.sum(of_a * of_b, axis=(1, 2)), 0.0))
    lengths = {"A": of_a, "B": of_b}
    found = {name: jnp.sqrt(jnp.trace(gram, axis1=1, axis2=2)) for name, gram in lengths.items()}
    return {**found, "added": jnp.asarray(scales) * product}
