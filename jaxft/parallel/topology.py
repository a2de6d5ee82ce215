"""TPU slices by Google's names, as devices that programs can be compiled for on any machine (needs libtpu, no TPU)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from jaxft.errors import UserError

# Google counts TensorCores in the names of these, two a chip, and chips in the others.
CORES_PER_CHIP = {"v4": 2, "v5p": 2}
# https://cloud.google.com/tpu/docs/v5e, /v6e, /v5p and /v4: two- or three-dimensional tori.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SOLID = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip
SHAPES = {"v4": SOLID, "v5e": FLAT, "v5p": SOLID, "v6e": FLAT}
# A dimension of as many chips closes to a ring: of slices of 4x4x4 and larger, where smaller ones have no wrap-around links
# (https://docs.cloud.google.com/tpu/docs/v5p), and of a whole pod of v5e or v6e, a torus of 16 by 16.
RING = {"v4": 4, "v5e": 16, "v5p": 4, "v6e": 16}
# Both cores of a v4 chip as one device, as JAX has them on a TPU VM.
CHIP_CONFIG = {"v4": "megacore"}

# Without these libtpu asks the machine's metadata server, complains that it is not a TPU's, and takes a lock that only one
# process may hold. What they name does not matter to a compiler.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """One or more slices of a TPU; `v5e-8` is eight chips, `v5p-8` four, `2xv5e-16` two slices of sixteen."""

    name: str
    kind: str
    chips: int  # of one slice
    slices: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips of one slice along each dimension."""
        return tuple(map(int, SHAPES[self.kind][self.chips].split("x")))

    @property
    def links(self) -> int:
        """ICI neighbours of the chip that has fewest: two along a dimension that closes to a ring, else one, at its ends."""
        ring = RING[self.kind]
        whole = len(self.shape) == 2 or all(size % ring == 0 for size in self.shape)
        return sum(2 if whole and size % ring == 0 else 1 for size in self.shape if size > 1)


def parse(name: str) -> Topology:
    """What a name says. Raises UserError for a kind or a size that Google does not offer."""
    found = re.fullmatch(r"(?:(\d+)x)?(v\d+[ep]?)-(\d+)", name)
    kind = found[2] if found else ""
    if kind not in SHAPES:
        raise UserError(f"topology {name!r}: expected a kind and a size, such as v5e-8; kinds are {', '.join(SHAPES)}")
    chips, over = divmod(int(found[3]), CORES_PER_CHIP.get(kind, 1))
    if over or chips not in SHAPES[kind]:
        sizes = [f"{kind}-{size * CORES_PER_CHIP.get(kind, 1)}" for size in SHAPES[kind]]
        raise UserError(f"topology {name!r}: there is no such slice; there are {', '.join(sizes)}")
    return Topology(name, kind, chips, int(found[1] or 1))


def devices(name: str) -> list[Any]:
    """The devices of a topology, one a chip, to compile for. UserError where libtpu is not installed."""
    topology = parse(name)
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    shape = SHAPES[topology.kind][topology.chips]
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.kind in CHIP_CONFIG:
        options["chip_config_name"] = CHIP_CONFIG[topology.kind]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.kind}:{shape}", **options)
    except Exception as error:
        raise UserError(
            f"topology {name}: {str(error).splitlines()[0]:.200}; install the TPU compiler with `pip install 'jaxft[plan]'`"
        ) from error
    return list(described.devices)
