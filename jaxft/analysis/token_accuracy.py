"""Teacher-forced next-token accuracy: how often the next token is right when all before it are given. Not task accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.analysis.gsm8k.arithmetic import ANNOTATION, NUMBER
from jaxft.analysis.statistics import bootstrap
from jaxft.errors import UserError

LABEL = "teacher-forced next-token accuracy, not task accuracy"
NGRAM_ACCURACY = 0.40
"""What counts of up to six tokens in a row score on GSM8K's test answers, without any network: the commonest continuation in
its training answers of the longest context that occurs there. 0.392 with Llama 3's tokens, 0.411 with Llama 2's."""


@dataclass(frozen=True)
class TokenAccuracy:
    """Over the supervised tokens of the same rows at two times (start: the base model).

    `start`, `end`: Σ correct / Σ tokens; `change` = end - start with its 95 % paired bootstrap interval over rows.
    `rows_*`: the mean over rows of each row's own share. `all_right_*`: the share of rows whose every token is right.
    Rows without a counted token are left out.
    """

    rows: int
    tokens: int
    start: float
    end: float
    change: float
    change_interval: tuple[float, float]
    rows_start: float
    rows_end: float
    all_right_start: float
    all_right_end: float


def measure(
    start: Sequence[Sequence[bool]],
    end: Sequence[Sequence[bool]],
    counted: Sequence[Sequence[bool]] | None = None,
    *,
    seed: int = 0,
) -> TokenAccuracy:
    """From a list per row of whether each supervised token was right; `counted` chooses tokens, as `masks` gives them."""
    if counted is None:
        counted = [[True] * len(row) for row in start]
    if not len(start) == len(end) == len(counted) or any(
        not len(a) == len(b) == len(c) for a, b, c in zip(start, end, counted)
    ):
        raise UserError("token accuracy needs the same rows and tokens at both times")
    kept = [np.asarray(c, bool) for c in counted]
    right = [[int(np.asarray(row, bool)[k].sum()) for row, k in zip(rows, kept)] for rows in (start, end)]
    return of_counts(*right, [int(k.sum()) for k in kept], seed=seed)


def of_counts(start: Sequence[int], end: Sequence[int], tokens: Sequence[int], *, seed: int = 0) -> TokenAccuracy:
    """The same from each row's number of right tokens at both times, and its number of counted tokens."""
    if not len(start) == len(end) == len(tokens):
        raise UserError("token accuracy needs the same rows at both times")
    sizes, right = np.asarray(tokens, np.float64), np.asarray([start, end], np.float64)
    right, sizes = right[:, sizes > 0], sizes[sizes > 0]
    if not len(sizes):
        raise UserError("token accuracy needs at least one counted token")
    found = bootstrap(right[1] - right[0], sizes, seed=seed)
    share, by_row, whole = right.sum(1) / sizes.sum(), (right / sizes).mean(1), (right == sizes).mean(1)
    return TokenAccuracy(
        rows=len(sizes),
        tokens=int(sizes.sum()),
        start=float(share[0]),
        end=float(share[1]),
        change=found.value,
        change_interval=(found.low, found.high),
        rows_start=float(by_row[0]),
        rows_end=float(by_row[1]),
        all_right_start=float(whole[0]),
        all_right_end=float(whole[1]),
    )


def masks(answer: str, offsets: Sequence[tuple[int, int]]) -> dict[str, list[bool]]:
    """Which tokens of an answer count, by their character offsets (as a tokenizer's `return_offsets_mapping`).

    no annotations: all that have no character in `<<…>>` (an annotation's result is written twice, so half of it is a
    copy). final answer: those with a character of the number after `####`.
    """
    annotations = [match.span() for match in ANNOTATION.finditer(answer)]
    end = answer.find("####")
    number = NUMBER.search(answer, end + 4) if end >= 0 else None
    final = [] if number is None else [number.span()]

    def within(spans: list[tuple[int, int]], token: tuple[int, int]) -> bool:
        return any(token[0] < high and token[1] > low for low, high in spans)

    return {
        "no annotations": [not within(annotations, token) for token in offsets],
        "final answer": [within(final, token) for token in offsets],
    }
