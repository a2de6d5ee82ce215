"""The curves of runs as PNG, on light and on dark paper. Matplotlib is imported where it draws."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.analysis.token_accuracy import NGRAM_ACCURACY
from jaxft.reports.document import visible
from jaxft.reports.fitting import number
from jaxft.reports.folder import RunRecord

Points = tuple[list[float], list[float]]  # steps (or shares of a run) and values


@dataclass(frozen=True)
class Theme:
    """Colours of one paper; those of curves differ in lightness too, for readers who see few hues."""

    name: str
    paper: str
    ink: str
    grid: str
    curves: tuple[str, ...]


LIGHT = Theme("light", "#ffffff", "#24292f", "#d9dee4",
              ("#2563c9", "#c2500a", "#1f7a4d", "#8a3ab9", "#8a6d00", "#b0235f", "#0e7490", "#555d66"))  # fmt: skip
DARK = Theme("dark", "#161b22", "#d5dbe2", "#343b45",
             ("#7fb2ff", "#ff9c4a", "#5fd39a", "#d09cff", "#e3c55a", "#ff86b3", "#67d5ea", "#aab3bd"))  # fmt: skip
NAMES = ("loss", "token_accuracy", "learning_rate", "grad_norm")
SMOOTHED_FROM = 60  # points; below, every point has a marker and no running mean is needed
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX*"
TRAIN, VALIDATION, PROBE = 0, 1, 2  # colours of a run's own curves


@dataclass(frozen=True)
class Curve:
    """One line of a chart; `colour` and `line` are numbers of a theme's colours and of LINES."""

    label: str
    points: Points
    colour: int
    line: int = 0


@dataclass(frozen=True)
class Plot:
    """One chart: its curves, the curve and step to mark, and a level to draw, each None where there is none."""

    name: str
    title: str
    alt: str
    curves: Sequence[Curve]
    marked: tuple[str, int] | None = None
    level: tuple[float, str] | None = None
    percent: bool = False
    across: str = "step"


def plots(run: RunRecord, best_step: int | None) -> list[Plot]:
    """The charts that the folder's metrics allow: loss, token accuracy, learning rate, gradient norm."""
    best = None if best_step is None else ("validation", best_step)
    level = (NGRAM_ACCURACY, "counts of six tokens") if run.of_gsm8k else None
    charts = [
        Plot("loss", "Loss, nats per token", "Train, probe and validation loss against the step",
             _three(run, "loss", "probe_loss", "eval_loss"), best),
        Plot("token_accuracy", "Teacher-forced token accuracy", "Train, probe and validation token accuracy against the step",
             _three(run, "mean_token_accuracy", "probe_mean_token_accuracy", "eval_mean_token_accuracy"), best, level, True),
        Plot("learning_rate", "Learning rate", "Learning rate against the step",
             _curves(run.train, "learning_rate", "", TRAIN)),
        Plot("grad_norm", "Gradient norm before clipping", "Global gradient norm against the step",
             _curves(run.train, "grad_norm", "", TRAIN)),
    ]  # fmt: skip
    return [chart for chart in charts if chart.curves]


def _three(run: RunRecord, train: str, probe: str, validation: str) -> list[Curve]:
    return [
        *_curves(run.train, train, "train, logged", TRAIN),
        *_curves(run.evaluations, probe, "train probe", PROBE, 1),
        *_curves(run.evaluations, validation, "validation", VALIDATION),
    ]


def _curves(records: Sequence[dict[str, Any]], key: str, label: str, colour: int, line: int = 0) -> list[Curve]:
    found = points(records, key)
    return [Curve(label, found, colour, line)] if found else []


def points(records: Sequence[dict[str, Any]], key: str) -> Points | None:
    """Steps and values of the lines that have a number under `key`."""
    pairs = [(r["step"], r[key]) for r in records if number(r.get(key)) is not None]
    return ([step for step, _ in pairs], [value for _, value in pairs]) if pairs else None


def png(plot: Plot, theme: Theme) -> bytes:
    """The chart as PNG, 936 × 576; bytes depend on the points and on Matplotlib's version only."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():  # whatever a matplotlibrc says; pyplot and its global figures stay out of it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 10, "axes.edgecolor": theme.grid, "text.color": theme.ink,
                                    "text.parse_math": False})  # fmt: skip
        figure = Figure(figsize=(5.2, 3.2), dpi=180, facecolor=theme.paper, layout="constrained")
        _draw(figure.add_subplot(facecolor=theme.paper), plot, theme)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _draw(axes: Any, plot: Plot, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for curve in plot.curves:
        _curve(axes, curve, theme)
    if plot.marked:
        _mark(axes, plot, theme)
    if plot.level:
        value, label = plot.level
        axes.axhline(value, color=theme.ink, linewidth=0.9, linestyle=(0, (1, 2)), label=label)
    axes.set_title(plot.title, loc="left", fontsize=11, fontweight="bold", color=theme.ink)
    axes.set_xlabel(plot.across, color=theme.ink)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=plot.across == "step"))
    axes.tick_params(colors=theme.ink, length=0)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if plot.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif plot.name == "learning_rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
        axes.yaxis.get_offset_text().set_color(theme.ink)
        axes.set_ylim(bottom=0)
    if any(curve.label for curve in plot.curves):
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8.5)


def _curve(axes: Any, curve: Curve, theme: Theme) -> None:
    steps, values = curve.points
    colour = theme.curves[curve.colour % len(theme.curves)]
    label = _label(curve.label)
    style = {"color": colour, "linestyle": LINES[curve.line % len(LINES)]}
    if len(steps) < SMOOTHED_FROM:
        marker = MARKERS[curve.colour % len(MARKERS)]
        axes.plot(steps, values, linewidth=1.6, marker=marker, markersize=3, label=label, **style)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(steps, _running_mean(values), linewidth=1.8, label=f"{label}, mean" if curve.label else label, **style)


def _label(text: str) -> str:
    """A legend leaves out what begins with an underscore."""
    shown = " ".join(visible(text).split())
    shown = shown if len(shown) <= 32 else f"{shown[:31]}…"
    return f" {shown}" if shown.startswith("_") else shown


def _running_mean(values: list[float]) -> list[float]:
    """The mean over a window centred on each point, a twentieth of the curve wide, narrower at both ends."""
    reach = max(1, len(values) // 40)
    half = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - h : i + h + 1]) / (2 * h + 1) for i, h in enumerate(half)]


def _mark(axes: Any, plot: Plot, theme: Theme) -> None:
    label, step = plot.marked
    curve = next((curve for curve in plot.curves if curve.label == label), None)
    if curve is None:
        return
    colour = theme.curves[curve.colour]
    axes.axvline(step, color=colour, linewidth=1, linestyle=":")
    at = dict(zip(*curve.points, strict=True)).get(step)
    if at is not None:
        ring = {"marker": "o", "s": 70, "facecolors": "none", "edgecolors": colour, "linewidths": 1.6}
        axes.scatter([step], [at], zorder=3, label=f"best, step {step}", **ring)
