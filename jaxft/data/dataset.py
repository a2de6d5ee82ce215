"""A run's data as a whole: rows read, split, tokenised and laid out in batches, with what to tell about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxft.config import Config, Data
from jaxft.data import cache, chat, rows
from jaxft.data.chat import Counts, Example
from jaxft.data.loader import LENGTH_MULTIPLE, Loader, sample
from jaxft.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Part:
    """What became of the rows for one purpose; `lengths` int64 `[rows]` are the tokens of each before any cut or drop."""

    counts: Counts
    lengths: np.ndarray


@dataclass(frozen=True)
class Measured:
    """Rows that every evaluation measures; `rows` are those of the loader's examples, in their order."""

    loader: Loader
    rows: list[Row]


@dataclass(frozen=True)
class Dataset:
    """Batches to train and validate on, rows to measure tasks on, and facts (JSON-ready) and notes (lines) about them.

    `measured` are validation and, where eval.probe_rows asks for it, probe, a fixed sample of the training rows; neither is
    there where nothing is held out. `parts` are train and, where there is one, validation; `max_length` is the most tokens
    that a row keeps.
    """

    train: Loader
    measured: dict[str, Measured]
    held_out: list[Row]
    task_rows: list[Row]
    template: str
    facts: dict[str, Any]
    notes: list[str]
    parts: dict[str, Part]
    max_length: int

    @property
    def validation(self) -> Loader | None:
        """Batches of the rows held out, where there are any."""
        return self.measured["validation"].loader if "validation" in self.measured else None


def build(
    config: Config, splits: rows.Splits, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_positions: int
) -> Dataset:
    """Tokenises `splits` for a model of that vocabulary and as many positions. Raises UserError."""
    data, micro, seed = config.data, config.optim.micro_batch_size, config.run.seed
    template = chat.choose_template(data.template, tokenizer)
    longest = min(data.max_length, max_positions)
    folder = None if data.cache is None else Path(data.cache).expanduser() / "tokens"

    parts: dict[str, Part] = {}

    def examples(found: list[Row], part: str | None = None, marked: bool = True) -> list[Example]:
        whole = cache.encoded(found, tokenizer, template, data.train_on, folder, marked=marked)
        kept, counts = chat.fit(whole, longest, data.on_long_row, tokenizer=tokenizer, vocab_size=vocab_size)
        if part is not None:
            parts[part] = Part(counts, np.array([len(example.tokens) for example in whole], np.int64))
        return kept

    train = examples(splits.train, "train", marked=False)
    held = examples(splits.validation, "validation") if splits.validation else []
    length = _length(data, longest, train + held)
    loader = Loader(
        train, batch_size=config.optim.batch_size, length=length, packing=data.packing, shuffle=data.shuffle, seed=seed
    )
    measured: dict[str, Measured] = {}
    options = {"batch_size": micro, "length": length, "packing": data.packing, "shuffle": False}
    if held:
        measured["validation"] = Measured(Loader(held, **options), _rows_of(held, splits.validation))
    if drawn := sample(min(config.eval.probe_rows, len(held), len(train)), len(train), seed):
        seen = _rows_of([train[i] for i in drawn], splits.train)
        # Batches of the shapes that validation has, so that nothing is compiled for them.
        options["lengths_padded"] = measured["validation"].loader.lengths_padded
        measured["probe"] = Measured(Loader(examples(seen), **options), seen)
    notes = [*splits.notes, f"template: {chat.template_name(template)}"]
    if longest < data.max_length:
        notes.append(f"max_length: {data.max_length} → {longest}, where the model's positions end")
    for part, became in parts.items():
        if became.counts.cut + became.counts.dropped:
            notes.append(_shortened(part, became.counts, longest, data.on_long_row))
    facts = _facts(splits, chat.template_name(template), parts["train"].counts, loader, len(held))
    held_out, task_rows = splits.validation or splits.train, splits.test or splits.validation
    return Dataset(loader, measured, held_out, task_rows, template, facts, notes, parts, longest)


def _rows_of(examples: list[Example], rows: list[Row]) -> list[Row]:
    """The rows that the examples came from; both are in the same order, and no two rows have one origin."""
    by_origin = {row.origin: row for row in rows}
    return [by_origin[example.origin] for example in examples]


def _shortened(part: str, count: Counts, longest: int, on_long_row: str) -> str:
    why = "as longer ones are" if on_long_row == "drop" else "because no token of the answer fits"
    dropped = f"{count.dropped} dropped, {why}" if count.dropped else "none dropped"
    rows = count.kept + count.dropped
    return f"{part}: of {rows} rows, {count.cut} are cut at {longest} tokens and {dropped} (longest {count.longest})"


def _length(data: Data, longest: int, examples: list[Example]) -> int:
    """Positions per sequence. A row of n tokens takes n - 1."""
    if data.packing:
        return longest
    needed = max(len(example.tokens) for example in examples) - 1
    return -(-needed // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _facts(splits: rows.Splits, template: str, counts: Counts, loader: Loader, held: int) -> dict[str, Any]:
    return {
        "format": splits.format, "template": template, "train_rows": counts.kept, "validation_rows": held,
        "cut": counts.cut, "dropped": counts.dropped, "skipped": splits.skipped, "longest": counts.longest,
        "train_tokens": counts.tokens, "trained_tokens": counts.trained_tokens, "fill": round(loader.fill, 4),
        "length": loader.length, "fingerprint": loader.fingerprint,
    }  # fmt: skip
