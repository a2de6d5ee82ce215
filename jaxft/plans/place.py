"""Where a run is planned for, by name: a TPU slice, several of them, or GPUs of one machine. No JAX here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from jaxft import chips
from jaxft.chips import Chip
from jaxft.config import Mesh
from jaxft.errors import UserError
from jaxft.parallel import topology

# Without a bfloat16 rate, as the T4, there is no time to plan.
GPUS = tuple(chip.name for chip in chips.CHIPS if not chip.kinds[0].startswith("TPU") and chip.flops is not None)


@dataclass(frozen=True)
class Place:
    """Chips of one kind; `topology` is None for GPUs, which are planned from arithmetic."""

    name: str
    chip: Chip
    chips: int  # over all slices
    slices: int = 1
    topology: topology.Topology | None = None

    @property
    def ici_bytes_per_second(self) -> float | None:
        """What a chip can take in from its neighbours; None where there are none, or nobody tells.

        Of a TPU slice the chip with the fewest links counts: in a ring that passes every chip, all wait for it. A GPU takes
        half of what NVLink is sold for, which adds both directions.
        """
        rate = self.chip.ici_bytes_per_second
        if rate is None or self.chips == self.slices:
            return None
        if self.topology is None or not self.chip.ici_links:
            return rate / 2
        return rate / (2 * self.chip.ici_links) * self.topology.links


def parse(name: str, usd_per_chip_hour: float | None = None) -> Place:
    """`v5e-8`, `2xv5e-16`, `H200` or `8xH100`; a price given replaces the list's. Raises UserError for an unknown name."""
    found = re.fullmatch(r"(?:(\d+)x)?(.+)", name)
    gpu = next((each for each in GPUS if found and each.lower() == found[2].lower()), None)
    if gpu is not None and found is not None:
        count = int(found[1] or 1)
        if not 1 <= count <= 8:
            raise UserError(f"topology {name!r}: GPUs are planned for one machine, 1 to 8 of them")
        place = Place(name, _named(gpu), count)
    else:
        try:
            slices = topology.parse(name)
        except UserError as error:
            raise UserError(f"{error}; GPUs: {', '.join(GPUS)}" if _unknown(name) else str(error)) from None
        place = Place(name, _named(slices.kind), slices.chips * slices.slices, slices.slices, slices)
    if usd_per_chip_hour is None:
        return place
    price = {
        "usd_per_chip_hour": usd_per_chip_hour,
        "usd_per_chip_hour_spot": None,
        "price_source": "run.usd_per_chip_hour",
    }
    return replace(place, chip=replace(place.chip, **price))


def of_devices(kind: str, devices: int, slices: int = 1) -> Place | None:
    """The place that a run has, by jax's device_kind; None where the chip, or so large a slice of it, is not listed."""
    chip = chips.of_device(kind)
    if chip is None:
        return None
    if chip.name in GPUS:
        return Place(f"{devices}x{chip.name}" if devices > 1 else chip.name, chip, devices)
    size = devices // slices * topology.CORES_PER_CHIP.get(chip.name, 1)
    try:
        return parse(f"{chip.name}-{size}" if slices == 1 else f"{slices}x{chip.name}-{size}")
    except UserError:
        return None


def sizes(mesh: Mesh, place: Place) -> dict[str, int]:
    """Chips of `place` along each axis, data over all slices. Raises UserError where they do not multiply to them."""
    asked = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    each = place.chips // place.slices
    fixed = math.prod(size for size in asked.values() if size != -1)
    filled = {name: each // fixed if size == -1 else size for name, size in asked.items()}
    if math.prod(filled.values()) != each:
        shown = ", ".join(f"mesh.{name}={size}" for name, size in asked.items())
        raise UserError(f"{shown} does not multiply to {each} device(s); set one of them to -1")
    return filled | {"data": filled["data"] * place.slices}


def _named(name: str) -> Chip:
    chip = chips.named(name)
    assert chip is not None, name
    return chip


def _unknown(name: str) -> bool:
    """Whether not even the kind is known."""
    return not any(re.match(rf"(?:\d+x)?{kind}-", name) for kind in topology.SHAPES)
