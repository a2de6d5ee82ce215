"""Whether each row begins and ends as the model must see it: BOS once, and the end of every answer trained."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxft.data import chat
from jaxft.previews.pieces import special_ids, token_name

if TYPE_CHECKING:
    from jaxft.data.chat import Example
    from jaxft.data.rows import Row


@dataclass(frozen=True)
class Faults:
    """How many rows lack something that every row should have, and where the first of them comes from."""

    rows: int
    first: str | None

    @classmethod
    def of(cls, origins: Iterable[str]) -> Faults:
        """Counts them."""
        found = list(origins)
        return cls(len(found), found[0] if found else None)


@dataclass(frozen=True)
class Beginning:
    """BOS: `token` is its text, None where the tokenizer has none; `wanted`, how many a row should begin with, 0 or 1."""

    token: str | None
    wanted: int
    wrong: Faults
    again: Faults  # BOS further in: some templates put one before each turn


@dataclass(frozen=True)
class Ending:
    """The end of an answer: `tokens` are those that end answers with how often, the most frequent first.

    `missing` are rows with a trained answer that ends with none of them; `cut` of these lost it to data.max_length.
    """

    tokens: tuple[tuple[str, int], ...]
    missing: Faults
    cut: int


def beginning(examples: Sequence[Example], tokenizer: Any) -> Beginning:
    """Looks for BOS at the start of each row and further in."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return Beginning(None, 0, Faults.of(()), Faults.of(()))
    leading = [_leading(example.tokens, bos) for example in examples]
    # A template may bring the BOS that the tokenizer would not add; then all rows should have it.
    wanted = int(chat.adds_bos(tokenizer) or 2 * sum(n > 0 for n in leading) > len(leading))
    wrong = Faults.of(e.origin for e, n in zip(examples, leading, strict=True) if n != wanted)
    again = Faults.of(
        e.origin
        for e, n in zip(examples, leading, strict=True)
        if bos != tokenizer.eos_token_id and bool((e.tokens[n:] == bos).any())
    )
    return Beginning(token_name(tokenizer, bos), wanted, wrong, again)


def _leading(tokens: np.ndarray, bos: int) -> int:
    """How many BOS the row begins with."""
    other = np.flatnonzero(tokens != bos)
    return int(other[0]) if len(other) else len(tokens)


def ending(examples: Sequence[Example], cut: Sequence[bool], tokenizer: Any, template: str) -> Ending:
    """Looks for an end token, trained, at the end of each trained answer; `cut` tells which rows were shortened.

    That is EOS under the plain template. A chat template may end a turn with a token of its own, and go on with white space.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    ends = {eos} if template == "plain" else (special_ids(tokenizer) - {bos, tokenizer.pad_token_id}) | {eos}
    blank: dict[int, bool] = {}
    seen: Counter[int] = Counter()
    missing, lost = [], 0
    for example, shortened in zip(examples, cut, strict=True):
        last = [_last(example, end, tokenizer, blank) for end in _run_ends(example.loss_mask)]
        seen.update(token for token in last if token in ends)
        if not last or any(token not in ends for token in last):
            missing.append(example.origin)
            lost += shortened
    named = tuple((token_name(tokenizer, token), count) for token, count in seen.most_common())
    return Ending(named, Faults.of(missing), lost)


def _run_ends(mask: np.ndarray) -> list[int]:
    """Where each run of trained tokens ends: the index of its last token."""
    following = np.append(mask[1:], False)
    return np.flatnonzero(mask & ~following).tolist()


def _last(example: Example, end: int, tokenizer: Any, blank: dict[int, bool]) -> int:
    """The last trained token up to `end` that is more than white space."""
    at = end
    while at > 0 and example.loss_mask[at - 1] and _is_blank(int(example.tokens[at]), tokenizer, blank):
        at -= 1
    return int(example.tokens[at])


def _is_blank(token: int, tokenizer: Any, known: dict[int, bool]) -> bool:
    if token not in known:
        known[token] = not tokenizer.decode([token], skip_special_tokens=False).strip()
    return known[token]


def spoken(rows: Iterable[Row], tokenizer: Any) -> Faults:
    """Rows whose own text spells a special token, which becomes that token; one EOS at the end of a text is its own."""
    ids = special_ids(tokenizer)
    names = sorted((token_name(tokenizer, i) for i in ids), key=len, reverse=True)
    if not names:
        return Faults.of(())
    pattern, bos, eos = (
        re.compile("|".join(map(re.escape, names))),
        tokenizer.bos_token or "",
        tokenizer.eos_token or "",
    )

    def spells(row: Row) -> bool:
        texts = [turn.content for turn in row.turns] + ([row.prompt] if row.prompt else [])
        return any(pattern.search(text.removeprefix(bos).removesuffix(eos)) for text in texts)

    return Faults.of(row.origin for row in rows if spells(row))
