"""What questions that were asked share with questions that were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.analysis import contamination
from jaxft.reports.document import Block, Code, Details, Flag, Heading, Inline, Quote, Table, Text
from jaxft.reports.evaluations import Contamination, Evaluation, Kind
from jaxft.reports.fitting import number, plain
from jaxft.reports.folder import RunRecord
from jaxft.reports.records import of_split
from jaxft.reports.sections.tasks import newest
from jaxft.reports.wording import between, cut, share, whole

RAISING = {
    "duplicate": "are those of",
    "masked duplicate": "are, but for numbers, those of",
    "13-gram": "share 13 words in a row with",
}
RAISED_FROM = 0.01
VALIDATION = "validation rows"
MOST_ROWS = 5000
NOTE = (
    "Duplicate: the same words; masked duplicate: but for numbers; N-gram: N words in a row; near: similarity of three-word "
    "shingles, numbers masked, at least 0.6. Case and punctuation do not count. Whether a base model saw them in "
    "pretraining cannot be told from here."
)


@dataclass(frozen=True)
class Compared:
    """One comparison: what was asked, what was trained on, in words and numbers."""

    asked: str
    against: str
    found: Contamination


def measure(run: RunRecord) -> list[Compared]:
    """Each task of the newest evaluations against all training rows; validation rows against the probe's."""
    found = [
        Compared(
            _asked(e, name), f"{task.contamination.trained:,} training rows (evaluations/{e.name})", task.contamination
        )
        for e, name, task in newest(run.measured)
        if task.contamination and task.contamination.kinds
    ]
    held, probe = (of_split(run.examples, split)[:MOST_ROWS] for split in ("validation", "probe"))
    if held and probe:
        checked = contamination.check([e.question for e in probe], [e.question for e in held])
        kinds = [
            Kind(s.kind, s.documents, s.shared, s.share, s.share_interval, [plain(o) for o in s.offenders[:20]])
            for s in checked.sharings
        ]
        of = Contamination(len(probe), kinds, checked.nearest_similarity)
        found.append(Compared(VALIDATION, f"{len(probe):,} training rows, the probe: a sample of all", of))
    return found


def _asked(evaluation: Evaluation, task: str) -> str:
    rows = evaluation.rows.get(task)
    return task if rows is None else f"{task} on {rows}"


def flag(found: Sequence[Compared]) -> Flag:
    """Raised where at least one in a hundred questions is a duplicate, masked or not, or shares 13 words in a row."""
    name = "Contamination"
    if not found:
        return Flag(name, None, "questions were not compared with training rows.")
    most: dict[str, tuple[float, str]] = {}
    for compared in found:
        for kind in compared.found.kinds:
            if kind.kind in RAISING and kind.share >= most.get(compared.asked, (-1.0, ""))[0]:
                rows = "rows trained on" if compared.asked != VALIDATION else "a sample of the rows trained on"
                words = f"{kind.shared:,} of {kind.documents:,} questions {RAISING[kind.kind]} {rows}"
                most[compared.asked] = (kind.share, words)
    over = {asked: words for asked, (of, words) in most.items() if of >= RAISED_FROM}
    if over:
        return Flag(name, True, "; ".join(f"{asked}: {words}" for asked, words in over.items()) + ".")
    asked = ", ".join(c.asked for c in found)
    return Flag(name, False, f"less than 1 % of questions share 13 words in a row with rows trained on ({asked}).")


def blocks(run: RunRecord, found: Sequence[Compared]) -> list[Block]:
    """A table per comparison, exact match without the offenders, and the first of them."""
    if not found:
        return []
    rows = [
        ([Code(c.asked) if i == 0 else "", " " if i == 0 else "", kind.kind], whole(kind.shared), whole(kind.documents),
         share(kind.share), between(*kind.share_interval), *_exact(c, kind.kind))
        for c in found for i, kind in enumerate(c.found.kinds)
    ]  # fmt: skip
    head = ("", "Shared", "of", "Share", "95 % interval", "Exact match, all", "without them")
    kept = [i for i in range(len(head)) if i < 5 or any(row[i] for row in rows)]
    against = "; ".join(f"{c.asked} against {c.against}" for c in found)
    return [
        Heading(2, "Contamination"),
        Text(f"Questions alone were compared: {against}."),
        Table([head[i] for i in kept], [[row[i] for i in kept] for row in rows]),
        Text(NOTE),
        *_offenders(run, found),
    ]


def _exact(compared: Compared, kind: str) -> tuple[str, str]:
    for row in compared.found.with_and_without or []:
        if row.get("kind") == kind:
            parts = (row.get(name) for name in ("all", "others"))
            return tuple(share(of.get("exact_match")) if isinstance(of, dict) and number(of.get("exact_match")) is not None
                         else "" for of in parts)  # fmt: skip
    return "", ""


def _offenders(run: RunRecord, found: Sequence[Compared]) -> list[Block]:
    """Up to three of each comparison, of the strictest kind that found any."""
    quotes: list[Block] = []
    for compared in found:
        kind = next((k for k in compared.found.kinds if k.offenders), None)
        for offender in (kind.offenders if kind else [])[:3]:
            label: Inline = f"{compared.asked}, question {offender.get('evaluation')}, {kind.kind}"
            quotes.append(Quote(str(label)[:200], cut(offender.get("shared"), 400)))
    return [Details("What is shared, the first of each", quotes)] if quotes else []


def told(found: Sequence[Compared]) -> list[Any]:
    """JSON-ready."""
    return [plain(compared) for compared in found]
