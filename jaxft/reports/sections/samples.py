"""Answers of the base and the tuned model to the same problems, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxft.reports.document import Block, Code, Columns, Heading, Quote, Text
from jaxft.reports.folder import RunRecord
from jaxft.reports.records import Problem, Reply
from jaxft.reports.wording import cut

PER_TASK = 3
OUTCOMES = {
    (True, True): "both right",
    (False, True): "wrong → right",
    (True, False): "right → wrong",
    (False, False): "both wrong",
}


def blocks(run: RunRecord) -> list[Block]:
    """The first problem of each outcome, where answers were kept problem by problem; else the first problems."""
    shown: list[Block] = []
    tasks = run.fact("tasks")
    names = dict.fromkeys([*run.answers, *(tasks if isinstance(tasks, dict) else {})])
    for task in names:
        kept = [p for p in run.answers.get(task, []) if p.base and p.tuned]
        if kept:
            shown += _outcomes(task, kept)
        else:
            scores = tasks.get(task) if isinstance(tasks, dict) else None
            for i, pair in enumerate(_pairs(scores if isinstance(scores, dict) else {}), 1):
                shown += [Heading(3, (Code(task), f", problem {i}")), *_sample(*pair)]
    said = "The first problem of each outcome, or the first problems: nobody chose."
    return [Heading(2, "Samples, base against tuned"), Text(said), *shown] if shown else []


def _outcomes(task: str, problems: Sequence[Problem]) -> list[Block]:
    shown: list[Block] = []
    for outcome, name in OUTCOMES.items():
        of_kind = [p for p in problems if (p.base.right, p.tuned.right) == outcome]
        if of_kind:
            first = of_kind[0]
            title = (Code(task), f", problem {first.doc}: {name} ({len(of_kind):,} of {len(problems):,})")
            sides = [
                Quote(f"{side}: {_said(reply)}", cut(reply.text))
                for side, reply in (("Base", first.base), ("Tuned", first.tuned))
            ]
            shown += [
                Heading(3, title),
                Columns([Quote("Prompt", cut(first.question)), Quote("Reference", cut(first.reference))]),
                Columns(sides),
            ]
    return shown


def _said(reply: Reply) -> str:
    found = "no final answer" if reply.found is None else f"found {reply.found[:80]}"
    return f"{'right' if reply.right else 'wrong'}, {found}{', cut at the limit' if reply.cut else ''}"


def _pairs(scores: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(base, tuned) examples of one prompt each; an empty dict where a model has none for it."""
    base, tuned = (_examples(scores.get(model)) for model in ("base", "tuned"))
    return [(base.get(prompt, {}), tuned.get(prompt, {})) for prompt in {**tuned, **base}][:PER_TASK]


def _examples(scores: Any) -> dict[str, dict[str, Any]]:
    listed = scores.get("examples") if isinstance(scores, dict) else None
    return {str(e.get("prompt")): e for e in listed if isinstance(e, dict)} if isinstance(listed, list) else {}


def _sample(base: dict[str, Any], tuned: dict[str, Any]) -> list[Block]:
    one = base or tuned
    answers = (("expected", one.get("expected")), ("base", base.get("found")), ("tuned", tuned.get("found")))
    found = "\n".join(f"{label}: {'none' if value is None else value}" for label, value in answers)
    sides = [Quote(f"{name}: {_mark(e)}", cut(e.get("answer"))) for name, e in (("Base", base), ("Tuned", tuned))]
    return [
        Quote("Prompt", cut(one.get("prompt"))),
        Columns(sides),
        Columns([Quote("Reference", cut(one.get("reference"))), Quote("Final answers", cut(found))]),
    ]


def _mark(example: dict[str, Any]) -> str:
    right = example.get("right")
    return "right" if right is True else "wrong" if right is False else "not measured"
