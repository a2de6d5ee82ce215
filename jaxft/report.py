"""`python -m jaxft.report RUN [RUN ...]`: a run folder to its report.md, .html, .json and plots, without JAX."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft import disk
from jaxft.errors import UserError, run_verb
from jaxft.reports import comparison, content, document, html, markdown, plots
from jaxft.reports.content import Findings
from jaxft.reports.fitting import plain
from jaxft.reports.folder import read

EXPECTED = "expected python -m jaxft.report RUN [RUN ...] [--out FOLDER]"


def write(folder: Path) -> dict[str, Any]:
    """Writes the report of a run folder, finished or not, into it; returns what report.json holds.

    The files depend on the run's own files only (config.json, metrics.jsonl, results.json, examples.jsonl, tasks_*.jsonl,
    evaluations/, goodput.jsonl). UserError where `folder` is no run folder or cannot be written.
    """
    return plain(_write(content.find(read(Path(folder)))).figures)


def _write(found: Findings) -> Findings:
    images = [_image(chart) for chart in plots.plots(found.run, found.figures["best_step"])]
    blocks = content.blocks(found, images)
    _save(found.run.path, "report", f"Fine-tuning report: {found.run.name}", blocks, images, found.figures, plots.NAMES)
    return found


def _save(
    folder: Path,
    name: str,
    title: str,
    blocks: Sequence[document.Block],
    images: Sequence[document.Image],
    figures: dict[str, Any],
    drawn: Sequence[str],
) -> None:
    """Writes NAME.md, .html, .json and the images; `drawn` are all that plots/ may hold of an earlier time."""
    files = {
        **{image.path: image.light for image in images},
        f"{name}.json": (json.dumps(plain(figures), indent=2, allow_nan=False) + "\n").encode(),
        f"{name}.md": markdown.markdown(blocks).encode(),
        f"{name}.html": html.page(title, blocks).encode(),
    }
    with contextlib.suppress(OSError):  # what cannot be removed cannot be written either, which is said then
        for chart in drawn:
            (folder / f"plots/{chart}.png").unlink(missing_ok=True)
    disk.write_all({folder / path: data for path, data in files.items()}, f"{folder}: the {name}")


def _image(chart: plots.Plot) -> document.Image:
    light, dark = (plots.png(chart, theme) for theme in (plots.LIGHT, plots.DARK))
    return document.Image(f"plots/{chart.name}.png", chart.alt, light, dark)


def compare(runs: Sequence[Findings], folder: Path) -> None:
    """Writes comparison.md, .html, .json and plots/ of several runs into `folder`."""
    images = [_image(chart) for chart in comparison.charts(runs)]
    blocks = comparison.blocks(runs, images)
    _save(
        folder, "comparison", "Comparison of fine-tuning runs", blocks, images, comparison.told(runs), comparison.CHARTS
    )


def main(argv: list[str]) -> int:
    """Rewrites each run's report and prints its verdict; several runs are also compared."""
    parser = argparse.ArgumentParser(prog="python -m jaxft.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="*", help="run folder (run.dir) of a run, finished or not")
    parser.add_argument(
        "--out", metavar="FOLDER", help="write the comparison of several runs there: comparison.md, .html, .json"
    )
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; {EXPECTED}")
    if not arguments.runs:
        raise UserError(f"no run folder given; {EXPECTED}")
    if arguments.out and len(arguments.runs) < 2:
        raise UserError(f"--out: a comparison needs two run folders or more, found {len(arguments.runs)}; {EXPECTED}")
    found = [_write(content.find(run)) for run in [read(Path(name)) for name in arguments.runs]]
    for name, each in zip(arguments.runs, found, strict=True):
        print(f"{document.plain(name)}: report.md, report.html, report.json and plots/ written")
        print(document.terminal(content.verdict(each)) + "\n")
    if len(found) > 1:
        print(comparison.printed(found))
        print("\nToken accuracy is teacher-forced, on validation rows: not task accuracy.")
        print("Losses per token compare only between models of one tokenizer; bits per byte do on the same texts.")
    if arguments.out:
        compare(found, Path(arguments.out))
        print(f"\n{document.plain(arguments.out)}: comparison.md, comparison.html, comparison.json and plots/ written")
    return 0


if __name__ == "__main__":
    run_verb(main)
