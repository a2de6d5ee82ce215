"""What validation rows share with training rows: whole rows, and runs of thirteen words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxft.data.rows import Row

WORDS = 13  # as GPT-3's authors looked for copies of their test sets (Brown et al. 2020, appendix C)
CHUNK = 4096  # training rows looked at together
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


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

    System turns are left out of the runs, because rows share theirs by design.
    """
    vocabulary: dict[str, int] = {}
    held, of_row = _grams(validation, lambda word: vocabulary.setdefault(word, len(vocabulary) + 1))
    sources = _sources(train, np.unique(held), vocabulary)
    hits = np.flatnonzero(np.isin(held, np.array(list(sources), np.uint64)))
    grams = Shared(0)
    if len(hits):
        first = int(hits[0])
        row, source = validation[int(of_row[first])], train[sources[int(held[first])]]
        nth = first - int(np.searchsorted(of_row, of_row[first]))
        grams = Shared(len(np.unique(of_row[hits])), row.origin, source.origin, _gram(row, nth))
    return Overlap(len(validation), _duplicates(train, validation), len(np.unique(of_row)), grams)


def _sources(train: Sequence[Row], held: np.ndarray, vocabulary: dict[str, int]) -> dict[int, int]:
    """Each of the hashes `held` (sorted) that training rows have too -> the first such row; a chunk of rows at a time."""
    found: dict[int, int] = {}
    for start in range(0, len(train) if len(held) else 0, CHUNK):
        hashes, owners = _grams(train[start : start + CHUNK], lambda word: vocabulary.get(word, 0))
        at = np.minimum(np.searchsorted(held, hashes), len(held) - 1)
        for i in np.flatnonzero(held[at] == hashes).tolist():
            found.setdefault(int(hashes[i]), start + int(owners[i]))
    return found


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


def _turns(row: Row) -> Iterator[list[str]]:
    """The words of each turn, in lower case and without punctuation."""
    for turn in row.turns:
        if turn.role != "system":
            yield re.findall(r"\w+", turn.content.casefold())


def _gram(row: Row, number: int) -> str:
    """The row's run of WORDS words of that number."""
    runs = (words[at : at + WORDS] for words in _turns(row) for at in range(len(words) - WORDS + 1))
    return " ".join(next(run for i, run in enumerate(runs) if i == number))


def _grams(rows: Sequence[Row], number_of: Callable[[str], int]) -> tuple[np.ndarray, np.ndarray]:
    """A hash (uint64) of each run of words within a turn, and the number of its row; `number_of` numbers the words.

    With 64 bits each, ten million runs against a thousand million have a chance of one in two thousand of a false match.
    """
    hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for number, row in enumerate(rows):
        for words in _turns(row):
            runs = len(words) - WORDS + 1
            if runs < 1:
                continue
            ids = np.array([number_of(word) for word in words], np.uint64)
            hashes.append(_hashes(ids, runs))
            owners.append(np.full(runs, number, np.int64))
    return np.concatenate(hashes), np.concatenate(owners)


def _hashes(ids: np.ndarray, runs: int) -> np.ndarray:
    found = np.zeros(runs, np.uint64)
    for at in range(WORDS):
        found = (found ^ ids[at : at + runs]) * _FACTOR
        found ^= found >> np.uint64(29)  # multiplying alone never moves anything down to the low bits
    return found
