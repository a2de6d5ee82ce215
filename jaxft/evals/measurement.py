"""One task measured on one or two sides of a model, document by document, and what is computed from that."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jaxft.analysis import hardness
from jaxft.analysis.comparison import Measured, compare
from jaxft.analysis.gsm8k import categories, mistakes
from jaxft.analysis.gsm8k.answers import INVALID
from jaxft.analysis.gsm8k.mistakes import Mistake
from jaxft.analysis.statistics import bootstrap, standard_error, wilson
from jaxft.errors import UserError
from jaxft.evals.subject import BASE, TUNED


@dataclass(frozen=True)
class Document:
    """One question. `prompt_sha256` is of the whole prompt's text; `classes` is its class in every dimension, if known."""

    id: int
    prompt_sha256: str
    question: str
    reference: str
    classes: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Answer:
    """What one side answered to one document.

    `output` is the text, the texts of several samples, or the log-likelihoods of the choices. `values` has a number per
    metric ("exact_match,strict-match"), `weights` what it is divided by where that is not 1 (words, for a perplexity).
    `found` has what each extractor read in the output. `first` is the answer of self-refinement's first pass.
    """

    output: Any
    values: Mapping[str, float]
    weights: Mapping[str, float] = field(default_factory=dict)
    found: Mapping[str, str] = field(default_factory=dict)
    truncated: bool | None = None
    mistake: Mistake | None = None
    first: Answer | None = None


@dataclass(frozen=True)
class Side:
    """One side's answers in the documents' order, the seconds that they took, and the tokens generated (0: none were)."""

    answers: Sequence[Answer]
    seconds: float
    tokens: int
    results: Mapping[str, Any]
    """The task's entry under `results`, as lm-evaluation-harness shapes it."""


@dataclass(frozen=True)
class Measurement:
    """`protocol` says how it was asked, JSON-ready; `metrics` are keys with whether more is better, the first one counts
    in the panel. `clusters` are documents that are drawn together (MMLU's subjects, DROP's passages). `group` says that
    this is the whole of several tasks, `member_of` is the group whose part the task is, `seen` that training saw the rows."""

    task: str
    backend: str
    protocol: Mapping[str, Any]
    documents: Sequence[Document]
    sides: Mapping[str, Side]
    metrics: Mapping[str, bool]
    clusters: Sequence[str] | None = None
    group: bool = False
    member_of: str | None = None
    seen: bool = False
    chance: float | None = None

    @property
    def primary(self) -> str:
        """The metric that stands for the task."""
        return next(iter(self.metrics))

    @property
    def paired(self) -> bool:
        """Whether base and tuned were both measured."""
        return {BASE, TUNED} <= self.sides.keys()

    def values(self, side: str, metric: str) -> np.ndarray:
        """float64 `[documents]`."""
        return np.array([answer.values[metric] for answer in self.sides[side].answers], np.float64)

    def weights(self, side: str, metric: str) -> np.ndarray | None:
        """float64 `[documents]`; None where each counts 1."""
        given = [answer.weights.get(metric) for answer in self.sides[side].answers]
        return None if None in given else np.array(given, np.float64)

    def right_or_wrong(self, metric: str) -> bool:
        """Whether every document has 0 or 1."""
        return all(
            self.weights(side, metric) is None and np.isin(self.values(side, metric), (0, 1)).all()
            for side in self.sides
        )


def sha256(text: str) -> str:
    """As lm-evaluation-harness hashes prompts; half a surrogate pair, at which it fails, counts as its escape."""
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def check_pairs(measurement: Measurement) -> None:
    """Raises UserError where a value is no number: a model that gives NaN has the best choice everywhere."""
    for name, side in measurement.sides.items():
        for document, answer in zip(measurement.documents, side.answers, strict=True):
            numbers = [*answer.values.values(), *(answer.output if _numbers(answer.output) else ())]
            if not np.isfinite(numbers).all():
                raise UserError(
                    f"{measurement.task}: document {document.id}: the {name} model gives {numbers}, which is not finite; "
                    "check its weights, or load it with --dtype float32"
                )


def _numbers(output: Any) -> bool:
    return isinstance(output, list) and all(isinstance(value, float) for value in output)


def shares(measurement: Measurement, side: str) -> dict[str, Any]:
    """One side in numbers: each metric with its interval and standard error, invalid and truncated shares, speed."""
    found = measurement.sides[side]
    n = len(found.answers)
    known = [answer.truncated for answer in found.answers if answer.truncated is not None]
    extractors = dict.fromkeys(name for answer in found.answers for name in answer.found)
    votes = {e: [text for a in found.answers for text in _texts(a.found.get(e, ""))] for e in extractors}
    return {
        "metrics": {metric: _metric(measurement, side, metric) for metric in measurement.metrics},
        "invalid": {name: texts.count(INVALID) / len(texts) for name, texts in votes.items()},
        "truncated": sum(known) / len(known) if known else None,
        "documents": n,
        "generated_tokens": found.tokens,
        "seconds": round(found.seconds, 3),
        "tokens_per_second": round(found.tokens / found.seconds, 1) if found.tokens and found.seconds else None,
    }


def _texts(found: Any) -> list[str]:
    return [found] if isinstance(found, str) else list(found)


def _metric(measurement: Measurement, side: str, metric: str) -> dict[str, Any]:
    values, weights = measurement.values(side, metric), measurement.weights(side, metric)
    if measurement.right_or_wrong(metric):
        right, n = int(values.sum()), len(values)
        return {"value": right / n, "interval": list(wilson(right, n)), "interval_kind": "Wilson 95 %",
                "stderr": standard_error(values) if n > 1 else None}  # fmt: skip
    estimate = bootstrap(values, weights, clusters=measurement.clusters)
    return {"value": estimate.value, "interval": [estimate.low, estimate.high], "interval_kind": "bootstrap 95 %",
            "stderr": standard_error(values) if weights is None and len(values) > 1 else None}  # fmt: skip


def comparisons(measurement: Measurement) -> dict[str, Any]:
    """For each metric base against tuned: the flip table, paired interval and exact McNemar where documents are right or
    wrong; else the difference with its paired bootstrap interval."""
    if not measurement.paired:
        return {}
    found = {}
    for metric in measurement.metrics:
        base, tuned = (measurement.values(side, metric) for side in (BASE, TUNED))
        if measurement.right_or_wrong(metric):
            found[metric] = asdict(compare(base == 1, tuned == 1, clusters=measurement.clusters))
        else:
            weights = measurement.weights(BASE, metric)
            estimate = bootstrap(tuned - base, weights, clusters=measurement.clusters)
            found[metric] = {"documents": len(base), "difference": estimate.value,
                             "difference_interval": [estimate.low, estimate.high]}  # fmt: skip
    return found


def of_panel(measurement: Measurement) -> Measured:
    """The task as a row of the regression panel."""
    metric = measurement.primary
    return Measured(
        task=measurement.task,
        protocol=metric,
        base=measurement.values(BASE, metric).tolist(),
        tuned=measurement.values(TUNED, metric).tolist(),
        weights=None if (given := measurement.weights(BASE, metric)) is None else given.tolist(),
        clusters=measurement.clusters,
        higher_is_better=measurement.metrics[metric],
        chance=measurement.chance,
    )


def refinements(measurement: Measurement) -> dict[str, Any]:
    """Side -> metric -> the flip table of self-refinement: first is the first pass, second the second one."""
    found: dict[str, Any] = {}
    for name, side in measurement.sides.items():
        if all(answer.first is not None for answer in side.answers):
            found[name] = {
                metric: asdict(
                    compare(
                        [answer.first.values[metric] == 1 for answer in side.answers],
                        [answer.values[metric] == 1 for answer in side.answers],
                    )
                )
                for metric in measurement.metrics
            }
    return found


def hard_categories(measurement: Measurement) -> list[dict[str, Any]]:
    """A row per category of documents with its interval; three real examples where it stands out."""
    classes = [document.classes for document in measurement.documents]
    if None in classes or not classes or not measurement.right_or_wrong(measurement.primary):
        return []
    last = list(measurement.sides)[-1]
    right = (measurement.values(last, measurement.primary) == 1).tolist()
    base = (measurement.values(BASE, measurement.primary) == 1).tolist() if measurement.paired else None
    rows = []
    for row in hardness.table(classes, right, base):
        shown = hardness.examples(row, classes, right) if row.flag else []
        rows.append(asdict(row) | {"measured": last, "examples": [_example(measurement, last, i) for i in shown]})
    return rows


def _example(measurement: Measurement, side: str, i: int) -> dict[str, Any]:
    document = measurement.documents[i]
    return {"doc_id": document.id, "question": document.question, "reference": document.reference,
            "output": measurement.sides[side].answers[i].output}  # fmt: skip


def mistake_tables(measurement: Measurement) -> dict[str, Any]:
    """Side -> a row per kind of mistake, with up to three real examples."""
    if measurement.backend != "native":
        return {}
    found = {}
    for name, side in measurement.sides.items():
        rows = mistakes.counts([answer.mistake for answer in side.answers])
        for row in rows:
            row["examples"] = [e | _example(measurement, name, e["document"]) for e in row["examples"]]
        found[name] = rows
    return found


def classes_of(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Each row's class in every dimension that GSM8K's form shows."""
    return categories.of_rows(list(rows))


def sample_lines(measurement: Measurement) -> list[dict[str, Any]]:
    """One JSON-ready line per document."""
    lines = []
    for i, document in enumerate(measurement.documents):
        line = {"doc_id": document.id, "prompt_sha256": document.prompt_sha256, "question": document.question,
                "reference": document.reference, "category": document.classes}  # fmt: skip
        lines.append(line | {name: _told(side.answers[i]) for name, side in measurement.sides.items()})
    return lines


def _told(answer: Answer) -> dict[str, Any]:
    told: dict[str, Any] = {
        "output": answer.output, "extracted": dict(answer.found), "values": dict(answer.values),
        "truncated": answer.truncated, "mistake": answer.mistake and asdict(answer.mistake),
    }  # fmt: skip
    if answer.weights:
        told["weights"] = dict(answer.weights)
    return told if answer.first is None else told | {"first_pass": _told(answer.first)}
