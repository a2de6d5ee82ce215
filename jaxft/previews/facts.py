"""What a preview tells, computed from the rows and the dataset that training would use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxft.config import Config, Optim
from jaxft.data import chat
from jaxft.previews import checks
from jaxft.previews.checks import Beginning, Ending, Faults
from jaxft.previews.overlap import Overlap, overlap
from jaxft.previews.pieces import Piece, pieces

if TYPE_CHECKING:
    from jaxft.data.chat import Counts
    from jaxft.data.dataset import Dataset
    from jaxft.data.loader import Loader
    from jaxft.data.rows import Splits

LONGEST = 3  # rows shown beside the samples, and
LISTED = 10  # rows listed by name and length
BARS = 20
NICE = (1, 2, 5)


@dataclass(frozen=True)
class Known:
    """A row's origin and lengths in tokens: before any cut, and as trained (0 where dropped)."""

    part: str
    origin: str
    whole: int
    tokens: int


@dataclass(frozen=True)
class Shown:
    """A row as it will be trained."""

    known: Known
    trained: int
    pieces: tuple[Piece, ...]
    why: str  # it is shown


@dataclass(frozen=True)
class Bar:
    """How many rows have `low` to `high` tokens; `beyond`: they are cut or dropped."""

    low: int
    high: int
    rows: int
    beyond: bool


@dataclass(frozen=True)
class Packing:
    """How rows lie in sequences: `lengths` are the positions that a sequence may have, `fill` the share that rows occupy."""

    packed: bool
    lengths: tuple[int, ...]
    sequences: int
    fill: float
    batch_size: int
    steps_per_epoch: int
    steps: int
    steps_of_epochs: int
    epochs: float


@dataclass(frozen=True)
class Preview:
    """All that is shown; `counts` and `known` hold train and, where there is one, validation."""

    title: str
    notes: tuple[str, ...]
    template: str
    max_length: int
    counts: dict[str, Counts]
    packing: Packing
    beginning: Beginning
    ending: Ending
    spoken: Faults
    bars: tuple[Bar, ...]
    longest: tuple[Known, ...]
    overlap: Overlap | None
    shown: tuple[Shown, ...]


def gather(title: str, config: Config, splits: Splits, data: Dataset, tokenizer: Any, rows: int) -> Preview:
    """Computes a preview with `rows` training rows at even distances, and the longest, token by token."""
    loaders = {"train": data.train} | ({"validation": data.validation} if data.validation else {})
    origins = {"train": [r.origin for r in splits.train], "validation": [r.origin for r in splits.validation]}
    known = {part: _known(part, origins[part], data, loader) for part, loader in loaders.items()}
    kept = [row for part in known.values() for row in part if row.tokens]
    examples = [example for loader in loaders.values() for example in loader.examples]
    every = [row for part in known.values() for row in part]
    return Preview(
        title=title,
        notes=tuple(data.notes),
        template=chat.template_name(data.template),
        max_length=data.max_length,
        counts={part: data.parts[part].counts for part in loaders},
        packing=packing(data.train, config.optim),
        beginning=checks.beginning(examples, tokenizer),
        ending=checks.ending(examples, [row.whole > row.tokens for row in kept], tokenizer, data.template),
        spoken=checks.spoken([*splits.train, *splits.validation], tokenizer),
        bars=bars(np.array([row.whole for row in known["train"]]), data.max_length),
        longest=tuple(sorted(every, key=lambda row: -row.whole)[:LISTED]),
        overlap=overlap(splits.train, splits.validation) if splits.validation else None,
        shown=_shown(kept, examples, data.parts["train"].counts.kept, tokenizer, rows),
    )


def _known(part: str, origins: Sequence[str], data: Dataset, loader: Loader) -> list[Known]:
    """Every row of a part. The examples are those rows in their order, without the dropped ones."""
    examples, found = iter(loader.examples), []
    example = next(examples, None)
    for origin, whole in zip(origins, data.parts[part].lengths.tolist(), strict=True):
        if example is not None and example.origin == origin:
            found.append(Known(part, origin, whole, len(example.tokens)))
            example = next(examples, None)
        else:
            found.append(Known(part, origin, whole, 0))
    return found


def packing(train: Loader, optim: Optim) -> Packing:
    """Facts about the first epoch, and the steps that training takes."""
    steps = train.total_steps(optim.epochs)
    # The loader tells its fill, from which the number of its sequences follows exactly.
    positions = int(train.lengths.sum())
    return Packing(
        packed=train.packing,
        lengths=tuple(train.lengths_padded),
        sequences=round(positions / (train.fill * train.length)) if train.packing else len(train.examples),
        fill=train.fill,
        batch_size=train.batch_size,
        steps_per_epoch=train.steps_in_epoch(0),
        steps=min(steps, optim.max_steps or steps),
        steps_of_epochs=steps,
        epochs=optim.epochs,
    )


def bars(lengths: np.ndarray, limit: int) -> tuple[Bar, ...]:
    """A histogram of whole lengths: at most BARS bars up to the 99th percentile, one for what is longer, one beyond `limit`."""
    within, beyond = lengths[lengths <= limit], lengths[lengths > limit]
    found: list[Bar] = []
    if len(within):
        width = _nice(float(np.quantile(within, 0.99)) / BARS)
        edge = min(limit, width * math.ceil(float(np.quantile(within, 0.99)) / width))
        low = width * ((int(within.min()) - 1) // width)
        for start in range(low, edge, width):
            high = min(start + width, edge)
            found.append(Bar(start + 1, high, int(((within > start) & (within <= high)).sum()), False))
        if (within > edge).any():
            found.append(Bar(edge + 1, int(within.max()), int((within > edge).sum()), False))
    if len(beyond):
        found.append(Bar(limit + 1, int(beyond.max()), len(beyond), True))
    return tuple(found)


def _nice(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, …"""
    power = 10 ** math.floor(math.log10(max(1.0, width)))
    return next(n * power for n in (*NICE, 10) if n * power >= width)


def _shown(kept: Sequence[Known], examples: Sequence[Any], train: int, tokenizer: Any, rows: int) -> tuple[Shown, ...]:
    """`rows` of the first `train` examples, which are the training rows, and the longest of all; none where `rows` is 0."""
    if not rows:
        return ()
    count = min(rows, train)
    chosen = {i * train // count: "sample" for i in range(count)}
    for i in sorted(range(len(kept)), key=lambda i: -kept[i].whole)[:LONGEST]:
        chosen.setdefault(i, "among the longest")
    return tuple(
        Shown(kept[i], int(examples[i].loss_mask.sum()), pieces(examples[i], tokenizer), why)
        for i, why in chosen.items()
    )
