"""What evaluation texts share with training texts: whole texts, runs of words, and the nearest neighbour."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.analysis.statistics import wilson

GRAMS = (13, 8)
"""Words in a row: 13 as GPT-3's authors looked for copies of their test sets (arXiv 2005.14165, appendix C); 8 as the
first Llama and PaLM reports did, where stock phrases count too."""
SHINGLE = 3
NEAR = 0.6
CHUNK = 4096  # training texts looked at together
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Offender:
    """An evaluation text, the first training text that it shares something with, and what is shared."""

    evaluation: int
    train: int
    shared: str


@dataclass(frozen=True)
class Sharing:
    """How many of `documents` evaluation texts share something with the training texts, with a 95 % Wilson interval.

    `kind`: duplicate (the same words), masked duplicate (the same but for numbers), N-gram (N words in a row), near
    (Jaccard similarity of 3-word shingles with numbers masked at least 0.6). Case and punctuation never count.
    """

    kind: str
    documents: int
    shared: int
    share: float
    share_interval: tuple[float, float]
    offenders: tuple[Offender, ...]


@dataclass(frozen=True)
class Contamination:
    """All kinds, and the nearest pair: its similarity and its two numbers (None without texts)."""

    sharings: tuple[Sharing, ...]
    nearest_similarity: float
    nearest: tuple[int, int] | None


def check(train: Sequence[str], evaluation: Sequence[str], grams: Sequence[int] = GRAMS) -> Contamination:
    """Compares every evaluation text with every training text; pass questions alone to see what was asked before.

    Answers of one format share runs of words that say nothing (GSM8K's annotations), so they do not belong in here.
    """
    learnt, held = _words(train), _words(evaluation)
    masked_learnt, masked_held = (_words([_NUMBER.sub("0", t) for t in texts]) for texts in (train, evaluation))
    found = [
        _sharing("duplicate", held, _duplicates(learnt, held)),
        _sharing("masked duplicate", held, _duplicates(masked_learnt, masked_held)),
        *(_sharing(f"{n}-gram", held, _runs(learnt, held, n)) for n in grams),
    ]
    similarity, neighbour = _nearest(masked_learnt, masked_held)
    near = {
        i: Offender(i, int(neighbour[i]), f"similarity {similarity[i]:.2f}")
        for i in np.flatnonzero(similarity >= NEAR).tolist()
    }
    best = int(np.argmax(similarity)) if len(similarity) else None
    return Contamination(
        (*found, _sharing("near", held, near)),
        0.0 if best is None else float(similarity[best]),
        None if best is None or similarity[best] == 0 else (best, int(neighbour[best])),
    )


def with_and_without(found: Contamination, right: Sequence[bool]) -> list[dict[str, Any]]:
    """For each kind: the share right of all documents, of the offenders, and of the others, with 95 % Wilson intervals."""
    rows = []
    for sharing in found.sharings:
        offending = {offender.evaluation for offender in sharing.offenders}
        parts = {
            "all": list(right),
            "shared": [r for i, r in enumerate(right) if i in offending],
            "others": [r for i, r in enumerate(right) if i not in offending],
        }
        told: dict[str, Any] = {"kind": sharing.kind}
        for name, part in parts.items():
            told[name] = {
                "documents": len(part),
                "exact_match": sum(part) / len(part) if part else None,
                "exact_match_interval": list(wilson(sum(part), len(part))),
            }
        rows.append(told)
    return rows


def _words(texts: Sequence[str]) -> list[list[str]]:
    return [_WORD.findall(text.casefold()) for text in texts]


def _sharing(kind: str, held: Sequence[Any], offenders: Mapping[int, Offender]) -> Sharing:
    n, found = len(held), tuple(offenders[i] for i in sorted(offenders))
    return Sharing(kind, n, len(found), len(found) / max(1, n), wilson(len(found), n), found)


def _duplicates(train: list[list[str]], held: list[list[str]]) -> dict[int, Offender]:
    first: dict[tuple[str, ...], int] = {}
    for i, words in enumerate(train):
        first.setdefault(tuple(words), i)
    return {
        i: Offender(i, first[tuple(words)], " ".join(words))
        for i, words in enumerate(held)
        if words and tuple(words) in first
    }


def shared_runs(train: Sequence[str], evaluation: Sequence[str], size: int = GRAMS[0]) -> dict[int, Offender]:
    """Evaluation text -> its first run of `size` words that a training text has too, and the first such text."""
    return _runs(_words(train), _words(evaluation), size)


def _runs(train: Sequence[list[str]], held: Sequence[list[str]], size: int) -> dict[int, Offender]:
    """Runs of words are numbers of 64 bits: ten million runs against a thousand million share one by chance in one of two
    thousand cases, and take 8 bytes each. Training texts are looked at a chunk at a time."""
    vocabulary: dict[str, int] = {}
    asked, of_text = _hashed(held, size, lambda word: vocabulary.setdefault(word, len(vocabulary) + 1))
    wanted, first = np.unique(asked), {}
    for start in range(0, len(train) if len(wanted) else 0, CHUNK):
        hashes, owners = _hashed(train[start : start + CHUNK], size, lambda word: vocabulary.get(word, 0))
        at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        for i in np.flatnonzero(wanted[at] == hashes).tolist():
            first.setdefault(int(hashes[i]), start + int(owners[i]))
    found: dict[int, Offender] = {}
    for i in np.flatnonzero(np.isin(asked, np.array(list(first), np.uint64))).tolist():
        text = int(of_text[i])
        if text not in found:
            nth = i - int(np.searchsorted(of_text, text))
            found[text] = Offender(text, first[int(asked[i])], " ".join(held[text][nth : nth + size]))
    return found


def _hashed(texts: Sequence[list[str]], size: int, number_of: Callable[[str], int]) -> tuple[np.ndarray, np.ndarray]:
    """A hash (uint64) of each run of `size` words, and the number of its text; `number_of` numbers the words."""
    hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for number, words in enumerate(texts):
        runs = len(words) - size + 1
        if runs > 0:
            ids = np.array([number_of(word) for word in words], np.uint64)
            found = np.zeros(runs, np.uint64)
            for at in range(size):
                found = (found ^ ids[at : at + runs]) * _FACTOR
                found ^= found >> np.uint64(29)  # multiplying alone never moves anything down to the low bits
            hashes.append(found)
            owners.append(np.full(runs, number, np.int64))
    return np.concatenate(hashes), np.concatenate(owners)


def _grams(words: list[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[at:] for at in range(size))))


def _nearest(train: list[list[str]], held: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """The greatest Jaccard similarity of each evaluation text's shingles with a training text's, and which one."""
    from scipy.sparse import csr_array  # here, because importing it takes longer than checking a small set

    vocabulary: dict[tuple[str, ...], int] = {}
    shingles = [{vocabulary.setdefault(s, len(vocabulary)) for s in _grams(words, SHINGLE)} for words in held]
    others = [[vocabulary.get(s, -1) for s in set(_grams(words, SHINGLE))] for words in train]
    best, neighbour = np.zeros(len(held)), np.zeros(len(held), np.int64)
    if not vocabulary or not train:
        return best, neighbour

    def table(rows: Sequence[Any]) -> Any:
        kept = [[s for s in row if s >= 0] for row in rows]
        at = np.concatenate([[0], np.cumsum([len(row) for row in kept])])
        columns = np.array([s for row in kept for s in row], np.int64)
        return csr_array((np.ones(len(columns), np.int32), columns, at), shape=(len(rows), len(vocabulary)))

    common = (table(shingles) @ table(others).T).tocsr()
    sizes, other_sizes = np.array([len(s) for s in shingles]), np.array([len(s) for s in others])
    for i in range(len(held)):
        part = slice(common.indptr[i], common.indptr[i + 1])
        which, shared = common.indices[part], common.data[part]
        if len(which):
            similarity = shared / (sizes[i] + other_sizes[which] - shared)
            at = int(np.argmax(similarity))
            best[i], neighbour[i] = similarity[at], which[at]
    return best, neighbour
