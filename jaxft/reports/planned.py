"""What was expected of a run beside what it measured."""

from __future__ import annotations

from typing import Any

from jaxft.reports.document import Code, Inline, Part
from jaxft.reports.fitting import number
from jaxft.reports.folder import RunRecord
from jaxft.reports.wording import clock

GIB = 2**30
NOTE = (
    "Planned is what was expected of the step that this run compiled: memory by the compiler, time by arithmetic, at an "
    "assumed share of the roofline's speed. Measured are medians of the log lines, and the peak of memory. "
)
WITHOUT_TIME = "These devices are not listed with their rates, so no time was expected."


def compare(run: RunRecord, logged: dict[str, float | None]) -> list[dict[str, Any]]:
    """`what`, `unit`, `planned`, `measured` and their `ratio`, of each figure that has both sides."""
    step, best = run.count("planned.seconds_per_step"), run.count("planned.roofline_seconds_per_step")
    speed, fill = run.count("planned.positions_per_second"), run.count("data.fill")
    held, peak = run.count("program.device_bytes"), logged["peak_device_memory_gib"]
    seconds, rate = logged["median_seconds_per_step"], logged["median_tokens_per_second"]
    steps, spent = run.count("step"), run.count("train_seconds")
    pairs = (
        ("Seconds per step", "s", step, seconds),
        ("Seconds per step, roofline", "s", best, seconds),
        ("Tokens per second", "tokens/s", speed and fill and speed * fill, rate),
        ("In training steps", "time", step and steps and step * steps, spent),
        ("Memory of a device", "GiB", held and held / GIB, peak),
    )
    return [
        {"what": what, "unit": unit, "planned": planned, "measured": measured, "ratio": measured / planned}
        for what, unit, planned, measured in pairs
        if number(planned) and number(measured) is not None
    ]


def rows(compared: list[dict[str, Any]]) -> list[tuple[Inline, ...]]:
    """Table rows: what, planned, measured, measured over planned."""
    return [
        (each["what"], _value(each, "planned"), _value(each, "measured"), f"{each['ratio']:,.2f}") for each in compared
    ]


def note(run: RunRecord) -> list[Part]:
    """What the two sides are."""
    topology, bound = run.fact("planned.topology"), run.fact("planned.bound_by")
    if topology is None:
        return [NOTE, WITHOUT_TIME]
    limit = ["The roofline is what ", Code(str(topology)), " does at best, bound by ", Code(str(bound)), "."]
    return [NOTE, *limit]


def _value(each: dict[str, Any], side: str) -> str:
    value, unit = each[side], each["unit"]
    return clock(value) if unit == "time" else f"{value:,.0f} {unit}" if value >= 1000 else f"{value:,.3g} {unit}"
