"""Tokenised rows on disk, found again by a fingerprint of all that decides them."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxft.data import chat, conversation
from jaxft.data.chat import Example
from jaxft.data.marks import KINDS, Marks
from jaxft.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = 2  # changes when the same rows would give other tokens, or the files another content
KEPT = 30  # newest files
SHOWN = 4096  # rows from which a progress bar is worth its line


def encoded(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    train_on: str,
    folder: Path | None,
    *,
    marked: bool = False,
) -> list[Example]:
    """`chat.encode_rows` of all rows, from a file in `folder` where they were tokenised before; None keeps none.

    They are `marked` for an evaluation where that is asked for.
    """

    def make() -> list[Example]:
        found = _encode(rows, tokenizer, template, train_on)
        return chat.marked(found, rows, tokenizer, template, train_on) if marked else found

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if folder is None or backend is None:
        return make()
    settings = (
        FORM,
        conversation.DATE,
        template,
        train_on,
        marked,
        tokenizer.chat_template,
        sorted(tokenizer.special_tokens_map.items()),
    )
    file = folder / f"{_fingerprint(rows, backend.to_str(), repr(settings))}.npz"
    found = _read(file, rows)
    if found is None:
        found = make()
        _write(file, found)
    return found


def _encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: str, train_on: str) -> list[Example]:
    examples = chat.encode_rows(rows, tokenizer, template, train_on)
    if len(rows) < SHOWN or not sys.stderr.isatty():
        return list(examples)
    from rich.console import Console
    from rich.progress import track

    return list(track(examples, "tokenising", len(rows), console=Console(stderr=True), transient=True))


def _fingerprint(rows: Sequence[Row], *settings: str) -> str:
    digest = hashlib.blake2b("\0".join(settings).encode(), digest_size=16)
    for row in rows:
        said = (row.prompt, *((turn.role, turn.content) for turn in row.turns))
        digest.update(repr(said).encode())
    return digest.hexdigest()


def _write(file: Path, examples: Sequence[Example]) -> None:
    """Under another name first, so that a killed run leaves no half a file; a full or read-only disk only costs the cache."""
    packed = io.BytesIO()
    columns = {
        "lengths": np.array([len(e.tokens) for e in examples], np.int64),
        "tokens": np.concatenate([np.zeros(0, np.int32), *(e.tokens for e in examples)]),
        "masks": _bits([e.loss_mask for e in examples]),
    }
    found = [e.marks for e in examples if e.marks is not None]
    if examples and len(found) == len(examples):
        columns["bytes"] = np.concatenate([marks.bytes for marks in found])
        columns |= {kind: _bits([marks.kinds[kind] for marks in found]) for kind in KINDS}
    np.savez(packed, **columns)
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".part", dir=file.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(_digest(packed.getvalue()) + packed.getvalue())
        os.replace(temporary, file)
        temporary = None
        for old in sorted(file.parent.glob("*.npz"), key=lambda f: f.stat().st_mtime)[:-KEPT]:
            old.unlink()
    except OSError:
        pass
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _bits(masks: Sequence[np.ndarray]) -> np.ndarray:
    return np.packbits(np.concatenate([np.zeros(0, bool), *masks]))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=32).digest()


def _read(file: Path, rows: Sequence[Row]) -> list[Example] | None:
    """None where there is no such file or its digest is not that of its content."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    if _digest(content[32:]) != content[:32]:
        return None
    with np.load(io.BytesIO(content[32:]), allow_pickle=False) as stored:
        lengths, tokens, sizes = stored["lengths"], stored["tokens"], stored.get("bytes")
        names = ("masks", *(KINDS if sizes is not None else ()))
        bits = {name: np.unpackbits(stored[name], count=len(tokens)).astype(bool) for name in names}
    masks = bits.pop("masks")
    found = []
    for row, n, end in zip(rows, lengths.tolist(), np.cumsum(lengths).tolist(), strict=True):
        here = slice(end - n, end)
        marks = None if sizes is None else Marks(sizes[here], {name: kind[here] for name, kind in bits.items()})
        found.append(Example(tokens[here], masks[here], row.origin, marks))
    return found
