"""Tasks measured by generation or by likelihoods: base against tuned on the same prompts, by the run and by evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxft.analysis import published
from jaxft.analysis.comparison import compare
from jaxft.analysis.gsm8k.answers import STRICT
from jaxft.reports.document import Block, Bullets, Code, Heading, Inline, Table, Text
from jaxft.reports.evaluations import Change, Evaluation, Side, Task
from jaxft.reports.fitting import number, plain
from jaxft.reports.folder import RunRecord
from jaxft.reports.records import Problem
from jaxft.reports.wording import UNKNOWN, between, p_value, points, share, signed, whole

OWN = "the run itself"
COUNTS = ("problems", "invalid", "truncated")  # of a task's scores, beside its metrics
NOTE = (
    "Base and tuned answer the same prompts; each score has its 95 % interval (Wilson's for a share of documents), for the "
    "draw of the documents alone. Δ is tuned - base with its 95 % paired bootstrap interval over documents, p is McNemar's, "
    "exact and two-sided. Invalid: no final answer could be read, which counts as wrong; truncated: cut at the "
    "limit of new tokens."
)
VALIDATION_NOTE = (
    "The run's own problems are validation rows, on which the best step was chosen too, so the tuned score flatters."
)


class Result(NamedTuple):
    """One side of a task's metric; None what is not known."""

    value: float
    interval: Sequence[float] | None
    invalid: float | None
    truncated: float | None


@dataclass(frozen=True)
class Score:
    """One metric of one task on one or two sides; `change` where both answered the same documents one by one.

    `source` is the run itself or an evaluation's folder; `primary`: the metric that stands for the task; `trained`: the task
    is what the training rows teach; `rows` names what was asked, None for the run's own.
    """

    source: str
    task: str
    metric: str
    primary: bool
    trained: bool
    protocol: str
    documents: float | None
    base: Result | None
    tuned: Result | None
    change: Change | None
    rows: str | None = None

    @property
    def label(self) -> str:
        """The task, and on which rows where they are not the run's own."""
        return self.task if self.rows is None else f"{self.task} on {self.rows}"

    @property
    def percent(self) -> bool:
        """Whether the metric is a share."""
        return all(0 <= side.value <= 1 for side in (self.base, self.tuned) if side)


def measure(run: RunRecord, tasks: dict[str, dict[str, dict[str, Any]]]) -> list[Score]:
    """The run's own tasks, then each task of the newest evaluation that has it."""
    own = [score for task, scores in tasks.items() for score in _own(run, task, scores)]
    return own + [
        score for evaluation, name, task in newest(run.measured) for score in _evaluated(run, evaluation, name, task)
    ]


def newest(evaluations: Sequence[Evaluation]) -> Iterator[tuple[Evaluation, str, Task]]:
    """Each task on the same rows once, from the newest evaluation that has it; parts of groups and rows trained on left out."""
    latest = {
        (name, e.rows.get(name)): (e, name, task)
        for e in evaluations
        for name, task in e.tasks.items()
        if task.member_of is None and not task.seen
    }
    yield from latest.values()


def metrics_of(scores: dict[str, Any]) -> list[str]:
    """Names of a task's metrics in results.json, in the order in which the run wrote them."""
    named = {**scores.get("base", {}), **scores.get("tuned", {})}
    return [key for key, value in named.items() if number(value) is not None and key not in COUNTS]


def trained(run: RunRecord, task: str) -> bool:
    """Whether a task asks what the training rows teach."""
    return task.startswith("final_answer") or (run.of_gsm8k and task.startswith("gsm8k"))


def _own(run: RunRecord, task: str, scores: dict[str, dict[str, Any]]) -> Iterator[Score]:
    change = paired(run.answers.get(task, []))
    for i, metric in enumerate(metrics_of(scores)):
        sides = {
            side: Result(of[metric], of.get(f"{metric}_interval"), of.get("invalid"), of.get("truncated"))
            for side, of in scores.items()
            if metric in of
        }
        documents = (scores.get("tuned") or scores.get("base") or {}).get("problems")
        fits = change and metric == "exact_match" and _agrees(change, sides)
        yield Score(OWN, task, metric, i == 0, True, _protocol(run), documents, sides.get("base"), sides.get("tuned"),
                    change if fits else None)  # fmt: skip


def _agrees(change: Change, sides: dict[str, Any]) -> bool:
    """Whether the answers problem by problem are those that were scored: a file may be of another run, or cut."""
    return all(
        side in sides and abs(sides[side].value - value) < 1e-6
        for side, value in (("base", change.first), ("tuned", change.second))
    )


def paired(problems: Sequence[Problem]) -> Change | None:
    """Base against tuned over the problems that both answered."""
    both = [problem for problem in problems if problem.base and problem.tuned]
    if not both:
        return None
    found = vars(compare([p.base.right for p in both], [p.tuned.right for p in both]))
    return Change(**{name: found[name] for name in Change.__dataclass_fields__})


def _protocol(run: RunRecord) -> str:
    template, limit = run.fact("data.template") or run.setting("data.template"), run.setting("eval.max_new_tokens")
    return (
        f"asked as training asked it (template {template if isinstance(template, str) else UNKNOWN}), greedy, at most "
        f"{whole(limit)} new tokens; the first {STRICT.pattern} is compared as text with the reference's"
    )


def _evaluated(run: RunRecord, evaluation: Evaluation, name: str, task: Task) -> Iterator[Score]:
    metrics = dict.fromkeys(metric for side in task.sides.values() for metric in side.metrics)
    for metric in metrics:
        sides = {side: _side(of, metric) for side, of in task.sides.items() if metric in of.metrics}
        yield Score(
            f"evaluations/{evaluation.name}", name, metric, metric == task.primary, trained(run, name),
            protocol(task.protocol), task.documents, sides.get("base"), sides.get("tuned"), task.comparisons.get(metric),
            evaluation.rows.get(name),
        )  # fmt: skip


def _side(side: Side, metric: str) -> Result:
    of = side.metrics[metric]
    return Result(of.value, of.interval, side.invalid.get(metric.partition(",")[2]), side.truncated)


def protocol(told: dict[str, Any]) -> str:
    """How a task was asked, in one line."""
    words = {"shots": "shots", "decoding": "", "max_new_tokens": "new tokens at most", "samples": "samples", "vote": "",
             "template": "template", "seed": "seed"}  # fmt: skip
    parts = [str(told.get("protocol", "protocol not told"))[:200]]
    for key, name in words.items():
        value = told.get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            parts.append(f"{name} {value}".strip() if key in ("template", "seed") else f"{value} {name}".strip()[:200])
    if told.get("chat_template") is True:
        parts.append("through the chat template")
    if number(told.get("cut_prompts")):
        parts.append(f"{whole(told['cut_prompts'])} prompts lost their head: not as published")
    return ", ".join(parts)


def blocks(run: RunRecord, scores: Sequence[Score]) -> list[Block]:
    """The table of scores, how each was asked, the flips, second passes, and what others published."""
    if not scores:
        said = Text(("None: ", Code("eval.tasks"), " was empty, or the run has not come to them."))
        return [said, *_published(run, scores)]
    rows = [_row(score) for score in scores]
    head = ("", "Base", "Tuned", "Δ", "p", "Invalid", "Truncated", "n")
    head = [f"{name}, %" if name in ("Invalid", "Truncated") else name for name in head]
    kept = [0] + [i for i in range(1, len(head)) if any(row[i] for row in rows)]
    table = Table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])
    seen = "data" in run.config and not (run.setting("data.test_split") or run.setting("data.test_files"))
    warned = [Text(VALIDATION_NOTE)] if seen and any(score.source == OWN for score in scores) else []
    return [table, Text(NOTE), *warned, *_protocols(scores), *_flips(scores), *_refined(run), *_published(run, scores)]


def _row(score: Score) -> list[Inline]:
    change, scale = score.change, 100 if score.percent else 1
    delta = p = ""
    if change:
        low, high = change.difference_interval
        delta = f"{signed(change.difference * scale, 1)} ({signed(low * scale, 1)} to {signed(high * scale, 1)})"
        p = p_value(change.p_value).removeprefix("p = ").removeprefix("p ")
    sides = (score.base, score.tuned)
    return [
        [Code(score.label), " ", Code(score.metric.removesuffix(",none"))],
        *(_value(side, score.percent) for side in sides),
        delta,
        p,
        *(_arrow([side and getattr(side, name) for side in sides]) for name in ("invalid", "truncated")),
        whole(score.documents),
    ]


def _value(side: Result | None, percent: bool) -> str:
    if side is None:
        return ""
    value, interval = side.value, side.interval
    if not percent:
        return f"{value:,.4g}" + (f" ({interval[0]:,.4g} to {interval[1]:,.4g})" if interval else "")
    return share(value) + (f" ({between(*interval).removesuffix(' %')})" if interval else "")


def _arrow(shares: Sequence[float | None]) -> str:
    return " → ".join(share(value).removesuffix(" %") for value in shares if value is not None)


def _protocols(scores: Sequence[Score]) -> list[Block]:
    """How each task was asked, and where the figures lie."""
    asked = {(score.label, score.source): score.protocol for score in scores}
    return [Bullets([[Code(task), f": {words}. From {source}."] for (task, source), words in asked.items()])]


def _flips(scores: Sequence[Score]) -> list[Block]:
    rows = [
        ([Code(s.label), " ", Code(s.metric.removesuffix(",none"))],
         *(whole(v) for v in (c.both_right, c.wrong_to_right, c.right_to_wrong, c.both_wrong)),
         "" if c.detectable is None else f"{c.detectable * 100:.1f} points")
        for s in scores if s.primary and (c := s.change) and c.both_right is not None
    ]  # fmt: skip
    if not rows:
        return []
    head = ("", "Both right", "Wrong → right", "Right → wrong", "Both wrong", "Detectable")
    note = (
        "Detectable is the difference that so many documents with so many flips show with 80 % power at the 5 % level."
    )
    return [Heading(3, "What flipped, base to tuned"), Table(head, rows), Text(note)]


def _refined(run: RunRecord) -> list[Block]:
    """Self-refinement: the second pass against the first."""
    rows = []
    for _, name, task in newest(run.measured):
        for side, metrics in task.refinement.items():
            found = metrics.get(task.primary)
            if found and found.first is not None and found.second is not None:
                rows.append(([Code(name), f", {side}"], share(found.first), share(found.second),
                             whole(found.wrong_to_right), whole(found.right_to_wrong), points(found.difference),
                             p_value(found.p_value).removeprefix("p = ").removeprefix("p ")))  # fmt: skip
    if not rows:
        return []
    head = ("", "First pass", "Second pass", "Wrong → right", "Right → wrong", "Δ", "p")
    return [Heading(3, "Self-refinement: a second pass after a request to check"), Table(head, rows)]


def benchmarks(run: RunRecord, scores: Sequence[Score]) -> list[str]:
    """The benchmarks that this run is about: its data's, and those of its evaluations."""
    named = ["GSM8K"] if run.of_gsm8k else []
    named += [published.TASKS[s.task] for s in scores if s.task in published.TASKS]
    return list(dict.fromkeys(named))


def cited(run: RunRecord, scores: Sequence[Score]) -> tuple[list[published.Score], list[tuple[str, str]]]:
    """Published scores of the base and of models tuned from it, and benchmarks for which none is published."""
    model = run.setting("model.name") or run.fact("model.name")
    if not isinstance(model, str):
        return [], []
    about = benchmarks(run, scores)
    found = [s for s in published.of_model(model) + published.of_base(model) if not about or s.benchmark in about]
    gaps = [(b, words) for b in about if (words := published.unpublished(model, b))]
    return found, gaps


def _published(run: RunRecord, scores: Sequence[Score]) -> list[Block]:
    found, gaps = cited(run, scores)
    if not found and not gaps:
        return []
    rows = [(Code(s.model), s.benchmark, f"{s.value:g}", s.protocol, s.source) for s in found]
    table = [Table(("Model", "Benchmark", "%", "Protocol", "Source"), rows, words=(1, 3, 4))] if rows else []
    note = "Scores compare only where the protocol is the same: shots, prompt, tokens allowed and how answers are read."
    missing = [Bullets([f"{benchmark}: {words}." for benchmark, words in gaps])] if gaps else []
    return [Heading(3, "Published scores of this base and of models tuned from it"), *table, *missing, Text(note)]


def told(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """JSON-ready."""
    found = []
    for score in scores:
        sides = {name: side and plain(side._asdict()) for name, side in (("base", score.base), ("tuned", score.tuned))}
        found.append(plain(score) | sides)
    return found
