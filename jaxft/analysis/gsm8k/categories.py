"""What makes a GSM8K problem hard, read from its question and its reference solution alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from jaxft.analysis.gsm8k import units
from jaxft.analysis.gsm8k.arithmetic import ANNOTATION, NUMBER, value

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {word: i for i, word in enumerate(_ONES.split())} | {w: 10 * i for i, w in enumerate(_TENS.split(), 2)}
_LARGE = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_SPELLED = re.compile(rf"\b(?:{'|'.join([*_SMALL, *_LARGE])})(?:(?:[ -]|\b and )(?:{'|'.join([*_SMALL, *_LARGE])}))*\b")

WORDS = {
    "percent": r"%|percent",
    "fraction words": r"half|halves|twice|thrice|double|triple|third|quarter|fourth|fifth|\d/\d",
    "rate": r"\b(?:per|each|every|a day|an hour|a week)\b",
    "comparison": r"\bthan\b|\bas (?:many|much) as\b",
    "age": r"years? old|\bage\b|older|younger",
    "ratio": r"\bratio\b",
}
_WORDS = {name: re.compile(pattern) for name, pattern in WORDS.items()}
_UNKNOWN = re.compile(
    r"\b\d*[a-zA-Z]\s*(?:=(?!\s*<<\S+=)|[-+]\s*\d*[a-zA-Z]?\b\s*=)|\blet \w+ (?:be|=|represent|equal)", re.I
)
LENGTHS = (30, 45, 60)
"""Words of a question where a class of length ends; about the quartiles of GSM8K's test set."""


@dataclass(frozen=True)
class Problem:
    """Features of one problem; numbers are exact.

    steps: calculator annotations, or the lines before `####` where there is none. operators: those between two numbers
    left of `=` in annotations. hidden: numbers of an annotation's left side that the question does not name (in digits or
    number words) and that are no earlier result. mixed_units: the dimensions of which the question names two units.
    conversions: hidden numbers that convert units of such a dimension. unused: numbers of the question that no
    annotation has on its left side. decimals: an annotation's result has a decimal point. unannotated_end: the
    last annotation's result is not the final answer (a last step without annotation, or a wrong label).
    """

    steps: int
    annotated: bool
    operators: frozenset[str]
    mixed_units: tuple[str, ...]
    hidden: tuple[Fraction, ...]
    conversions: tuple[Fraction, ...]
    words: frozenset[str]
    algebra: bool
    decimals: bool
    answer: Fraction | None
    question_words: int
    numbers: int
    unused: int
    unannotated_end: bool


def problem(question: str, answer: str) -> Problem:
    """Reads the features of a problem in GSM8K's format: annotations `<<48/2=24>>`, and `#### N` at the end."""
    solution, _, final = answer.partition("####")
    steps = [tuple(map(str.strip, text.rpartition("=")[::2])) for text in ANNOTATION.findall(solution)]
    lines = [line for line in solution.split("\n") if line.strip()]
    asked = numbers_of(question)
    used = {value(n) for left, _ in steps for n in NUMBER.findall(left)}
    hidden = _hidden(steps, asked)
    mixed = {dimension: held for dimension, held in units.named(question).items() if len(held) > 1}
    result, last = _single(final), _single(steps[-1][1]) if steps else None
    lower = question.lower()
    return Problem(
        steps=len(steps) or len(lines),
        annotated=bool(steps),
        operators=frozenset(op for left, _ in steps for op in re.findall(r"[\d.)%]\s*([-+*/])", left.split("=")[0])),
        mixed_units=tuple(mixed),
        hidden=hidden,
        conversions=tuple(sorted(set(hidden) & units.factors(mixed))),
        words=frozenset(name for name, pattern in _WORDS.items() if pattern.search(lower)),
        algebra=bool(_UNKNOWN.search(ANNOTATION.sub("", solution))),
        decimals=any("." in right for _, right in steps),
        answer=result,
        question_words=len(question.split()),
        numbers=len(asked),
        unused=len(asked - used),
        unannotated_end=bool(steps) and last != result,
    )


def numbers_of(question: str) -> set[Fraction]:
    """The numbers that a text names, in digits or in words (twenty-five, two hundred); twice or half name none."""
    lower = question.lower()
    return {value(n) for n in NUMBER.findall(lower)} | {_spelled(m[0]) for m in _SPELLED.finditer(lower)}


def _spelled(text: str) -> Fraction:
    total = part = 0
    for word in re.findall(r"[a-z]+", text):
        if word in _LARGE:
            part = max(1, part) * _LARGE[word]
            if word != "hundred":
                total, part = total + part, 0
        else:
            part += _SMALL.get(word, 0)
    return Fraction(total + part)


def _hidden(steps: list[tuple[str, str]], asked: set[Fraction]) -> tuple[Fraction, ...]:
    known, found = set(asked), []
    for left, right in steps:
        found += [value(n) for n in NUMBER.findall(left) if value(n) not in known]
        known |= {value(n) for n in NUMBER.findall(right)}
    return tuple(sorted(set(found)))


def _single(text: str) -> Fraction | None:
    match = NUMBER.search(text)
    return None if match is None else value(match[0]) * (-1 if "-" in text[: match.start()] else 1)


def classes(found: Problem) -> dict[str, str]:
    """Dimension -> the class of this problem: what a table of categories is made of. Yes-or-no dimensions have yes, no."""
    kinds = len(found.operators)
    yes_no = {
        "unit conversion": bool(found.conversions),
        "mixed units": bool(found.mixed_units),
        "hidden constant": bool(found.hidden),
        **{name: name in found.words for name in WORDS},
        "algebra": found.algebra,
        "decimals in steps": found.decimals,
        "negative answer": found.answer is not None and found.answer < 0,
    }
    return {
        "steps": "1–2" if found.steps <= 2 else str(found.steps) if found.steps <= 5 else "6+",
        "kinds of operator": str(kinds) if kinds else "none",
        "magnitude of the answer": _magnitude(found.answer),
        "words in the question": _length(found.question_words),
        "unused numbers": str(found.unused) if found.unused < 2 else "2+",
        **{name: "yes" if held else "no" for name, held in yes_no.items()},
    }


def _magnitude(answer: Fraction | None) -> str:
    if answer is None:
        return "none"
    bounds = {"0–9": 10, "10–99": 100, "100–999": 1000, "1,000–9,999": 10_000}
    return next((name for name, bound in bounds.items() if abs(answer) < bound), "10,000+")


def _length(words: int) -> str:
    below = [i for i, bound in enumerate(LENGTHS) if words < bound]
    names = [f"below {LENGTHS[0]}", *(f"{a}–{b - 1}" for a, b in pairwise(LENGTHS)), f"{LENGTHS[-1]}+"]
    return names[below[0]] if below else names[-1]


def of_rows(rows: list[Mapping[str, str]]) -> list[dict[str, str]]:
    """The classes of each row (`question`, `answer`)."""
    return [classes(problem(row["question"], row["answer"])) for row in rows]
