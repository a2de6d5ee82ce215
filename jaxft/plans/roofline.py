"""How long a step takes at least, by what limits it, and what a run of such steps costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jaxft.plans.place import Place

# Of the roofline's speed, that a step is expected to reach. Nothing here has run on these chips yet: half of peak is this
# project's own first goal, and what well-made training programs report. `report` shows a run's own beside it.
EFFICIENCY = 0.5
RESOURCES = {"compute": "compute", "hbm": "HBM", "ici": "network (ICI)", "dcn": "network (DCN)"}
HOUR = 3600.0


@dataclass(frozen=True)
class Demand:
    """What a step asks of one chip, tokens apart, which are the step's over all chips, padding included."""

    tokens: int
    flops: float
    hbm_bytes: float
    ici_bytes: float
    dcn_bytes: float


@dataclass(frozen=True)
class Times:
    """Seconds of one step: that each resource needs at its peak, the longest of them, and what to expect.

    None is what no source tells the rate of; the roofline is then that of the others.
    """

    compute_seconds: float | None
    hbm_seconds: float
    ici_seconds: float | None
    dcn_seconds: float | None
    roofline_seconds: float
    bound_by: str
    expected_step_seconds: float

    def facts(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"expected_share_of_roofline": EFFICIENCY}


def times(demand: Demand, place: Place) -> Times:
    """The roofline: all resources work at once, at their peaks, and the slowest decides."""
    chip = place.chip
    needed = {
        "compute": _seconds(demand.flops, chip.flops),
        "hbm": demand.hbm_bytes / chip.hbm_bytes_per_second,
        "ici": _seconds(demand.ici_bytes, place.ici_bytes_per_second),
        "dcn": _seconds(demand.dcn_bytes, chip.dcn_bytes_per_second),
    }
    known = {name: seconds for name, seconds in needed.items() if seconds is not None}
    slowest = max(known, key=lambda name: known[name])
    limit = known[slowest]
    bound_by = "network (NVLink)" if slowest == "ici" and place.topology is None else RESOURCES[slowest]
    seconds = {f"{name}_seconds": value for name, value in needed.items()}
    return Times(**seconds, roofline_seconds=limit, bound_by=bound_by, expected_step_seconds=limit / EFFICIENCY)


def _seconds(amount: float, rate: float | None) -> float | None:
    if not amount:
        return 0.0
    return None if rate is None else amount / rate


def money(place: Place, hours: float) -> dict[str, Any]:
    """USD of so many hours on all chips, on demand and spot; None without a price."""
    chip, chip_hours = place.chip, hours * place.chips
    return {
        "chip_hours": chip_hours,
        "usd": None if chip.usd_per_chip_hour is None else chip_hours * chip.usd_per_chip_hour,
        "usd_spot": None if chip.usd_per_chip_hour_spot is None else chip_hours * chip.usd_per_chip_hour_spot,
    }


def price(place: Place) -> dict[str, Any]:
    """A chip-hour's, with who says so and when."""
    chip = place.chip
    return {
        "usd_per_chip_hour": chip.usd_per_chip_hour,
        "usd_per_chip_hour_spot": chip.usd_per_chip_hour_spot,
        "price_source": chip.price_source,
        "price_date": chip.date if chip.price_source else None,
    }
