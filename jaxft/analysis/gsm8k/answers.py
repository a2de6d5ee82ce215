"""Final answers of GSM8K's kind: extraction and comparison as lm-evaluation-harness 0.4.13 does them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from jaxft.analysis.gsm8k.arithmetic import value
from jaxft.analysis.statistics import wilson

INVALID = "[invalid]"
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")  # deleted from prediction and reference, in this order


@dataclass(frozen=True)
class Extractor:
    """A regular-expression filter: `pick` chooses among all matches, 0 the first, -1 the last."""

    name: str
    pattern: str
    pick: int = 0

    def __call__(self, text: str) -> str:
        """The first group of the match that took part in it, stripped; INVALID without a match."""
        found = re.findall(self.pattern, text)
        if not found:
            return INVALID
        match = found[self.pick]
        return (match if isinstance(match, str) else next(filter(None, match), INVALID)).strip()


STRICT = Extractor("strict-match", r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = Extractor("flexible-extract", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)
# Its last stop is any character: `The answer is 18` at the end of a text gives 1, and `The answer is 8` nothing.
COT_STRICT = Extractor("strict-match", r"The answer is (\-?[0-9\.\,]+).")
COT_VOTE = Extractor("vote", r"The answer is (\-?[0-9\.\,]*[0-9]+)")


def comparable(text: str) -> str:
    """`text` as exact_match compares it: IGNORED deleted, lower case. 18 and 18.0 stay different."""
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


def exact_match(found: str, reference: str) -> bool:
    """Whether an extracted answer is the reference's final one, as text."""
    return comparable(found) == comparable(reference)


def number(text: str) -> Fraction | None:
    """The value of an extracted answer ($18.00 is 18), exactly; None where it is not a number."""
    plain = comparable(text).strip()
    if not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", plain, re.ASCII):
        return None
    return value(plain.removeprefix("-")) * (-1 if plain.startswith("-") else 1)


def same_number(found: str, reference: str) -> bool:
    """Whether both are numbers and equal: more lenient than exact_match, for a column beside it."""
    value = number(found)
    return value is not None and value == number(reference)


@dataclass(frozen=True)
class Scored:
    """One problem with its generated solution; `found` is None where the solution has no final answer.

    `truncated` says that the solution was cut at the limit of new tokens; None where nobody looked.
    """

    prompt: str
    reference: str
    answer: str
    expected: str | None
    found: str | None
    truncated: bool | None = None

    @property
    def right(self) -> bool:
        """Whether the final answers are the same string, by exact_match's rules."""
        return self.found is not None and self.found == self.expected


def final_answer(text: str) -> str | None:
    """The first final answer in `text` by STRICT, as exact_match compares it; None without one."""
    found = STRICT(text)
    return None if found == INVALID else comparable(found)


def score(
    prompts: Sequence[str],
    references: Sequence[str],
    answers: Sequence[str],
    truncated: Sequence[bool] | None = None,
) -> list[Scored]:
    """Pairs every generated answer with its reference."""
    cut = [None] * len(answers) if truncated is None else truncated
    return [
        Scored(p, r, a, final_answer(r), final_answer(a), c) for p, r, a, c in zip(prompts, references, answers, cut)
    ]


def summary(scored: Sequence[Scored], examples: int = 3) -> dict[str, Any]:
    """exact_match with its 95 % Wilson interval, the share without a final answer, and the first few problems.

    `truncated`, the share of solutions cut at the limit of new tokens, is there where it is known.
    """
    right = sum(s.right for s in scored)
    low, high = wilson(right, len(scored))
    known = [s.truncated for s in scored if s.truncated is not None]
    return {
        "exact_match": right / max(1, len(scored)),
        "exact_match_interval": [low, high],
        "invalid": sum(s.found is None for s in scored) / max(1, len(scored)),
        **({"truncated": sum(known) / len(known)} if known else {}),
        "problems": len(scored),
        "examples": [_told(s) for s in scored[:examples]],
    }


def problems(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Each problem by its number (`doc`), JSON-ready, with the solution's `text`, what was `found` in it, whether that is
    `right`, and whether the solution was `cut` (None where nobody looked)."""
    return [
        {
            "doc": number, "question": of.prompt, "reference": of.reference,
            "text": of.answer, "right": of.right, "cut": of.truncated, "found": of.found,
        }
        for number, of in enumerate(scored)
    ]  # fmt: skip


def _told(scored: Scored) -> dict[str, Any]:
    told = asdict(scored) | {"right": scored.right}
    return told if scored.truncated is not None else {k: v for k, v in told.items() if k != "truncated"}
