"""Single rows and kinds of rows by their losses: faults of the rows first, then outliers, the worsened, and categories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.analysis import hardness, instructions, outliers
from jaxft.analysis.gsm8k import categories
from jaxft.analysis.hardness import LossCategory
from jaxft.analysis.instructions import Instruction
from jaxft.errors import UserError
from jaxft.reports.document import Block, Code, Columns, Details, Heading, Inline, Quote, Table, Text
from jaxft.reports.fitting import plain
from jaxft.reports.folder import RunRecord
from jaxft.reports.records import Example, of_split
from jaxft.reports.wording import counted, cut, nats, share, signed, whole

LEAST = 20  # rows below which no outlier is looked for
SHOWN = 8  # rows of a table of single rows
QUOTED = 3
NOTE = (
    "Losses per token of validation rows at the best step, beside what a regression of the log loss on the answer's length and "
    "its category lets expect; an outlier's residual has a robust z (median, MAD) above 3.5. A high loss is no proof of "
    "hardness: look at the row's own faults first."
)
HARMFUL_NOTE = (
    "Worsened rows have a higher loss at the best step than with the base model; harmful where the robust z of the improvement "
    "is below -3.5."
)


@dataclass(frozen=True)
class Single:
    """One row that stands out: its origin, losses in nats per token, z, what is wrong with the row itself, and its text."""

    row: str
    tokens: int
    base: float
    best: float
    expected: float | None
    z: float
    faults: Sequence[str]
    question: str
    answer: str


@dataclass(frozen=True)
class Rows:
    """What losses per validation row tell. `faults`: kind -> rows. `checkable`: what could grade an answer -> rows."""

    rows: int
    faults: dict[str, int]
    outliers: int
    outlying: Sequence[Single]
    worsened: int
    harmful: int
    worst: Sequence[Single]
    categories: Sequence[LossCategory]
    checkable: dict[str, int]
    forbidding: int
    broken: int
    category_examples: dict[str, Sequence[Single]]


def measure(run: RunRecord) -> Rows | None:
    """From the validation rows of examples.jsonl; None where there are too few, or losses that allow nothing."""
    held = of_split(run.examples, "validation")
    if len(held) < LEAST:
        return None
    of_gsm8k = sum("####" in e.answer for e in held) * 2 > len(held)
    read = [] if of_gsm8k else [instructions.instruction(e.question, e.answer) for e in held]
    try:
        return _measured(held, read)
    except UserError:
        return None


def _measured(held: Sequence[Example], read: Sequence[Instruction]) -> Rows:
    tokens, best, base = [e.tokens for e in held], [e.nll.best for e in held], [e.nll.base for e in held]
    texts = [{"prompt": e.question, "answer": e.answer} for e in held]
    faults = outliers.faults(texts, [e.cut for e in held])
    if read:
        classes, named = [instructions.classes(r) for r in read], instructions.verbs(read)
    else:
        classes = categories.of_rows([{"question": e.question, "answer": e.answer} for e in held])
        named = [of_row["steps"] for of_row in classes]
    excess = outliers.excess(best, tokens, named, faults)
    changed = outliers.changes(base, best, tokens)
    expected = {e.document: e for e in excess}

    def single(document: int, z: float) -> Single:
        e = held[document]
        return Single(e.row, e.tokens, e.nll.base / e.tokens, e.nll.best / e.tokens, expected[document].expected, z,
                      faults[document], e.question, e.answer)  # fmt: skip

    table = hardness.by_loss(classes, best, tokens, base)
    return Rows(
        rows=len(held),
        faults=dict(Counter(fault for of_row in faults for fault in of_row)),
        outliers=sum(e.outlier for e in excess),
        outlying=[single(e.document, e.z) for e in excess if e.outlier][:SHOWN],
        worsened=sum(c.hurt for c in changed),
        harmful=sum(c.harmful for c in changed),
        worst=[single(c.document, c.z) for c in changed if c.hurt][:SHOWN],
        categories=table,
        checkable=dict(Counter(r.gradable or "nothing by machine" for r in read)),
        forbidding=sum(bool(r.forbidden) for r in read),
        broken=sum(bool(r.broken) for r in read),
        category_examples={
            f"{c.dimension}: {c.name}": [
                single(e.document, e.z) for e in excess if classes[e.document].get(c.dimension) == c.name
            ][:QUOTED]
            for c in table
            if c.flag == "hard"
        },
    )


def blocks(found: Rows | None, graded: bool) -> list[Block]:
    """Single rows, and where nothing was graded the categories by loss; nothing without losses per example."""
    if found is None:
        return []
    said = [f"{found.rows:,} validation rows. "]
    faults = ", ".join(f"{kind} {n:,}" for kind, n in found.faults.items())
    said.append(f"Faults of the rows themselves: {faults or 'none found'}. ")
    said.append(
        f"{counted(found.outliers, 'outlier')}; {found.worsened:,} worsened by training, {found.harmful:,} of them harmful."
    )
    return [
        Heading(2, "Rows that stand out"),
        Text("".join(said)),
        *_singles("Losses far above what length and category let expect", found.outlying),
        *([Text(NOTE)] if found.outlying else []),
        *_singles("Made worse by training", found.worst),
        *([Text(HARMFUL_NOTE)] if found.worst else []),
        *([] if graded else _by_loss(found)),
        *_constraints(found),
    ]


def _singles(title: str, rows: Sequence[Single]) -> list[Block]:
    if not rows:
        return []
    table = [
        (Code(s.row[:120]), nats(s.base), nats(s.best), "" if s.expected is None else nats(s.expected), signed(s.z, 1),
         whole(s.tokens), ", ".join(s.faults) or "none found")
        for s in rows
    ]  # fmt: skip
    head = ("Row", "Base", "Best", "Expected", "z", "Tokens", "Faults of the row")
    return [
        Heading(3, title),
        Table(head, table, words=(6,)),
        Details("Their texts", [q for s in rows[:QUOTED] for q in _quoted(s)]),
    ]


def _quoted(single: Single) -> list[Block]:
    return [Columns([Quote(f"{single.row[:120]}: prompt", cut(single.question)), Quote("Answer", cut(single.answer))])]


def _by_loss(found: Rows) -> list[Block]:
    if not found.categories:
        return []
    rows = [_category(c) for c in found.categories]
    head = ("", "n", "Base", "Best", "Beside its length (95 % interval)", "p", "")
    note = (
        "Mean loss per token. Beside its length: by how much losses exceed what their lengths let expect, against rows outside "
        "the category; p by Welch's test, adjusted by Benjamini and Hochberg over the table; hard or easy below 0.05."
    )
    shown = [
        Details(("Examples: ", Code(name)), [q for s in singles for q in _quoted(s)])
        for name, singles in found.category_examples.items()
        if singles
    ]
    return [Heading(3, "Categories by loss"), Table(head, rows, words=(6,)), Text(note), *shown]


def _category(c: LossCategory) -> list[Inline]:
    low, high = c.factor_interval
    return [
        Code(f"{c.dimension}{'' if c.name == 'yes' else f': {c.name}'}"),
        whole(c.documents),
        "" if c.base is None else nats(c.base),
        nats(c.loss),
        f"× {c.factor:.2f} ({low:.2f} to {high:.2f})",
        f"{c.p_value:.2g}",
        c.flag,
    ]


def _constraints(found: Rows) -> list[Block]:
    if not found.checkable:
        return []
    each = ", ".join(f"{what} {n:,}" for what, n in sorted(found.checkable.items(), key=lambda item: -item[1]))
    said = f"What could grade an answer: {each} (of {found.rows:,} rows)."
    if found.forbidding:
        said += (
            f" {counted(found.forbidding, 'row')} forbid words in quotes; the reference answers of {found.broken:,} "
            f"({share(found.broken / found.forbidding)}) use them all the same."
        )
    return [Heading(3, "Constraints that can be checked"), Text(said)]


def told(found: Rows | None) -> Any:
    """JSON-ready."""
    return plain(found)
