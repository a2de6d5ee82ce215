"""`python -m jaxft.report RUN [RUN ...]`: a run folder to its report.md, .html, .json and plots, without JAX."""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.errors import OutOfResources, UserError, run_verb
from jaxft.reports import content, document, plots, wording
from jaxft.reports.figures import summarise
from jaxft.reports.folder import RunRecord, read


def write(folder: Path) -> dict[str, Any]:
    """Writes the report of a run folder, finished or not, into it; returns what report.json holds.

    The files depend on config.json, metrics.jsonl and results.json only. UserError where `folder` is no run folder or
    cannot be written.
    """
    return _write(read(Path(folder)))


def _write(run: RunRecord) -> dict[str, Any]:
    figures = summarise(run)
    charts = plots.plots(run, figures["best_step"])
    images = [_image(chart) for chart in charts]
    blocks = content.blocks(run, figures, images)
    files = {
        **{image.path: image.light for image in images},
        "report.json": (json.dumps(figures, indent=2, allow_nan=False) + "\n").encode(),
        "report.md": document.markdown(blocks).encode(),
        "report.html": document.page(f"Fine-tuning report: {run.name}", blocks).encode(),
    }
    try:
        (run.path / "plots").mkdir(exist_ok=True)
        for name in plots.NAMES:
            (run.path / f"plots/{name}.png").unlink(missing_ok=True)
        for name, data in files.items():
            (run.path / name).write_bytes(data)
    except OSError as error:
        said = f"{run.path}: the report cannot be written: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfResources(f"{said}; it needs {sum(map(len, files.values())):,} bytes") from error
        raise UserError(said) from error
    return figures


def _image(chart: plots.Plot) -> document.Image:
    light, dark = (plots.png(chart, theme) for theme in (plots.LIGHT, plots.DARK))
    return document.Image(f"plots/{chart.name}.png", chart.alt, light, dark)


def comparison(reports: Sequence[dict[str, Any]]) -> str:
    """A plain table: a column per run, a row per figure; task rows show base -> tuned."""
    columns = [_column(figures) for figures in reports]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [["", *(document.plain(figures["run"]) for figures in reports)]]
    rows += [[document.plain(name), *(column.get(name, "-") for column in columns)] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _column(figures: dict[str, Any]) -> dict[str, str]:
    loss, accuracy, train = (figures[k] for k in ("eval_loss", "eval_mean_token_accuracy", "train_loss"))
    column = {
        "state": document.plain(figures["state"] or wording.UNKNOWN),
        "step / planned": f"{wording.whole(figures['step'])} / {wording.whole(figures['steps'])}",
        "best step": wording.whole(figures["best_step"]),
    }
    for task, scores in figures["tasks"].items():
        base, tuned = (scores.get(model, {}) for model in ("base", "tuned"))
        for metric in content.task_metrics(scores):
            column[f"{task} {metric}"] = f"{wording.share(base.get(metric))} -> {wording.share(tuned.get(metric))}"
    logged = {
        "tokens per second": (figures["median_tokens_per_second"], "{:,.0f}"),
        "mfu": (figures["median_mfu"], "{:.1%}"),
        "peak device memory": (figures["peak_device_memory_gib"], "{:.2f} GiB"),
    }
    return column | {
        "eval_loss start -> best": f"{wording.nats(loss['start'])} -> {wording.nats(loss['best'])}",
        "eval_loss end": wording.nats(loss["end"]),
        "eval_mean_token_accuracy*": f"{wording.share(accuracy['start'])} -> {wording.share(accuracy['best'])}",
        "train loss first -> last": f"{wording.nats(train['start'])} -> {wording.nats(train['end'])}",
        "overfitting flag": {True: "raised", False: "not raised"}.get(figures["overfitting"]["flag"], wording.UNKNOWN),
        "wall time": wording.clock(figures["wall_seconds"]),
        **{name: form.format(value) for name, (value, form) in logged.items() if value is not None},
        "cost": "unknown (no price given)"
        if figures["usd_per_chip_hour"] is None
        else wording.usd(figures["cost_usd"]),
    }


def main(argv: list[str]) -> int:
    """Rewrites each run's report and prints its verdict; several runs are also compared."""
    parser = argparse.ArgumentParser(prog="python -m jaxft.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="*", help="run folder (run.dir) of a run, finished or not")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; expected python -m jaxft.report RUN [RUN ...]")
    if not arguments.runs:
        raise UserError("no run folder given; expected python -m jaxft.report RUN [RUN ...]")
    reports = [_write(run) for run in [read(Path(name)) for name in arguments.runs]]
    for name, figures in zip(arguments.runs, reports, strict=True):
        print(f"{document.plain(name)}: report.md, report.html, report.json and plots/ written")
        print(f"  {document.plain(content.verdict(figures))}\n")
    if len(reports) > 1:
        print(comparison(reports))
        print("\n* teacher-forced on the validation rows, start -> best step; not task accuracy")
    return 0


if __name__ == "__main__":
    run_verb(main)
