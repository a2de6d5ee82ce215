"""What a report says, in the order in which it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.analysis.comparison import PanelRow
from jaxft.reports import card, planned
from jaxft.reports.document import Block, Bullets, Code, Gallery, Heading, Image, Table, Text, Verdict
from jaxft.reports.figures import summarise
from jaxft.reports.folder import RunRecord
from jaxft.reports.sections import (
    contamination,
    goodput,
    hard,
    limits,
    movement,
    panel,
    rows,
    samples,
    tasks,
    teacher_forced,
)
from jaxft.reports.sections import verdict as verdicts
from jaxft.reports.sections.contamination import Compared
from jaxft.reports.sections.hard import Hardness
from jaxft.reports.sections.rows import Rows
from jaxft.reports.sections.tasks import Score


@dataclass(frozen=True)
class Findings:
    """All that is computed of a run, once: `figures` and records that pages and comparisons show."""

    run: RunRecord
    figures: dict[str, Any]
    scores: Sequence[Score]
    panel: Sequence[PanelRow]
    compared: Sequence[Compared]
    hard: Sequence[Hardness]
    rows: Rows | None


def find(run: RunRecord) -> Findings:
    """Computes a run's figures; `figures` is what report.json holds."""
    figures = summarise(run)
    scores, others = tasks.measure(run, figures["tasks"]), panel.measure(run)
    compared, hardness, single = contamination.measure(run), hard.measure(run), rows.measure(run)
    found, gaps = tasks.cited(run, scores)
    more = {
        "scores": tasks.told(scores),
        "panel": [vars(row) for row in others],
        "hard": hard.told(hardness),
        "rows": rows.told(single),
        "contamination": contamination.told(compared),
        "published": [vars(score) for score in found],
        "unpublished": dict(gaps),
    }
    return Findings(run, figures | more, scores, others, compared, hardness, single)


def verdict(found: Findings) -> Verdict:
    """The box at the top."""
    return verdicts.verdict(found.figures, found.scores, found.panel, found.compared)


def blocks(found: Findings, images: Sequence[Image]) -> list[Block]:
    """The whole report."""
    run, figures = found.run, found.figures
    return [
        Heading(1, ("Fine-tuning report: ", Code(run.name))),
        verdict(found),
        *([Heading(2, "Missing from this run folder"), Bullets(figures["missing"])] if figures["missing"] else []),
        Heading(2, "Tasks: base against tuned"),
        *tasks.blocks(run, found.scores),
        *panel.blocks(found.panel),
        *([Heading(2, "Curves"), Gallery(images)] if images else []),
        Heading(2, "Loss and token accuracy, teacher-forced"),
        *teacher_forced.blocks(run, figures),
        Heading(2, "How the losses moved"),
        *movement.quantity_blocks(figures),
        Heading(2, "Overfitting"),
        *movement.overfitting_blocks(figures),
        *hard.blocks(found.hard),
        *rows.blocks(found.rows, graded=bool(found.hard)),
        *contamination.blocks(run, found.compared),
        *samples.blocks(run),
        Heading(2, "Run card"),
        Table(("", ""), card.rows(run, figures), figures=False),
        Heading(2, "Time and cost"),
        Table(("", ""), card.cost(figures), figures=False),
        *goodput.blocks(figures["goodput_phases"]),
        *_planned(run, figures),
        Heading(2, "What was not measured"),
        Bullets(limits.unmeasured(run, figures, found.scores, found.panel)),
    ]


def _planned(run: RunRecord, figures: dict[str, Any]) -> list[Block]:
    """Nothing where the run has not told both sides of any figure."""
    compared = figures["planned_and_measured"]
    if not compared:
        return []
    head = ("", "planned", "measured", "measured / planned")
    return [Heading(2, "Planned against measured"), Table(head, planned.rows(compared)), Text(planned.note(run))]
