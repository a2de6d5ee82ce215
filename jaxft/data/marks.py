"""What an evaluation counts apart among a row's tokens: bytes of text, calculator annotations, the final answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from jaxft.analysis.token_accuracy import masks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("no annotations", "final answer")  # as analysis.token_accuracy.masks names them


@dataclass(frozen=True)
class Marks:
    """Of a row's tokens, `[n]` each: `bytes` int32, the UTF-8 bytes of text that a token stands for (special tokens: none);
    `kinds` bool, by the name of what counts it. `cut`: whether the row lost its end.
    """

    bytes: np.ndarray
    kinds: dict[str, np.ndarray]
    cut: bool = False

    def first(self, count: int) -> Marks:
        """Those of a row that is cut to so many tokens."""
        kept = {name: kind[:count] for name, kind in self.kinds.items()}
        return replace(self, bytes=self.bytes[:count], kinds=kept, cut=self.cut or count < len(self.bytes))


def marks(
    texts: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    sizes: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Marks | None]:
    """Of rows as text with the `spans` of characters that are trained, and as so many tokens (`sizes`, BOS included).

    None where the tokenizer does not tell which characters a token came from.
    """
    if not texts or not getattr(tokenizer, "is_fast", False):
        return [None] * len(texts)
    found = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    added = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = np.array([*tokenizer.all_special_ids, *added], np.int64)
    return [
        _of_row(text, parts, size, np.array(ids, np.int64), offsets, special)
        for text, parts, size, ids, offsets in zip(texts, spans, sizes, found["input_ids"], found["offset_mapping"])
    ]


def _of_row(
    text: str,
    spans: Sequence[tuple[int, int]],
    size: int,
    ids: np.ndarray,
    offsets: Sequence[tuple[int, int]],
    special: np.ndarray,
) -> Marks:
    before = np.cumsum([0, *(len(c.encode()) for c in text)])
    # Several tokens of one character share its offsets, and some tokenizers leave out a space before a word: each token
    # gets what lies between the furthest end so far and its own.
    ends = np.maximum.accumulate(before[[0, *(end for _, end in offsets)]])
    bytes = np.where(np.isin(ids, special), 0, np.diff(ends)).astype(np.int32)
    kinds = {KINDS[0]: np.ones(len(ids), bool), KINDS[1]: np.zeros(len(ids), bool)}
    for start, end in spans:
        found = masks(text[start:end], [(a - start, b - start) for a, b in offsets])
        kinds[KINDS[0]] &= np.array(found[KINDS[0]], bool)
        kinds[KINDS[1]] |= np.array(found[KINDS[1]], bool)
    bos = size - len(ids)
    return Marks(
        np.pad(bytes, (bos, 0)),
        {name: np.pad(kind, (bos, 0), constant_values=name == KINDS[0]) for name, kind in kinds.items()},
    )
