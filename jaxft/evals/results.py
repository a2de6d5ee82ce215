"""The files of an evaluation.

Both kinds are written after each native task, so that what was measured stays when an evaluation is cut short; `command` says
what was asked for. `results.json`, one object:

- `results`: task -> `{"alias", "sample_len", "METRIC,FILTER": value, "METRIC_stderr,FILTER": value}` of the last side measured
  (tuned, where there is an adapter), as lm-evaluation-harness writes it; `base_results` has the base model's where both were
  measured. `versions`, `n-shot`, `configs`, `higher_is_better`, `n-samples`, `group_subtasks`: of the harness's tasks, as it
  gives them.
- `format`: 1. `date`: ISO 8601, UTC. `command`: the arguments. `software`: package -> version. `device`. `seeds`.
- `model`: what was opened (`model`, `commit`, `family`, `dtype`, `quantize`, `held_as`, `config_sha256`, `adapter`,
  `adapter_sha256`, `parameters`).
  `sides`: `["base", "tuned"]`, or one of them. `run`: the run folder whose adapter it is, or null.
- `tasks`: task -> object with
    - `backend` (native or lm-eval), `protocol` (how it was asked: protocol, shots, decoding, stops, template, seeds,
      `cut_prompts`, `prompts_sha256`, `rows_sha256`), `documents`, `primary` (the metric that counts in the panel),
      `member_of` (the group whose part it is, or null), `seen` (whether training saw the rows: no score, no part of the
      panel), `chance` (what guessing scores, or null)
    - `sides`: side -> `metrics` (metric -> `value`, `interval`, `interval_kind`, `stderr`), `invalid` (filter -> share in which
      nothing was found), `truncated` (share cut at the limit of new tokens, or null), `documents`, `generated_tokens`,
      `seconds` (compiling included; for lm-eval those of all its tasks together), `tokens_per_second`
    - `comparisons`: metric -> base against tuned as `analysis.comparison.Comparison`: `first` is base, `second` is tuned; for
      metrics that are not right or wrong, `documents`, `difference` and `difference_interval` alone
    - `refinement`: side -> metric -> Comparison of the first pass with the second one; {} for other tasks
    - `categories`: rows as `analysis.hardness.Category`, with `measured` (the side) and `examples` (`doc_id`, `question`,
      `reference`, `output`) where `flag` is set
    - `mistakes`: side -> rows of `analysis.gsm8k.mistakes.counts`, whose examples have the same fields
    - `contamination`: null, or `trained` (questions compared with), `kinds` (`kind`, `documents`, `shared`, `share`,
      `share_interval`, `offenders`: the first 20, `evaluation` and `train` numbers and what is shared), `nearest_similarity`,
      `nearest`, `with_and_without`: exact match of all, of the shared and of the other documents
    - `samples`: the name of the file below; null for a group
- `panel`: a row per task (a group counts once) as `analysis.comparison.PanelRow`; p-values are Holm's over the panel.
- `verdicts`: sentences, one per claim. `published`: scores of this base that were published, each with protocol and source.
- `definitions`: what each quantity means.

`samples_TASK.jsonl`: a line per document with `doc_id`, `prompt_sha256` (as the harness's `prompt_hash`), `question`,
`reference`, `category` (dimension -> class, or null) and for each side an object: `output` (text; texts of several samples;
log-likelihoods of the choices), `extracted` (filter -> what it found), `values` (metric -> number, 1 is right), `truncated`,
`mistake` (`kind`, `evidence`; null where right or not looked for), `weights` (of a perplexity), `first_pass` (of a refinement).
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jaxft import disk
from jaxft.analysis import contamination, published
from jaxft.analysis.comparison import PanelRow, panel
from jaxft.errors import UserError
from jaxft.evals import measurement as measuring
from jaxft.evals.measurement import Measurement
from jaxft.evals.subject import BASE

FORMAT = 1
OFFENDERS = 20
DEFINITIONS = {
    "interval": "of a share of documents: Wilson, 95 %; otherwise percentiles of 10,000 bootstrap resamples of documents (of a "
    "group: of its tasks)",
    "difference": "tuned - base over the same documents with the same prompts; 95 % paired bootstrap interval",
    "p_value": "exact two-sided McNemar on documents that one side alone gets right; in the panel adjusted by Holm",
    "invalid": "share of answers in which the filter finds no final answer; they count as wrong",
    "truncated": "share of answers cut at the limit of new tokens",
    "exact_match": "the extracted final answer equals the reference's as text, by lm-evaluation-harness's rules",
    "equal_number": "the extracted final answer equals the reference's as a number; not a figure of the harness",
    "tokens_per_second": "generated tokens over wall seconds, with compiling",
}


def content(
    measurements: Sequence[Measurement],
    trained: Sequence[str],
    origin: Mapping[str, Any],
    harness: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """results.json; `trained` are the questions of training rows, `harness` what lm-evaluation-harness says of its tasks."""
    sides = list(measurements[0].sides)
    rows = judged(measurements)
    tasks = {m.task: _task(m, trained) for m in measurements}
    of_base = {m.task: dict(m.sides[BASE].results) for m in measurements} if len(sides) > 1 else {}
    return {
        "results": {m.task: dict(m.sides[sides[-1]].results) for m in measurements},
        **({"base_results": of_base} if of_base else {}),
        **harness,
        "format": FORMAT,
        **facts,
        "model": dict(origin),
        "sides": sides,
        "tasks": tasks,
        "panel": [asdict(row) for row in rows],
        "verdicts": verdicts(measurements, rows, tasks),
        "published": _published(str(origin["model"]), measurements),
        "definitions": DEFINITIONS,
    }


def judged(measurements: Sequence[Measurement]) -> list[PanelRow]:
    """The panel: one row for each task on unseen rows that is no part of a group; none without two sides."""
    return panel([measuring.of_panel(m) for m in measurements if m.paired and m.member_of is None and not m.seen])


def _task(measurement: Measurement, trained: Sequence[str]) -> dict[str, Any]:
    return {
        "backend": measurement.backend,
        "protocol": dict(measurement.protocol),
        "documents": len(measurement.documents),
        "primary": measurement.primary,
        "member_of": measurement.member_of,
        "seen": measurement.seen,
        "chance": measurement.chance,
        "sides": {side: measuring.shares(measurement, side) for side in measurement.sides},
        "comparisons": measuring.comparisons(measurement),
        "refinement": measuring.refinements(measurement),
        "categories": measuring.hard_categories(measurement),
        "mistakes": measuring.mistake_tables(measurement),
        "contamination": _contamination(measurement, trained),
        "samples": None if measurement.group else _file_name(measurement),
    }


def _contamination(measurement: Measurement, trained: Sequence[str]) -> dict[str, Any] | None:
    texts = [document.question for document in measurement.documents]
    if not trained or measurement.group or measurement.seen or not any(texts):
        return None
    found = _shared(tuple(trained), tuple(texts))
    last = list(measurement.sides)[-1]
    exact = measurement.right_or_wrong(measurement.primary)
    right = (measurement.values(last, measurement.primary) == 1).tolist()
    kinds = [asdict(sharing) for sharing in found.sharings]
    return {
        "trained": len(trained),
        "kinds": [kind | {"offenders": kind["offenders"][:OFFENDERS]} for kind in kinds],
        "nearest_similarity": found.nearest_similarity,
        "nearest": found.nearest,
        "with_and_without": contamination.with_and_without(found, right) if exact else None,
    }


@functools.lru_cache(maxsize=2)
def _shared(trained: tuple[str, ...], asked: tuple[str, ...]) -> contamination.Contamination:
    """Kept, because several tasks ask the same questions."""
    return contamination.check(trained, asked)


def verdicts(measurements: Sequence[Measurement], rows: Sequence[PanelRow], tasks: Mapping[str, Any]) -> list[str]:
    """One sentence per claim, with its interval and p; then what lessens it."""
    said = []
    for row in rows:
        low, high = row.difference_interval
        near = "; the base does not differ from guessing, so no loss can show" if row.near_chance else ""
        unit = 100 if abs(row.base) <= 1 and abs(row.tuned) <= 1 else 1
        what = "points" if unit == 100 else "in the metric's own unit"
        over = "" if len(rows) == 1 else f" (Holm over {len(rows)} tasks)"
        said.append(
            f"{row.task} {row.protocol}: tuned {row.tuned * unit:.2f} against base {row.base * unit:.2f} on {row.documents:,} "
            f"documents: {row.difference * unit:+.2f} {what} ({low * unit:+.2f} to {high * unit:+.2f}), "
            f"p = {row.p_value:.2g}{over}: {row.verdict}{near}"
        )
    for m in measurements:
        said += [] if m.member_of else _cautions(m, tasks[m.task])
    return said


def _cautions(measurement: Measurement, told: Mapping[str, Any]) -> list[str]:
    said, task = [], measurement.task
    if measurement.seen:
        return [
            f"{task}: {told['documents']:,} rows that training saw: not a score, but what unseen rows are held against"
        ]
    if caution := told["protocol"].get("caution"):
        said.append(caution)
    filters = measurement.primary.partition(",")[2]
    for side, numbers in told["sides"].items():
        invalid, cut = numbers["invalid"].get(filters, 0.0), numbers["truncated"] or 0.0
        if invalid > 0.5:
            said.append(
                f"{task}: {100 * invalid:.0f} % of the {side} model's answers have no readable final answer: its score says "
                "that it does not know the form, not that it cannot solve the problems"
            )
        if cut > 0.05:
            said.append(f"{task}: {100 * cut:.0f} % of the {side} model's answers are cut at the limit of new tokens")
    lost = told["protocol"].get("cut_prompts", 0)
    if lost:
        said.append(
            f"{task}: {lost:,} of {told['documents']:,} prompts do not fit the model's positions and lost their head, shots "
            "first: not the protocol that others publish"
        )
    shared = told["contamination"]
    if shared:
        counts = ", ".join(f"{kind['kind']} {kind['shared']}" for kind in shared["kinds"])
        said.append(
            f"{task}: of {told['documents']:,} questions, shared with {shared['trained']:,} training rows: {counts}"
        )
    return said


def _published(model: str, measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    names = dict.fromkeys(published.TASKS[m.task] for m in measurements if m.task in published.TASKS)
    return [asdict(score) for name in names for score in published.of_model(model, name)]


def software() -> dict[str, str]:
    """Package -> version of what took part."""
    found = {}
    for name in ("jaxft", "jax", "flax", "transformers", "datasets", "lm-eval", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_new(folder: Path) -> None:
    """Raises UserError where the folder holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: exists already; give a new folder")


def write(folder: Path, results: Mapping[str, Any], measurements: Sequence[Measurement]) -> None:
    """Writes both kinds of file; results.json last, so that one that is there is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for measurement in measurements:
        if not measurement.group:
            lines = (json.dumps(_plain(line), ensure_ascii=False) for line in measuring.sample_lines(measurement))
            _write(folder / _file_name(measurement), "".join(f"{line}\n" for line in lines))
    _write(folder / "results.json", json.dumps(_plain(results), indent=2, ensure_ascii=False) + "\n")


def _write(file: Path, text: str) -> None:
    """JSON, in which half a surrogate pair, which is no Unicode text, stands as its escape."""
    disk.write_bytes(file, text.encode("utf-8", "backslashreplace"))


def _file_name(measurement: Measurement) -> str:
    return f"samples_{re.sub(r'[^A-Za-z0-9_.-]', '_', measurement.task)}.jsonl"


def _plain(value: Any) -> Any:
    """JSON-ready: NaN and infinities are null, what JSON does not know is its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
