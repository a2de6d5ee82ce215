"""Tokens as readable text: which are trained, which are special, and what would otherwise not be seen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from jaxft.reports.document import visible

if TYPE_CHECKING:
    from jaxft.data.chat import Example

BROKEN = "\ufffd"  # what a decoder gives for half a character
PARTS = 4  # tokens that one character may take: UTF-8 has at most as many bytes
NEWLINE, TAB, SPACE, OPEN, CLOSE = "↵\n", "⇥   ", "·", "⟨", "⟩"


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of the few that make one character; as the tokenizer decodes it, so anything may be in it."""

    text: str
    trained: bool
    special: bool = False
    tokens: int = 1


@dataclass(frozen=True)
class Span:
    """Text that is safe to show: within a piece (`starts` where it begins one), a mark for what is not seen, or a gap."""

    text: str
    trained: bool
    kind: Literal["text", "special", "mark", "gap"] = "text"
    starts: bool = False


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that the tokenizer calls special, chat models' own among them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def token_name(tokenizer: Any, token: int) -> str:
    """A token as its vocabulary has it."""
    return str(tokenizer.convert_ids_to_tokens(int(token)) or f"id {token}")


def pieces(example: Example, tokenizer: Any) -> tuple[Piece, ...]:
    """The row token by token, in order. The tokens of one character share a piece, where all of them are trained or none."""
    found: list[Piece] = []
    special = special_ids(tokenizer)
    tokens, mask = example.tokens.tolist(), example.loss_mask.tolist()
    # The decoders of SentencePiece models drop a first space; behind a token that is there already they do not.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before, waiting = anchor, []
    for i, token in enumerate(tokens):
        if token in special:
            found.append(Piece(token_name(tokenizer, token), mask[i], True))
            before, waiting = anchor, []
            continue
        waiting.append(token)
        text = _added(tokenizer, before, waiting)
        last = i + 1 == len(tokens) or tokens[i + 1] in special or mask[i + 1] != mask[i] or len(waiting) == PARTS
        if text and (last or not text.endswith(BROKEN)):
            found.append(Piece(text, mask[i], False, len(waiting)))
        elif last:
            found.append(Piece("".join(token_name(tokenizer, t) for t in waiting), mask[i], True, len(waiting)))
        else:
            continue
        before, waiting = waiting, []
    return tuple(found)


def _added(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    """What `tokens` add to the text of `before`."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(before + tokens, **options)[len(tokenizer.decode(before, **options)) :]


def spans(shown: Sequence[Piece], limit: int) -> list[Span]:
    """The pieces with line breaks, tabs, spaces at an edge and control characters made visible.

    Of more than `limit` pieces the middle is left out, and said to be.
    """
    if len(shown) <= limit:
        return _spans(shown)
    tail = max(1, limit // 4)
    head, left, end = shown[: limit - tail], shown[limit - tail : -tail], shown[-tail:]
    tokens, trained = sum(piece.tokens for piece in left), sum(piece.tokens for piece in left if piece.trained)
    gap = Span(f"\n… {tokens:,} tokens are left out here, {trained:,} of them trained …\n", False, "gap")
    return [*_spans(head), gap, *_spans(end)]


def _spans(shown: Sequence[Piece]) -> list[Span]:
    found: list[Span] = []
    for i, piece in enumerate(shown):
        if piece.special:
            name = visible(piece.text.replace("\n", r"\n").replace("\t", r"\t"))
            found.append(Span(f"{OPEN}{name}{CLOSE}", piece.trained, "special", True))
            continue
        before, after = (shown[j] if 0 <= j < len(shown) else None for j in (i - 1, i + 1))
        found += _within(piece, _neighbour(before, piece, -1), _neighbour(after, piece, 0))
    return found


def _neighbour(other: Piece | None, piece: Piece, at: int) -> str:
    """The character beside a piece; a space, where something else begins there."""
    if other is None or other.special or other.trained != piece.trained:
        return " "
    return other.text[at]


def _within(piece: Piece, before: str, after: str) -> list[Span]:
    text = before + piece.text + after
    found: list[Span] = []
    for run in re.finditer(r"[^\s]+|\s", piece.text):
        said, at = run.group(), run.start() + 1
        kind: Literal["text", "mark"] = "mark"
        if said == " " and not (text[at - 1].isspace() or text[at + 1].isspace()):
            kind = "text"
        elif said.isspace():
            said = {"\n": NEWLINE, "\t": TAB, " ": SPACE}.get(said) or ascii(said)[1:-1]
        else:
            found += _spelled(said, piece.trained)
            continue
        found.append(Span(said, piece.trained, kind))
    return [replace(found[0], starts=True), *found[1:]]


def _spelled(text: str, trained: bool) -> Iterator[Span]:
    """Text without white space, its control characters spelled out as marks."""
    for hidden, run in groupby(text, lambda character: visible(character) != character):
        yield Span(visible("".join(run)), trained, "mark" if hidden else "text")
