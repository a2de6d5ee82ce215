"""What validation rows share with training rows: whole rows, and runs of thirteen words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxft.analysis import contamination

if TYPE_CHECKING:
    from jaxft.data.rows import Row

WORDS = contamination.GRAMS[0]


@dataclass(frozen=True)
class Shared:
    """How many validation rows share something with a training row, and the first: origins of both, and what is shared."""

    rows: int
    validation: str = ""
    train: str = ""
    text: str = ""


@dataclass(frozen=True)
class Overlap:
    """`measured` of the validation rows have a turn of at least WORDS words, so that they can share so many."""

    rows: int
    duplicates: Shared
    measured: int
    grams: Shared


def overlap(train: Sequence[Row], validation: Sequence[Row]) -> Overlap:
    """Compares the rows' own text: case and space do not count, for runs of words neither does punctuation.

    System turns are left out of the runs, because rows share theirs by design; a run lies within one turn.
    """
    learnt, learnt_rows = _turns(train)
    held, held_rows = _turns(validation)
    found = contamination.shared_runs(learnt, held, WORDS)
    grams = Shared(0)
    if found:
        turn = min(found)
        row, source = validation[held_rows[turn]], train[learnt_rows[found[turn].train]]
        grams = Shared(len({held_rows[i] for i in found}), row.origin, source.origin, found[turn].shared)
    measured = {row for text, row in zip(held, held_rows, strict=True) if len(re.findall(r"\w+", text)) >= WORDS}
    return Overlap(len(validation), _duplicates(train, validation), len(measured), grams)


def _duplicates(train: Sequence[Row], validation: Sequence[Row]) -> Shared:
    held = {}
    for row in validation:
        held.setdefault(_normalised(row), []).append(row)
    found, first = 0, None
    for row in train:
        same = held.pop(_normalised(row), [])
        found += len(same)
        first = first or (same and (same[0], row)) or None
    if first is None:
        return Shared(0)
    return Shared(found, first[0].origin, first[1].origin, " ".join(_normalised(first[0])))


def _normalised(row: Row) -> tuple[str, ...]:
    return tuple(" ".join(f"{turn.role} {turn.content}".split()).casefold() for turn in row.turns)


def _turns(rows: Sequence[Row]) -> tuple[list[str], list[int]]:
    """The texts of all turns but system ones, and the number of each one's row."""
    of_row = [(turn.content, i) for i, row in enumerate(rows) for turn in row.turns if turn.role != "system"]
    return [text for text, _ in of_row], [i for _, i in of_row]
