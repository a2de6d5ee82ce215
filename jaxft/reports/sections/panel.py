"""What fine-tuning did to abilities that it was not for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxft.analysis.comparison import LEVEL, PanelRow
from jaxft.reports.document import Block, Code, Flag, Heading, Table, Text
from jaxft.reports.folder import RunRecord
from jaxft.reports.sections.tasks import trained
from jaxft.reports.wording import counted, share, signed, whole

UNSHOWN = "no change shown"
LEAST_RIGHT = 6  # of the base: were all lost and none won, McNemar's p would be 2 / 2^6 = 0.03; of five it is 0.06


def measure(run: RunRecord) -> list[PanelRow]:
    """A row per task of evaluations that training was not for, each from the newest evaluation that has it.

    p-values are Holm's over all tasks of their evaluation; where rows come from several evaluations, each is multiplied by
    the number of these, which keeps the chance of any false claim below the level.
    """
    newest = {(row.task, e.rows.get(row.task)): (e.name, row) for e in run.measured for row in e.panel}
    kept = [(name, row) for name, row in newest.values() if not trained(run, row.task)]
    families = len({name for name, _ in kept})
    return [_adjusted(row, families) for _, row in kept]


def _adjusted(row: PanelRow, families: int) -> PanelRow:
    p = min(1.0, row.p_value * families)
    return replace(row, p_value=p, verdict=row.verdict if p < LEVEL else UNSHOWN)


def flag(rows: Sequence[PanelRow]) -> Flag:
    """Raised where a task got worse."""
    name = "Regression"
    if not rows:
        return Flag(name, None, "no other task was evaluated before and after.")
    worse = [row.task for row in rows if row.verdict == "worse"]
    unable = [f"{row.task} cannot show one ({why})" for row in rows if (why := floored(row))]
    words = f"worse on {', '.join(worse)}" if worse else "no loss shown"
    words += f", of {counted(len(rows), 'task')} that training was not for"
    words += "".join(f"; {each}" for each in unable)
    return Flag(name, True if worse else None if len(unable) == len(rows) else False, words + ".")


def blocks(rows: Sequence[PanelRow]) -> list[Block]:
    """The panel; nothing without rows."""
    if not rows:
        return []
    table = [
        (
            [Code(row.task), " ", Code(row.protocol.removesuffix(",none"))],
            _score(row, row.base),
            _score(row, row.tuned),
            _difference(row),
            f"{row.p_value:.2g}",
            row.verdict,
            f"no loss can show: {why}" if (why := floored(row)) else "",
            whole(row.documents),
        )
        for row in rows
    ]
    head = ("", "Base", "Tuned", "Δ (95 % interval)", "p (Holm)", "Verdict", "", "n")
    note = (
        "Tasks of evaluations that the training rows do not teach, on the same documents with the same prompts. p-values are "
        "adjusted by Holm over the tasks of an evaluation; below 0.05 a row is called worse or better."
    )
    return [Heading(2, "Other abilities: the regression panel"), Table(head, table, words=(5, 6)), Text(note)]


def floored(row: PanelRow) -> str | None:
    """Why a task cannot show a loss: the base guesses, or has too few right for any loss of them to be told from chance."""
    if row.near_chance:
        return "the base is near chance"
    right = round(row.base * row.documents)
    if row.near_chance is None and _share(row) and right < LEAST_RIGHT:
        return f"the base has {right} right"
    return None


def _share(row: PanelRow) -> bool:
    return 0 <= row.base <= 1 and 0 <= row.tuned <= 1


def _score(row: PanelRow, value: float) -> str:
    return share(value) if _share(row) else f"{value:,.4g}"


def _difference(row: PanelRow) -> str:
    scale, digits = (100, 1) if _share(row) else (1, 3)
    value, low, high = (signed(v * scale, digits) for v in (row.difference, *row.difference_interval))
    return f"{value} ({low} to {high})"
