"""Logical axes to mesh axes: how every array lies on the devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.errors import UserError

# Rows are split over both axes that hold different rows; weights over the one that shares a copy, and over tensor.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "spare": ("fsdp",),
}

# The logical axis of a dimension. Of several, the first must split evenly; the others do so where the size allows it.
Axis = str | tuple[str, ...] | None


def spec(axes: Sequence[Axis], mesh: Mesh, shape: Sequence[int]) -> PartitionSpec:
    """The mesh axes of an array of this shape; None and names without a rule are not split."""
    return PartitionSpec(*(_split(axis, mesh, size) for axis, size in zip(axes, shape)))


def _split(axis: Axis, mesh: Mesh, size: int) -> tuple[str, ...] | None:
    wanted = (axis,) if isinstance(axis, str) else axis or ()
    found: tuple[str, ...] = ()
    for i, logical in enumerate(wanted):
        more = found + RULES.get(logical, ())
        if i == 0 or size % _ways(mesh, more) == 0:
            found = more
    return found or None


def _ways(mesh: Mesh, names: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def sharding(mesh: Mesh, axes: Sequence[Axis], shape: Sequence[int], what: str) -> NamedSharding:
    """The sharding of array `what`. Raises UserError where a dimension does not split evenly."""
    for size, axis in zip(shape, axes):
        check_split(mesh, axis if isinstance(axis, str) or axis is None else axis[0], size, what)
    return NamedSharding(mesh, spec(axes, mesh, shape))


def check_split(mesh: Mesh, logical: str | None, size: int, what: str) -> None:
    """Raises UserError where `size` things along a logical axis of `what` do not split evenly over the mesh."""
    names = RULES.get(logical, ()) if logical else ()
    ways = _ways(mesh, names)
    if size % ways:
        largest = max(w for w in range(1, ways + 1) if size % w == 0 and ways % w == 0)
        raise UserError(
            f"{what}: {logical} of {size} does not split over {'·'.join(names)}={ways}; "
            f"set mesh.{names[-1]} to at most {largest}"
        )


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return _ways(mesh, RULES["batch"])


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, axes: Sequence[Axis], mesh: Mesh | None) -> jax.Array:
    """Tells the partitioner how an activation lies; without a mesh, or on one device, nothing."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, mesh, x.shape)))


def local_rows(mesh: Mesh, count: int) -> frozenset[int] | None:
    """Which of a batch's `count` rows lie on this process's devices; None for all."""
    if not mesh.is_multi_process:
        return None
    placed = NamedSharding(mesh, spec(("batch",), mesh, (count,)))
    slices = [index[0] for index in placed.addressable_devices_indices_map((count,)).values()]
    return frozenset(row for part in slices for row in range(*part.indices(count)))


def on_host(array: jax.Array) -> np.ndarray:
    """The whole of a global array, on every process; all processes call it for the same arrays in the same order."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(array.sharding.mesh, PartitionSpec()))(array)
    return np.asarray(whole)


def from_host(value: Any, target: NamedSharding) -> jax.Array:
    """A host's or one device's array, the same on every process, as a global one."""
    if target.is_fully_addressable:
        return jax.device_put(value, target)
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, target, lambda index: value[index])


def place(mesh: Mesh, tree: Any, axes: Sequence[Axis]) -> Any:
    """Host arrays, the same on every process, as global arrays split along `axes` (each array's leading ones)."""

    def put(x: Any) -> jax.Array:
        target = NamedSharding(mesh, spec(axes, mesh, x.shape))
        return jax.make_array_from_callback(x.shape, target, lambda index: x[index])

    return jax.tree.map(put, tree)
