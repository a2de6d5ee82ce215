"""The device mesh: axes data, fsdp and tensor; and what its devices have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxft import chips, config
from jaxft.errors import UserError
from jaxft.parallel.quiet import without_tpu
from jaxft.parallel.sharding import batch_ways

AXES = ("data", "fsdp", "tensor")


def make_mesh(mesh: config.Mesh = config.Mesh(), devices: Sequence[Any] | None = None) -> Mesh:
    """A Mesh of `devices` (all of them where None) in the shape that `mesh` asks for; one device is a mesh of one.

    `mesh.data`, `fsdp` and `tensor` share out the devices of one slice. Axis "data" holds the slices too, as its slowest
    part: between slices, over the data-centre network, only gradients of trained parameters travel. Within a slice of a TPU
    JAX lays neighbours on an axis beside each other on the wires. Raises UserError where the numbers do not multiply to the
    devices.
    """
    if devices is None:
        without_tpu()
    devices = list(jax.devices() if devices is None else devices)
    slices = _slices(mesh.slices, devices)
    sizes = _sizes([mesh.data, mesh.fsdp, mesh.tensor], len(slices[0]), len(slices))
    laid = np.concatenate(
        [mesh_utils.create_device_mesh(sizes, each, allow_split_physical_axes=True) for each in slices]
    )
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(asked: int, devices: list[Any]) -> list[list[Any]]:
    """The devices of each slice, in the slices' order. Devices that do not tell theirs (CPU, GPU) are cut in their order."""
    told: dict[int, list[Any]] = {}
    for device in devices:
        told.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    count = len(told) if asked == -1 else asked
    if count == len(told):
        return [told[index] for index in sorted(told)]
    if devices[0].platform == "tpu":
        raise UserError(
            f"mesh.slices={asked}: {len(devices)} devices in {len(told)} slice(s) are here; use -1 for all there are"
        )
    if count < 1 or len(devices) % count:
        raise UserError(
            f"mesh.slices={asked}: {len(devices)} device(s) do not make so many equal slices; use -1 for one"
        )
    return np.array(devices).reshape(count, -1).tolist()


def _sizes(asked: list[int], devices: int, slices: int) -> list[int]:
    shown = ", ".join(f"mesh.{name}={size}" for name, size in zip(AXES, asked))
    if any(size < 1 and size != -1 for size in asked) or asked.count(-1) > 1:
        raise UserError(f"{shown}: sizes are positive, and at most one is -1 (the rest of the devices)")
    fixed = math.prod(size for size in asked if size != -1)
    filled = [devices // fixed if size == -1 else size for size in asked]
    if math.prod(filled) != devices:
        where = f"{devices} device(s)" + (f" of each of {slices} slices" if slices > 1 else "")
        raise UserError(f"{shown} does not multiply to {where}; set one of them to -1")
    return filled


def usable_bytes(mesh: Mesh) -> int | None:
    """Memory that a program may use of one device; None where nobody tells (a CPU, an unknown chip)."""
    device = mesh.devices.flat[0]
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except (AttributeError, RuntimeError):  # a device that is only compiled for
        limit = None
    chip = chips.of_device(device.device_kind)
    return limit or (chip and int(chip.hbm_bytes))


def check_batch(optim: config.Optim, mesh: Mesh) -> None:
    """Raises UserError where a micro-batch does not split evenly over the devices."""
    ways, micro = batch_ways(mesh), optim.micro_batch_size
    if micro % ways:
        raise UserError(
            f"optim.batch_size: {optim.batch_size} in {optim.accumulation_steps} micro-batch(es) of {micro} does not split "
            f"over data·fsdp={ways} devices; make the micro-batch a multiple of {ways}, or lower mesh.data and mesh.fsdp"
        )
