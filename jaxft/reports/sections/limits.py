"""What a run did not measure, and how it would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxft.analysis.comparison import PanelRow
from jaxft.reports.document import Code, Inline
from jaxft.reports.folder import RunRecord
from jaxft.reports.records import of_split
from jaxft.reports.sections.tasks import Score

EVALUATE = Code("python -m jaxft.evaluate")
SEEDS = (
    "The spread over seeds: this is one run with one seed. A claim that one method beats another takes three or more."
)


def unmeasured(
    run: RunRecord, figures: dict[str, Any], scores: Sequence[Score], rows: Sequence[PanelRow]
) -> list[Inline]:
    """A line each; what was measured is not named."""
    lines: list[tuple[bool, Inline]] = [
        (not scores, ("Right answers by generation: give a task in ", Code("eval.tasks"), ", or run ", EVALUATE, ".")),
        (_unpaired(scores), "A paired test of the run's own tasks: answers problem by problem are not in this folder."),
        (
            not run.measured,
            (
                "Published protocols, mistakes, categories and contamination of a test set: ",
                EVALUATE,
                " measures them.",
            ),
        ),
        (
            not rows,
            ("Other abilities of the model, which fine-tuning may have worsened: give ", EVALUATE, " other tasks."),
        ),
        (
            figures["eval_loss"]["end"] is None,
            ("Loss on held-out rows: hold some out with ", Code("data.validation_fraction"), "."),
        ),
        (
            figures["eval_loss"]["end"] is not None and not of_split(run.examples, "validation"),
            "Losses per example: examples.jsonl is not there (it is written at the end of a run), so that losses have no "
            "intervals and no row can stand out.",
        ),
        (
            figures["probe_loss"]["end"] is None and not of_split(run.examples, "probe"),
            ("Loss on training rows as on validation rows: the probe was off (", Code("eval.probe_rows"), ")."),
        ),
        (figures["usd_per_chip_hour"] is None, ("Cost: give ", Code("run.usd_per_chip_hour"), ".")),
        (figures["peak_device_memory_gib"] is None, "Peak device memory: this backend does not tell it."),
        (figures["median_mfu"] is None, "Model FLOP/s utilisation: the peak of these devices is not known."),
        (figures["goodput_phases"] is None, "Where the wall time went, phase by phase."),
    ]
    return [*(line for missing, line in lines if missing), SEEDS]


def _unpaired(scores: Sequence[Score]) -> bool:
    return any(s.primary and s.base and s.tuned and not s.change for s in scores)
