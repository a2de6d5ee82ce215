"""Hours against USD of every place that fits, as a picture. Matplotlib is imported where it draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.plans.row import Row

# Okabe and Ito's, told apart with few hues; a marker of its own for each chip says the same again.
STYLES = {
    "v4": ("#009e73", "v"), "v5e": ("#0072b2", "o"), "v5p": ("#cc79a7", "s"), "v6e": ("#d55e00", "^"),
}  # fmt: skip
OTHER = ("#555555", "D")
INK, GRID = "#24292f", "#d9dee4"


def save(file: Path, rows: Sequence[Row], title: str) -> None:
    """Writes the chart to `file`, in the format of its ending. Places without a price or that do not fit are in words."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():  # whatever a matplotlibrc says
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 10, "axes.edgecolor": GRID, "text.color": INK})
        figure = Figure(figsize=(7, 4.4), dpi=160, facecolor="white", layout="constrained")
        _draw(figure.add_subplot(), rows, title)
        figure.savefig(file)


def _draw(axes: Any, rows: Sequence[Row], title: str) -> None:
    from matplotlib.ticker import NullFormatter

    whole = any(row["fits"] and row["usd"] is not None for row in rows)
    across, up = ("hours", "usd") if whole else ("hours_per_million_tokens", "usd_per_million_tokens")
    points = [{**row, "hours_per_million_tokens": 1e6 / row["tokens_per_second"] / 3600} for row in rows if row["fits"]]
    points = [point for point in points if point[up] is not None]
    for chip in dict.fromkeys(point["chip"] for point in points):
        colour, marker = STYLES.get(chip, OTHER)
        own = [point for point in points if point["chip"] == chip]
        axes.scatter([p[across] for p in own], [p[up] for p in own], color=colour, marker=marker, s=46, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.18)
    middle = math.sqrt(axes.get_xlim()[0] * axes.get_xlim()[1])
    for point in points:
        left = point[across] > middle  # there the words would leave the picture on the right
        at = {"xytext": (-7 if left else 7, 6), "textcoords": "offset points", "ha": "right" if left else "left"}
        axes.annotate(
            f"{point['topology']}, {point['rows_per_step']} rows", (point[across], point[up]), fontsize=8, **at
        )
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter((lambda value, _: f"{value:g}") if high / low < 10 else NullFormatter())
        axis.set_tick_params(which="minor", labelsize=8)
    axes.set_xlabel("hours of steps and evaluations" if whole else "hours for a million tokens", color=INK)
    axes.set_ylabel("USD, on demand" if whole else "USD for a million tokens, on demand", color=INK)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(color=GRID, linewidth=0.6, which="both")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    left_out = [row["topology"] for row in rows if not row["fits"]]
    unpriced = [row["topology"] for row in rows if row["fits"] and row[up if up in row else "usd"] is None]
    words = [f"does not fit: {', '.join(left_out)}"] if left_out else []
    words += [f"no price: {', '.join(unpriced)}"] if unpriced else []
    if words:
        axes.text(0.01, 0.01, "\n".join(words), transform=axes.transAxes, fontsize=8, color=INK, va="bottom")
