"""The curves of a run as PNG, on light and on dark paper. Matplotlib is imported where it draws."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from jaxft.reports.folder import RunRecord, number

Points = tuple[list[int], list[float]]  # steps and values


@dataclass(frozen=True)
class Theme:
    """Colours of one paper; the pairs of curves differ in lightness too, for readers who see few hues."""

    paper: str
    ink: str
    grid: str
    train: str
    validation: str


LIGHT = Theme(paper="#ffffff", ink="#24292f", grid="#d9dee4", train="#2563c9", validation="#c2500a")
DARK = Theme(paper="#161b22", ink="#d5dbe2", grid="#343b45", train="#7fb2ff", validation="#ff9c4a")
NAMES = ("loss", "token_accuracy", "learning_rate", "grad_norm")
SMOOTHED_FROM = 60  # points; below, every point has a marker and no running mean is needed


@dataclass(frozen=True)
class Plot:
    """One chart: the train curve, the validation curve, and the best step, each None where there is none."""

    name: str
    title: str
    alt: str
    train: Points | None
    validation: Points | None
    best_step: int | None
    percent: bool = False


def plots(run: RunRecord, best_step: int | None) -> list[Plot]:
    """The charts that the folder's metrics allow: loss, token accuracy, learning rate, gradient norm."""
    charts = [
        Plot("loss", "Loss, nats per token", "Train and validation loss against the step",
             _points(run.train, "loss"), _points(run.evaluations, "eval_loss"), best_step),
        Plot("token_accuracy", "Teacher-forced token accuracy", "Train and validation token accuracy against the step",
             _points(run.train, "mean_token_accuracy"), _points(run.evaluations, "eval_mean_token_accuracy"),
             best_step, percent=True),
        Plot("learning_rate", "Learning rate", "Learning rate against the step",
             _points(run.train, "learning_rate"), None, None),
        Plot("grad_norm", "Gradient norm before clipping", "Global gradient norm against the step",
             _points(run.train, "grad_norm"), None, None),
    ]  # fmt: skip
    return [chart for chart in charts if chart.train or chart.validation]


def png(plot: Plot, theme: Theme) -> bytes:
    """The chart as PNG, 936 × 576; bytes depend on the points and on Matplotlib's version only."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():  # whatever a matplotlibrc says; pyplot and its global figures stay out of it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 10, "axes.edgecolor": theme.grid, "text.color": theme.ink})
        figure = Figure(figsize=(5.2, 3.2), dpi=180, facecolor=theme.paper, layout="constrained")
        _draw(figure.add_subplot(facecolor=theme.paper), plot, theme)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _draw(axes: Any, plot: Plot, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for points, label in ((plot.train, "train"), (plot.validation, "validation")):
        if points:
            _curve(axes, points, label, getattr(theme, label))
    if plot.best_step is not None and plot.validation:
        _mark(axes, plot.validation, plot.best_step, theme)
    axes.set_title(plot.title, loc="left", fontsize=11, fontweight="bold", color=theme.ink)
    axes.set_xlabel("step", color=theme.ink)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(colors=theme.ink, length=0)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if plot.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif plot.name == "learning_rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        axes.yaxis.get_offset_text().set_color(theme.ink)
        axes.set_ylim(bottom=0)
    if plot.validation:
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)


def _curve(axes: Any, points: Points, label: str, colour: str) -> None:
    steps, values = points
    if len(steps) < SMOOTHED_FROM:
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(steps, _running_mean(values), color=colour, linewidth=1.8, label=f"{label}, running mean")


def _running_mean(values: list[float]) -> list[float]:
    """The mean over a window centred on each point, a twentieth of the curve wide, narrower at both ends."""
    reach = max(1, len(values) // 40)
    half = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - h : i + h + 1]) / (2 * h + 1) for i, h in enumerate(half)]


def _mark(axes: Any, validation: Points, best_step: int, theme: Theme) -> None:
    axes.axvline(best_step, color=theme.validation, linewidth=1, linestyle=":")
    at = dict(zip(*validation, strict=True)).get(best_step)
    if at is not None:
        ring = {"marker": "o", "s": 70, "facecolors": "none", "edgecolors": theme.validation, "linewidths": 1.6}
        axes.scatter([best_step], [at], zorder=3, label=f"best, step {best_step}", **ring)


def _points(records: list[dict[str, Any]], key: str) -> Points | None:
    pairs = [(r["step"], r[key]) for r in records if number(r.get(key)) is not None]
    return ([step for step, _ in pairs], [value for _, value in pairs]) if pairs else None
