"""A run's data as a whole: rows read, split, tokenised and laid out in batches, with what to tell about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxft.config import Config, Data
from jaxft.data import chat, rows
from jaxft.data.chat import Counts, Example
from jaxft.data.loader import Loader
from jaxft.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH_MULTIPLE = 64  # unpacked sequences are padded to a multiple: one shape, and kind to the hardware's tiles


@dataclass(frozen=True)
class Dataset:
    """Batches to train and validate on, rows to measure tasks on, and facts (JSON-ready) and notes (lines) about them."""

    train: Loader
    validation: Loader | None
    held_out: list[Row]
    task_rows: list[Row]
    template: str
    facts: dict[str, Any]
    notes: list[str]


def build(
    config: Config, splits: rows.Splits, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_positions: int
) -> Dataset:
    """Tokenises `splits` for a model of that vocabulary and as many positions. Raises UserError."""
    data, micro = config.data, config.optim.micro_batch_size
    template = chat.choose_template(data.template, tokenizer)
    longest = min(data.max_length, max_positions)
    train, counts = chat.encode_all(splits.train, tokenizer, template, longest, vocab_size)
    held, held_counts = [], None
    if splits.validation:
        held, held_counts = chat.encode_all(splits.validation, tokenizer, template, longest, vocab_size)
    length = _length(data, longest, train + held)
    seed = config.run.seed
    loader = Loader(
        train, batch_size=config.optim.batch_size, length=length, packing=data.packing, shuffle=data.shuffle, seed=seed
    )
    validation = Loader(held, batch_size=micro, length=length, packing=data.packing, shuffle=False) if held else None
    notes = [*splits.notes, f"template: {template}"]
    if longest < data.max_length:
        notes.append(f"max_length: {data.max_length} → {longest}, where the model's positions end")
    for part, count in (("train", counts), ("validation", held_counts)):
        if count is not None and count.cut + count.dropped:
            notes.append(
                f"{part}: of {count.kept + count.dropped} rows, {count.cut} are cut at {longest} tokens and {count.dropped} "
                f"dropped, because no token of the answer fits (longest {count.longest})"
            )
    facts = _facts(splits, template, counts, loader, len(held))
    return Dataset(
        loader, validation, splits.validation or splits.train, splits.test or splits.validation, template, facts, notes
    )


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
