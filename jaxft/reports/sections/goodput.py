"""Where the wall time went, by what the run logged of its phases."""

from __future__ import annotations

import math
from typing import Any

from jaxft.reports.document import Block, Heading, Table, Text
from jaxft.reports.folder import RunRecord
from jaxft.reports.wording import clock, counted, share

PHASES = {
    "step": "training steps", "evaluate": "evaluations", "compile": "compiling", "load": "reading rows and weights",
    "import": "starting Python", "data_wait": "waiting for data", "save": "saving", "lost": "lost: steps done again",
}  # fmt: skip
USEFUL = "step"


def measure(run: RunRecord) -> dict[str, Any] | None:
    """Seconds of each phase, how often it came, and the useful share: training steps of all; None where none was logged."""
    if not run.phases:
        return None
    seconds = {
        name: math.fsum(p.seconds for p in run.phases if p.phase == name) for name in {p.phase: 0 for p in run.phases}
    }
    total = math.fsum(seconds.values())
    counts = {name: sum(p.phase == name for p in run.phases) for name in seconds}
    return {
        "seconds": seconds,
        "counts": counts,
        "total": total,
        "useful": seconds.get(USEFUL, 0.0) / total if total else None,
    }


def blocks(found: dict[str, Any] | None) -> list[Block]:
    """A row per phase, the longest first."""
    if not found or not found["total"]:
        return []
    order = sorted(found["seconds"].items(), key=lambda item: -item[1])
    rows = [
        (
            PHASES.get(name, name[:80]),
            clock(seconds),
            share(seconds / found["total"]),
            counted(found["counts"][name], "time"),
        )
        for name, seconds in order
    ]
    said = f"{share(found['useful'])} of the logged time was spent in training steps that count."
    return [Heading(2, "Goodput"), Text(said), Table(("", "Time", "Share", "Came"), rows)]
