"""What a run writes beside its metrics, as records: losses per example, answers per problem, phases of time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jaxft.reports.fitting import Fitter

MOST_BYTES = 1 << 30  # of one file; beyond it, it is not read into memory
TIMES = ("base", "best", "end")
Record = TypeVar("Record")


@dataclass(frozen=True)
class Losses:
    """One number of an example at each of TIMES: the base model, the best step, the end."""

    base: float
    best: float
    end: float


@dataclass(frozen=True)
class Part:
    """The tokens of one kind in an example, and how many of them were right."""

    tokens: int
    correct: Losses


@dataclass(frozen=True)
class Example:
    """A line of examples.jsonl: a validation row, or one of the probe's training rows. `nll` are sums in nats."""

    split: str
    row: str
    question: str
    answer: str
    tokens: int
    nll: Losses
    correct: Losses
    bytes: int = 0
    cut: bool = False
    kinds: dict[str, Part] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether the numbers can be what they say."""
        return (
            self.split in ("validation", "probe")
            and 0 < self.tokens < 10**9
            and 0 <= self.bytes < 10**12
            and all(0 <= getattr(self.nll, at) < 1e12 for at in TIMES)
            and all(0 <= getattr(self.correct, at) <= self.tokens for at in TIMES)
        )


@dataclass(frozen=True)
class Reply:
    """A model's answer to a problem."""

    text: str
    right: bool
    cut: bool | None = None
    found: str | None = None


@dataclass(frozen=True)
class Problem:
    """A line of tasks_*.jsonl."""

    doc: int
    question: str
    reference: str
    base: Reply | None = None
    tuned: Reply | None = None


@dataclass(frozen=True)
class Phase:
    """A line of goodput.jsonl."""

    phase: str
    seconds: float
    start: str | None = None


def examples(folder: Path, damage: list[str]) -> list[Example]:
    """examples.jsonl; [] where there is none."""
    return _lines(folder / "examples.jsonl", Example, damage, lambda example: example.sound)


def answers(folder: Path, damage: list[str]) -> dict[str, list[Problem]]:
    """Task -> its problems with both models' answers, of every tasks_*.jsonl."""
    files = found(folder, "tasks_*.jsonl", damage)
    read = {file.stem.removeprefix("tasks_"): _lines(file, Problem, damage) for file in files}
    return {task: problems for task, problems in read.items() if problems}


def phases(folder: Path, damage: list[str]) -> list[Phase]:
    """goodput.jsonl; [] where there is none."""
    return _lines(folder / "goodput.jsonl", Phase, damage, lambda phase: phase.seconds >= 0)


def _lines(
    file: Path, kind: type[Record], damage: list[str], sound: Callable[[Record], bool] = lambda record: True
) -> list[Record]:
    """The lines of a file that fit; a file that is not there has none."""
    text = text_of(file, damage) if file.exists() or file.is_symlink() else None
    fit = Fitter()
    written = [line for line in (text or "").split("\n") if line.strip()]
    read = [fit.one(kind, parsed(line)) for line in written]
    kept = [record for record in read if record is not None and sound(record)]
    if len(kept) < len(written):
        damage.append(f"{file.name} is damaged: {len(written) - len(kept)} of {len(written)} lines left out")
    return kept


def object_of(file: Path, damage: list[str], name: str | None = None) -> dict[str, Any] | None:
    """A file's JSON object; None, and a word in `damage`, where it cannot be had."""
    name = name or file.name
    text = text_of(file, damage, name)
    value = None if text is None else parsed(text)
    if text is not None and not isinstance(value, dict):
        damage.append(f"{name} is damaged: not a JSON object")
    return value if isinstance(value, dict) else None


def found(folder: Path, pattern: str, damage: list[str]) -> Sequence[Path]:
    """Files of a folder by a pattern, in the order of their names."""
    try:
        return sorted(folder.glob(pattern)) if folder.is_dir() else []
    except OSError as error:
        damage.append(f"{folder.name} cannot be read: {error.strerror}")
        return []


def text_of(file: Path, damage: list[str], name: str | None = None) -> str | None:
    """A file's text; None, and a word in `damage`, where it cannot be had."""
    name = name or file.name
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            damage.append(f"{name} is not read: it has {size:,} bytes")
            return None
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        damage.append(f"{name} is missing")
    except OSError as error:
        damage.append(f"{name} cannot be read: {error.strerror}")
    return None


def parsed(text: str) -> Any:
    """JSON, or None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def of_split(found: Iterable[Example], split: str) -> list[Example]:
    """The validation rows, or the probe's."""
    return [example for example in found if example.split == split]
