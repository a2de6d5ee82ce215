"""Why a generated solution is wrong, as far as its text shows: checked, not guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from jaxft.analysis.gsm8k import units
from jaxft.analysis.gsm8k.answers import INVALID, STRICT, Extractor, exact_match, number
from jaxft.analysis.gsm8k.arithmetic import equations
from jaxft.analysis.statistics import wilson

KINDS = {
    "truncated": "cut at the limit of new tokens before a final answer",
    "format": "ends by itself without a readable final answer",
    "notation": "the right number, written so that exact_match counts it as wrong (18.00 for 18)",
    "arithmetic": "at least one equation in it is false, by evaluating both sides",
    "sign": "every equation holds; the answer is the right one with the other sign",
    "rounding": "every equation holds; the answer differs from the right one by less than 1, by rounding or cutting",
    "unit_factor": "every equation holds; the answer is off by a factor that converts units that the question names",
    "plan": "every equation holds, yet the answer is wrong: the wrong quantities were combined",
    "unchecked": "wrong, and no equation could be read in it",
}
"""Kinds of mistake in the order in which they are looked for; the first that fits counts."""


@dataclass(frozen=True)
class Mistake:
    """`kind` is one of KINDS; `evidence` is the text or number that shows it."""

    kind: str
    evidence: str


def mistake(
    question: str,
    reference: str,
    output: str,
    *,
    truncated: bool | None = None,
    extract: Extractor = STRICT,
) -> Mistake | None:
    """What is wrong with a generated solution; None where its final answer is right.

    `truncated` says that the output was cut at the limit of new tokens; without it a missing answer counts as format.
    """
    found = extract(output)
    if exact_match(found, reference):
        return None
    if found == INVALID:
        return Mistake("truncated", output[-80:]) if truncated else Mistake("format", output[-80:])
    value, expected = number(found), number(reference)
    if value is not None and value == expected:
        return Mistake("notation", found)
    checked = equations(output)
    false = [equation.text for equation in checked if not equation.true]
    if false:
        return Mistake("arithmetic", "; ".join(false[:3]))
    if value is None or expected is None:
        return Mistake("format", found)
    all_true = f"{len(checked)} equation{'' if len(checked) == 1 else 's'}, all true"
    return _explained(question, value, expected) or (
        Mistake("plan", all_true) if checked else Mistake("unchecked", found)
    )


def _explained(question: str, value: Fraction, expected: Fraction) -> Mistake | None:
    if value == -expected:
        return Mistake("sign", f"{_shown(value)} for {_shown(expected)}")
    # A whole number beside another is no rounding: one of the two has to have decimals.
    if abs(value - expected) < 1 and (value.denominator > 1 or expected.denominator > 1):
        return Mistake("rounding", f"{_shown(value)} for {_shown(expected)}")
    ratio = value / expected if expected else Fraction(0)
    if ratio in units.factors(units.named(question), least=2):
        return Mistake("unit_factor", f"{_shown(value)} for {_shown(expected)}, {ratio} times")
    return None


def _shown(value: Fraction) -> str:
    if abs(value) >= 10**300 or value.denominator >= 10**300:  # more than a float, or Python's own printing, holds
        return "a number of hundreds of digits"
    return str(value) if value.denominator == 1 else f"{float(value):g}"


def counts(mistakes: Sequence[Mistake | None], examples: int = 3) -> list[dict[str, Any]]:
    """A row per kind that occurs, the commonest first.

    kind, meaning, count, share of all wrong answers with its 95 % Wilson interval, and up to `examples` documents of the
    kind with their evidence, evenly spaced among all of them.
    """
    wrong = [(i, m) for i, m in enumerate(mistakes) if m is not None]
    rows = []
    for kind, meaning in KINDS.items():
        of_kind = [i for i, m in wrong if m.kind == kind]
        if of_kind:
            low, high = wilson(len(of_kind), len(wrong))
            picked = sorted({of_kind[(2 * i + 1) * len(of_kind) // (2 * examples)] for i in range(examples)})
            rows.append(
                {"kind": kind, "meaning": meaning, "count": len(of_kind), "share": len(of_kind) / len(wrong),
                 "share_interval": [low, high],
                 "examples": [{"document": i, **asdict(mistakes[i])} for i in picked]}
            )  # fmt: skip
    return sorted(rows, key=lambda row: -row["count"])
