"""Where a tuned model fails: categories of problems with intervals, kinds of mistakes, and real examples of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.analysis import hardness
from jaxft.analysis.gsm8k import categories, mistakes
from jaxft.analysis.hardness import Category
from jaxft.reports.document import Block, Code, Columns, Details, Heading, Inline, Quote, Table, Text
from jaxft.reports.evaluations import Evaluation, Mistakes, Shown
from jaxft.reports.fitting import plain
from jaxft.reports.folder import RunRecord
from jaxft.reports.records import Problem, of_split
from jaxft.reports.sections.tasks import OWN, newest
from jaxft.reports.wording import between, cut, nats, share, signed, whole

NOTE = (
    "A row per category with at least 30 problems inside and outside. Odds are those of a wrong answer against problems "
    "outside the category, all other dimensions held fixed; p is adjusted by Benjamini and Hochberg over the table; hard or "
    "easy is said below 0.05."
)
MISTAKES_NOTE = (
    "Checked in the text, not guessed: equations are evaluated, units are looked up; the first kind that fits counts."
)


@dataclass(frozen=True)
class Hardness:
    """One task's categories (with examples of those that stand out) and each side's mistakes."""

    source: str
    task: str
    documents: int
    categories: Sequence[tuple[Category, Sequence[Shown]]]
    mistakes: Mapping[str, Sequence[Mistakes]]


def measure(run: RunRecord) -> list[Hardness]:
    """The run's own tasks in GSM8K's form, then those of the newest evaluations; those with nothing to tell left out."""
    own = [_own(run, task, problems) for task, problems in run.answers.items()]
    evaluated = [
        Hardness(_source(e, name), name, task.documents, task.categories, task.mistakes)
        for e, name, task in newest(run.measured)
    ]
    return [found for found in (*own, *evaluated) if found and (found.categories or any(found.mistakes.values()))]


def _source(evaluation: Evaluation, task: str) -> str:
    rows = evaluation.rows.get(task)
    return f"evaluations/{evaluation.name}" + (f" on {rows}" if rows else "")


def _own(run: RunRecord, task: str, problems: Sequence[Problem]) -> Hardness | None:
    """None where references have no final answers: then neither categories nor mistakes can be read."""
    answered = [p for p in problems if p.tuned and "####" in p.reference]
    if not answered:
        return None
    classes = categories.of_rows([{"question": p.question, "answer": p.reference} for p in answered])
    right = [p.tuned.right for p in answered]
    base = [p.base.right for p in answered if p.base]
    nll, tokens = _losses(run, answered)
    table = hardness.table(classes, right, base if len(base) == len(right) else None, nll=nll, tokens=tokens)
    shown = [
        (
            row,
            [_shown(answered[i], answered[i].tuned.text) for i in hardness.examples(row, classes, right)]
            if row.flag
            else [],
        )
        for row in table
    ]
    sides = {side: _mistakes(answered, side) for side in ("base", "tuned")}
    return Hardness(OWN, task, len(answered), shown, sides)


def _losses(run: RunRecord, problems: Sequence[Problem]) -> tuple[list[float] | None, list[int] | None]:
    """Of the same problems at the best step, where all are validation rows."""
    known = {e.question: e for e in of_split(run.examples, "validation")}
    found = [known.get(p.question) for p in problems]
    if None in found:
        return None, None
    return [e.nll.best for e in found], [e.tokens for e in found]


def _mistakes(problems: Sequence[Problem], side: str) -> list[Mistakes]:
    replies = [(problem, getattr(problem, side)) for problem in problems if getattr(problem, side)]
    kinds = [
        None if reply.right else mistakes.mistake(p.question, p.reference, reply.text, truncated=reply.cut)
        for p, reply in replies
    ]
    rows = []
    for row in mistakes.counts(kinds):
        examples = [
            _shown(replies[e["document"]][0], replies[e["document"]][1].text, e["evidence"]) for e in row["examples"]
        ]
        rows.append(
            Mistakes(row["kind"], row["meaning"], row["count"], row["share"], tuple(row["share_interval"]), examples)
        )
    return rows


def _shown(problem: Problem, output: str, evidence: str | None = None) -> Shown:
    return Shown(problem.question, problem.reference, output, problem.doc, evidence)


def blocks(found: Sequence[Hardness]) -> list[Block]:
    """Each task's tables; the first one open, the others behind their names. Nothing where nothing was graded."""
    if not found:
        return []
    each = [_of_task(hard) for hard in found]
    more = [
        Details(("The same for ", Code(hard.task), f", {hard.source}"), of_task)
        for hard, of_task in zip(found[1:], each[1:])
    ]
    first = found[0]
    where = (Code(first.task), f": {whole(first.documents)} problems, measured by {first.source}.")
    return [Heading(2, "What is hard"), Text(where), *each[0], *more]


def _of_task(hard: Hardness) -> list[Block]:
    return [*_categories(hard.categories), *_mistake_blocks(hard.mistakes)]


def _categories(found: Sequence[tuple[Category, Sequence[Shown]]]) -> list[Block]:
    if not found:
        return []
    flagged = [each for each in found if each[0].flag]
    table = _table([category for category, _ in flagged]) if flagged else []
    rest = _table([category for category, _ in found if not category.flag])
    said = "None of them stands out." if not flagged else ""
    return [
        Heading(3, "Categories"),
        *table,
        Text(f"{NOTE} {said}".strip()),
        *(_examples(_name(category), category.flag, shown) for category, shown in flagged if shown),
        *([Details(f"{'Other' if flagged else 'All'} categories ({len(found) - len(flagged)})", rest)] if rest else []),
    ]


def _table(found: Sequence[Category]) -> list[Block]:
    if not found:
        return []
    rows = [_row(category) for category in found]
    head = ("", "n", "Base", "Tuned (95 % interval)", "Δ (95 % interval)", "Loss", "Of errors", "Odds", "p", "")
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    return [
        Table(
            [head[i] for i in kept],
            [[row[i] for i in kept] for row in rows],
            words=[at for at, i in enumerate(kept) if i == len(head) - 1],
        )
    ]


def _name(category: Category) -> str:
    return f"{category.dimension}{'' if category.name == 'yes' else f': {category.name}'}"


def _row(c: Category) -> list[Inline]:
    difference = ""
    if c.difference is not None and c.difference_interval is not None:
        low, high = (signed(bound * 100, 1) for bound in c.difference_interval)
        difference = f"{signed(c.difference * 100, 1)} ({low} to {high})"
    return [
        Code(_name(c)),
        whole(c.documents),
        "" if c.base is None else share(c.base),
        f"{share(c.tuned)} ({between(*c.tuned_interval).removesuffix(' %')})",
        difference,
        "" if c.loss is None else nats(c.loss),
        share(c.share_of_errors),
        f"× {c.odds_ratio:,.2g}",
        f"{c.p_value:.2g}",
        c.flag,
    ]


def _examples(name: str, flag: str, shown: Sequence[Shown]) -> Details:
    kind = "solved" if flag == "easy" else "wrong"
    return Details(("Examples: ", Code(name), f", {kind}"), [block for each in shown for block in quoted(each)])


def quoted(shown: Shown) -> list[Block]:
    """A problem, what was expected and what the model wrote."""
    number = "" if shown.doc_id is None else f" {shown.doc_id}"
    evidence = [Text(("Evidence: ", Code(shown.evidence[:200])))] if shown.evidence else []
    output = "\n---\n".join(map(str, shown.output)) if isinstance(shown.output, list) else shown.output
    pair = Columns([Quote("Reference", cut(shown.reference)), Quote("Model", cut(output))])
    return [Quote(f"Problem{number}", cut(shown.question)), pair, *evidence]


def _mistake_blocks(found: Mapping[str, Sequence[Mistakes]]) -> list[Block]:
    sides = {side: rows for side, rows in found.items() if rows}
    if not sides:
        return []
    kinds = {row.kind: row.meaning for rows in sides.values() for row in rows}
    at = {side: {row.kind: row for row in rows} for side, rows in sides.items()}
    rows = [(Code(kind), *(_counted(at[side].get(kind)) for side in sides), meaning) for kind, meaning in kinds.items()]
    last = list(sides)[-1]
    return [
        Heading(3, "Kinds of mistakes"),
        Table(("", *(f"{side}: count, share of its errors" for side in sides), ""), rows, words=(len(sides) + 1,)),
        Text(MISTAKES_NOTE),
        *(
            Details(("An example: ", Code(row.kind), f", {last}"), quoted(row.examples[0]))
            for row in sides[last]
            if row.examples
        ),
    ]


def _counted(row: Mistakes | None) -> str:
    return (
        "0" if row is None else f"{row.count:,}, {share(row.share)} ({between(*row.share_interval).removesuffix(' %')})"
    )


def told(found: Sequence[Hardness]) -> list[dict[str, Any]]:
    """JSON-ready, with up to three examples of what stands out."""
    return [
        plain(hard)
        | {"categories": [plain(category) | {"examples": plain(shown)} for category, shown in hard.categories]}
        for hard in found
    ]
