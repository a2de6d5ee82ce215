"""The embedding table on a mesh: how it lies there, and looking tokens up without gathering it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxft.parallel.sharding import Axis, batch_ways, spec

ROWS, TOKENS = ("data", "fsdp"), PartitionSpec(("data", "fsdp"))


def table_axes(vocab_size: int, mesh: Mesh | None) -> tuple[Axis, Axis]:
    """Logical axes of a `[V,D]` table: by vocabulary over tensor and fsdp, or by D over fsdp where V does not split so.

    By vocabulary, the head's logits are formed where its rows lie, and the head never travels.
    """
    if mesh is not None and vocab_size % (mesh.shape["tensor"] * mesh.shape["fsdp"]):
        return "vocab", "embed"
    return ("vocab", "spare"), None


def vocabulary_split(vocab_size: int, mesh: Mesh | None) -> tuple[str, ...]:
    """The mesh axes over which the rows of such a table are split, the major first; none on one device."""
    if mesh is None or mesh.size == 1:
        return ()
    return spec(table_axes(vocab_size, mesh), mesh, (vocab_size, 1))[0]


def look_up(table_VD: jax.Array, tokens_BS: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Rows of the table, `[B,S,D]`.

    On a mesh each device looks every token of its fsdp group up in its own columns, and devices then swap columns for rows:
    what travels is the activations and a device's share of the table, never the whole table.
    """
    if mesh is None or mesh.size == 1 or tokens_BS.shape[0] % batch_ways(mesh):
        return table_VD[tokens_BS]
    split = vocabulary_split(table_VD.shape[0], mesh)

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        if "fsdp" in split:
            table = jax.lax.all_to_all(table, "fsdp", split_axis=1, concat_axis=0, tiled=True)
        tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True) - jax.lax.axis_index("tensor") * table.shape[0]
        mine = (tokens >= 0) & (tokens < table.shape[0])
        rows = jnp.where(mine[..., None], table[jnp.clip(tokens, 0, table.shape[0] - 1)], jnp.zeros((), table.dtype))
        if mesh.shape["tensor"] > 1:
            rows = jax.lax.psum(rows, "tensor")
        return jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    # Its outputs are the same over tensor because of the sum, which the check cannot see through the swap.
    placed = spec(table_axes(table_VD.shape[0], mesh), mesh, table_VD.shape)
    return jax.shard_map(local, mesh=mesh, in_specs=(placed, TOKENS), out_specs=TOKENS, check_vma=False)(
        table_VD, tokens_BS
    )
