"""The device mesh: axes data, fsdp and tensor; and what its devices have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxft import chips, config
from jaxft.errors import UserError
from jaxft.parallel.sharding import batch_ways

AXES = ("data", "fsdp", "tensor")


def make_mesh(mesh: config.Mesh = config.Mesh(), devices: Sequence[Any] | None = None) -> Mesh:
    """A Mesh of `devices` (all of them where None) in the shape that `mesh` asks for; one device is a mesh of one.

    Raises UserError where the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes([mesh.data, mesh.fsdp, mesh.tensor], len(devices))
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(asked: list[int], devices: int) -> list[int]:
    shown = ", ".join(f"mesh.{name}={size}" for name, size in zip(AXES, asked))
    if any(size < 1 and size != -1 for size in asked) or asked.count(-1) > 1:
        raise UserError(f"{shown}: sizes are positive, and at most one is -1 (the rest of the devices)")
    fixed = math.prod(size for size in asked if size != -1)
    filled = [devices // fixed if size == -1 else size for size in asked]
    if math.prod(filled) != devices:
        raise UserError(f"{shown} does not multiply to {devices} device(s); set one of them to -1")
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
