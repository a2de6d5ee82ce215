"""An evaluation as lines of text: the same on a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.evals.subject import BASE, TUNED

HEADER = ("task", "metric", "base", "tuned", "Δ", "95 % interval", "p", "invalid", "truncated", "documents", "tokens/s")


def lines(results: Mapping[str, Any]) -> list[str]:
    """A table with a row per task and metric, and the verdicts; `results` as `evals.results.content` makes it."""
    rows = [row for task, told in results["tasks"].items() if told["member_of"] is None for row in _rows(task, told)]
    kept = [i for i in range(len(HEADER)) if any(row[i] for row in rows)]
    table = [[row[i] for i in kept] for row in (HEADER, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(kept))]
    left = 2  # columns of words; numbers stand at the right
    said = [
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in table
    ]
    return [*said, "", *results["verdicts"]]


def _rows(task: str, told: Mapping[str, Any]) -> list[tuple[str, ...]]:
    sides = told["sides"]
    found = []
    for i, metric in enumerate(next(iter(sides.values()))["metrics"]):
        compared = told["comparisons"].get(metric, {})
        values = {side: numbers["metrics"][metric] for side, numbers in sides.items()}
        percent = all(0 <= value["value"] <= 1 for value in values.values())
        scale, filter_ = (100 if percent else 1), metric.partition(",")[2]
        invalid = [numbers["invalid"].get(filter_) for numbers in sides.values()]
        interval = compared.get("difference_interval") or (
            next(iter(values.values()))["interval"] if len(values) == 1 else None
        )
        found.append(
            (
                task if i == 0 else "",
                metric.removesuffix(",none").replace(",", " "),
                *(f"{values[side]['value'] * scale:.2f}" if side in values else "" for side in (BASE, TUNED)),
                f"{compared['difference'] * scale:+.2f}" if compared else "",
                f"{interval[0] * scale:.2f} to {interval[1] * scale:.2f}" if interval else "",
                f"{compared['p_value']:.2g}" if "p_value" in compared else "",
                _arrow(invalid),
                _arrow([numbers["truncated"] for numbers in sides.values()]) if i == 0 else "",
                f"{told['documents']:,}" if i == 0 else "",
                _speeds(sides) if i == 0 else "",
            )
        )
    return found


def _arrow(shares: Sequence[float | None]) -> str:
    """Percent of base → tuned, or of the one side there is."""
    return " → ".join(f"{100 * share:.1f}" for share in shares if share is not None)


def _speeds(sides: Mapping[str, Any]) -> str:
    found = [numbers["tokens_per_second"] for numbers in sides.values() if numbers["tokens_per_second"]]
    return " / ".join(f"{speed:,.0f}" for speed in found)
