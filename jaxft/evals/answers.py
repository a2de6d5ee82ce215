"""Final answers: what a generated solution says after `####`, compared with the reference's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxft.evals.statistics import wilson

FINAL = re.compile(r"#### (-?[0-9.,]+)")  # as lm-evaluation-harness's strict-match of gsm8k


@dataclass(frozen=True)
class Scored:
    """One problem with its generated solution; `found` is None where the solution has no final answer."""

    prompt: str
    reference: str
    answer: str
    expected: str | None
    found: str | None

    @property
    def right(self) -> bool:
        """Whether the final answers are the same string, after removing thousands separators and a last full stop."""
        return self.found is not None and self.found == self.expected


def final_answer(text: str) -> str | None:
    """The first final answer in `text`, normalised; None without one."""
    match = FINAL.search(text)
    return match[1].replace(",", "").rstrip(".") if match else None


def score(prompts: Sequence[str], references: Sequence[str], answers: Sequence[str]) -> list[Scored]:
    """Pairs every generated answer with its reference."""
    return [Scored(p, r, a, final_answer(r), final_answer(a)) for p, r, a in zip(prompts, references, answers)]


def summary(scored: Sequence[Scored], examples: int = 3) -> dict[str, Any]:
    """exact_match with its 95 % Wilson interval, the share without a final answer, and the first few problems."""
    right = sum(s.right for s in scored)
    low, high = wilson(right, len(scored))
    return {
        "exact_match": right / max(1, len(scored)),
        "exact_match_interval": [low, high],
        "invalid": sum(s.found is None for s in scored) / max(1, len(scored)),
        "problems": len(scored),
        "examples": [asdict(s) | {"right": s.right} for s in scored[:examples]],
    }
