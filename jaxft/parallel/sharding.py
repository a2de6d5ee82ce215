"""Logical axes to mesh axes: how every array lies on the devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.errors import UserError

# Rows are split over both axes that hold different rows; weights over the one that shares a copy, and over tensor.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
}


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names; None and unruled names are not split."""
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], what: str) -> NamedSharding:
    """The sharding of array `what`. Raises UserError where a dimension does not split evenly."""
    for size, logical in zip(shape, axes):
        check_split(mesh, logical, size, what)
    return NamedSharding(mesh, spec(axes))


def check_split(mesh: Mesh, logical: str | None, size: int, what: str) -> None:
    """Raises UserError where `size` things along a logical axis of `what` do not split evenly over the mesh."""
    names = RULES.get(logical) if logical else None
    names = (names,) if isinstance(names, str) else names or ()
    ways = math.prod(mesh.shape[name] for name in names)
    if size % ways:
        largest = max(w for w in range(1, ways + 1) if size % w == 0 and ways % w == 0)
        raise UserError(
            f"{what}: {logical} of {size} does not split over {'·'.join(names)}={ways}; "
            f"set mesh.{names[-1]} to at most {largest}"
        )


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[name] for name in RULES["batch"])


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, axes: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """Tells the partitioner how an activation lies; without a mesh, or on one device, nothing."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes)))


def place(mesh: Mesh, tree: Any, axes: Sequence[str | None]) -> Any:
    """Host arrays, the same on every process, as global arrays split along `axes` (each array's leading ones)."""

    def put(x: Any) -> jax.Array:
        target = NamedSharding(mesh, spec(axes[: x.ndim]))
        return jax.make_array_from_callback(x.shape, target, lambda index: x[index])

    return jax.tree.map(put, tree)
