"""Several runs side by side: a column per run, in the form in which such runs are reported, with what may be compared."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from jaxft.analysis import quantities
from jaxft.reports import document, plots
from jaxft.reports.card import adapter
from jaxft.reports.content import Findings
from jaxft.reports.document import Block, Bullets, Code, Gallery, Heading, Image, Table
from jaxft.reports.fitting import number
from jaxft.reports.plots import Curve, Plot
from jaxft.reports.sections.tasks import Result
from jaxft.reports.wording import (
    UNKNOWN,
    between,
    change,
    clock,
    nats,
    p_value,
    points,
    share,
    signed,
    usd,
    whole,
)

NOTES = (
    "Train loss is the logged one: dropout on, seen data, first against last steps. Validation loss is token-weighted, from "
    "step 0 (the base model) to the best step; intervals are 95 %, paired over examples.",
    "Losses per token of models with different tokenizers do not compare; bits per byte do, on the same texts.",
    "Token accuracy is teacher-forced: how often the next token is guessed when all before it are given. It is not task "
    "accuracy.",
    "Task scores have 95 % intervals; Δ is paired over the same documents, p McNemar's. Each run is one seed.",
    "Published numbers compare only where the protocol is the same.",
)
NONE = "–"
CHARTS = ("loss", "bits_per_byte", "relative_loss", "token_accuracy")


def table(runs: Sequence[Findings]) -> Table:
    """A column per run; rows that no run can fill are left out."""
    columns = [column(run) for run in runs]
    names = list(dict.fromkeys(name for each in columns for name in each))
    rows = [
        (name, *(each.get(name) or NONE for each in columns))
        for name in names
        if any(each.get(name) for each in columns)
    ]
    return Table(("", *(Code(run.run.name) for run in runs)), rows, words=range(1, len(runs) + 1))


def column(found: Findings) -> dict[str, str]:
    """Row -> what a run has there; empty where it has nothing."""
    figures, run = found.figures, found.run
    return {
        "Model": str(run.setting("model.name") or run.fact("model.name") or UNKNOWN),
        "Adapter": adapter(run),
        "Rows trained on": whole(figures["data"].get("train_rows")),
        "State": figures["state"] or UNKNOWN,
        "Best step / steps": f"{whole(figures['best_step'])} / {whole(figures['steps'])}",
        **_losses(figures),
        **_tasks(found),
        "Overfitting flag": {True: "raised", False: "not raised"}.get(figures["overfitting"]["flag"], "not decided"),
        **_spent(figures),
        "Published, of the base": _published(found),
    }


def _losses(figures: dict[str, Any]) -> dict[str, str]:
    found, paired = figures["quantities"], figures["paired"]
    train, held, final, accuracy = (
        found[name] for name in (quantities.TRAIN, quantities.VALIDATION, quantities.FINAL, quantities.ACCURACY)
    )
    probe, bits = figures["probe_loss"], figures["eval_bits_per_byte"]
    return {
        "Train loss, logged": _moved(train.get("before"), train.get("after"), nats, train["value"]),
        "Train probe loss": _moved(probe["start"], probe["end"], nats, _fall(probe["start"], probe["end"])),
        "Validation loss": _moved(held.get("before"), held.get("after"), nats, held["value"])
        + _interval(paired.get("validation, base to best")),
        "Bits per byte": _moved(bits["start"], bits["best"], nats, _fall(bits["start"], bits["best"])),
        "Final steps, train loss": ""
        if final["value"] is None
        else f"{signed(final['value'], 1)} % ({signed(final['interval'][0], 1)} to {signed(final['interval'][1], 1)})",
        "Token accuracy (teacher-forced)": _moved(accuracy.get("start"), accuracy.get("end"), share, None),
    }


def _fall(start: float | None, end: float | None) -> float | None:
    return 100 * (1 - end / start) if start and end is not None else None


def _moved(start: float | None, end: float | None, form: Any, decrease: float | None) -> str:
    if start is None and end is None:
        return ""
    by = "" if number(decrease) is None else f" ({change(decrease / 100)})"
    return f"{form(start)} → {form(end)}{by}"


def _interval(found: dict[str, Any] | None) -> str:
    if not found or not found["percent_interval"]:
        return ""
    low, high = (-bound / 100 for bound in found["percent_interval"])
    return f" [{between(high, low)}]".replace("-", "−")


def _tasks(found: Findings) -> dict[str, str]:
    rows = {}
    for score in found.scores:
        if score.primary:
            sides = [_side(side) for side in (score.base, score.tuned)]
            said = f"{sides[0]} → {sides[1]}"
            if score.change and score.percent:
                said += f", Δ {points(score.change.difference)}"
                said += f", {p_value(score.change.p_value)}" if score.change.p_value is not None else ""
            rows[f"{score.label} {score.metric.removesuffix(',none')}, n {whole(score.documents)}"] = said
    return rows


def _side(side: Result | None) -> str:
    if side is None:
        return NONE
    if not 0 <= side.value <= 1:
        return f"{side.value:,.4g}"
    return share(side.value) + (f" ({between(*side.interval).removesuffix(' %')})" if side.interval else "")


def _spent(figures: dict[str, Any]) -> dict[str, str]:
    logged = {
        "Tokens per second": (figures["median_tokens_per_second"], "{:,.0f}"),
        "MFU": (figures["median_mfu"], "{:.1%}"),
        "Peak device memory": (figures["peak_device_memory_gib"], "{:.2f} GiB"),
    }
    phases = figures["goodput_phases"]
    return {
        "Wall time": clock(figures["wall_seconds"]),
        **{name: "" if value is None else form.format(value) for name, (value, form) in logged.items()},
        "Goodput": share(phases["useful"]) if phases and phases["useful"] is not None else "",
        "Cost": "unknown (no price given)" if figures["usd_per_chip_hour"] is None else usd(figures["cost_usd"]),
    }


def _published(found: Findings) -> str:
    """Benchmark by benchmark, each score with its protocol; the sources stand below the table."""
    by: dict[str, list[str]] = {}
    for score in _cited(found):
        by.setdefault(score["benchmark"], []).append(f"{score['value']:g} % ({score['protocol']})")
    said = [f"{benchmark} {', '.join(scores)}" for benchmark, scores in by.items()]
    said += [f"{benchmark}: {words}" for benchmark, words in found.figures["unpublished"].items()]
    return "; ".join(said)


def _cited(found: Findings) -> list[dict[str, Any]]:
    """Published scores of the base itself, GSM8K's where the rows are GSM8K's."""
    model = str(found.run.setting("model.name") or found.run.fact("model.name") or "").casefold()
    own = [score for score in found.figures["published"] if score["model"].casefold() == model]
    return [score for score in own if score["benchmark"] == "GSM8K"] if found.run.of_gsm8k else own


def _sources(runs: Sequence[Findings]) -> list[str]:
    cited = dict.fromkeys((s["model"], s["source"]) for run in runs for s in _cited(run))
    return [f"Published scores of {model}: {source}." for model, source in cited]


def charts(runs: Sequence[Findings]) -> list[Plot]:
    """Curves of all runs in one plot each: bits per byte, loss as a share of its start, and losses where models are one."""
    models = {run.run.setting("model.name") or run.run.fact("model.name") for run in runs}
    alike = len(models) == 1 and None not in models
    asked = (
        (alike, "loss", "eval_loss", "Validation loss, nats per token", False),
        (True, "bits_per_byte", "eval_bits_per_byte", "Validation, bits per byte", False),
        (True, "relative_loss", "eval_loss", "Validation loss as a share of the base's", True),
        (True, "token_accuracy", "eval_mean_token_accuracy", "Teacher-forced token accuracy", True),
    )
    found = [_chart(runs, name, key, title, percent) for wanted, name, key, title, percent in asked if wanted]
    return [chart for chart in found if len(chart.curves) > 1]


def _chart(runs: Sequence[Findings], name: str, key: str, title: str, percent: bool) -> Plot:
    """Against the share of each run's planned steps, because their numbers differ."""
    curves = []
    for i, found in enumerate(runs):
        read = plots.points(found.run.evaluations, key)
        steps = found.figures["steps"] or found.figures["step"]
        if read and read[1][0] > 0 and steps:
            by = read[1][0] if name == "relative_loss" else 1.0
            at = [step / steps for step in read[0]], [value / by for value in read[1]]
            curves.append(Curve(found.run.name, at, i, i // len(plots.LIGHT.curves)))
    words = f"{title}, a curve per run"
    return Plot(name, title, words, curves, percent=percent, across="share of the planned steps")


def blocks(runs: Sequence[Findings], images: Sequence[Image]) -> list[Block]:
    """The comparison as a document."""
    return [
        Heading(1, f"Comparison of {len(runs)} fine-tuning runs"),
        table(runs),
        *([Heading(2, "Curves"), Gallery(images)] if images else []),
        Heading(2, "What these figures are"),
        Bullets([*NOTES, *_sources(runs)]),
    ]


def printed(runs: Sequence[Findings]) -> str:
    """The table for a terminal."""
    made = table(runs)
    rows = [[document.plain(cell) for cell in row] for row in (made.header, *made.rows)]
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [min(MOST, max(map(len, cells))) for cells in zip(*rows, strict=True)]
    return "\n".join(line for row in rows for line in _wrapped(row, widths))


MOST = 48  # characters of a column; longer cells go on in further lines


def _wrapped(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
    return [
        "  ".join((cell[i] if i < len(cell) else "").ljust(w) for cell, w in zip(cells, widths, strict=True)).rstrip()
        for i in range(max(map(len, cells)))
    ]


def told(runs: Sequence[Findings]) -> dict[str, Any]:
    """comparison.json: the table's cells and each run's figures."""
    return {"runs": [run.run.name for run in runs], "table": [column(run) for run in runs],
            "figures": [run.figures for run in runs], "notes": list(NOTES)}  # fmt: skip
