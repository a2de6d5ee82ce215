"""How much a run reads: tokens of an epoch and steps of the whole, from the rows where they are here, else as published."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from jaxft.config import Config, Data

PACKED = 0.985  # share of positions that rows fill when packed into 1,024 (GSM8K .984 to .986, Alpaca .993)


@dataclass(frozen=True)
class Known:
    """A published set: rows, and tokens of a row (question, answer, BOS and EOS) by family, "" for one that is not listed."""

    rows: int
    tokens: dict[str, float]
    source: str


# Lengths with the plain template; by the families' own tokenizers, counted 2026-11.
GSM8K = Known(
    7473, {"llama": 163.2, "openelm": 202.2, "gemma": 188, "gemma2": 188, "qwen2": 188, "": 188},
    "7,473 rows; their mean length counted with each family's tokenizer, 2026-11",
)  # fmt: skip
ALPACA = Known(52002, {"": 195}, "52,002 rows of about 195 tokens, counted on a part of them, 2026-11")
KNOWN = {"openai/gsm8k": GSM8K, "gsm8k": GSM8K, "vicgalle/alpaca-gpt4": ALPACA}


@dataclass(frozen=True)
class Reading:
    """Real tokens of one pass over the training rows, and over those held out; `fill` is the real share of positions."""

    tokens: float
    held_out_tokens: float
    fill: float
    source: str

    def steps(self, settings: Config, length: int) -> int:
        """Steps of the run, as `train` counts them: whole batches of each epoch's positions, at most max_steps."""
        optim = settings.optim
        each = self.tokens / self.fill / (length * optim.batch_size)
        total = math.ceil(each * optim.epochs)
        return max(1, min(total, optim.max_steps or total))

    def evaluations(self, settings: Config, steps: int) -> int:
        """Passes over the held-out rows: one at the start, one every so many steps, one at the end."""
        if not self.held_out_tokens:
            return 0
        return 1 + math.ceil(steps / settings.eval.every_steps)


def of_run(
    settings: Config, family: str, vocab_size: int, max_positions: int, tokens: int | None = None
) -> Reading | None:
    """What a run reads; None where nobody knows. `tokens` are those of one epoch, as given by the user. Raises UserError."""
    data = settings.data
    if tokens is not None:
        held = tokens * data.validation_fraction / (1 - data.validation_fraction)
        return Reading(tokens, held, PACKED if data.packing else 1.0, "given (--tokens)")
    here = _from_rows(settings, vocab_size, max_positions)
    return here or _from_table(data, family)


def _from_rows(settings: Config, vocab_size: int, max_positions: int) -> Reading | None:
    """Rows and tokenizer as `train` reads them, where both are on this machine; nothing is downloaded."""
    from jaxft.weights.hub import BUILTIN

    data, tokenizer = settings.data, settings.model.tokenizer or settings.model.name
    local = bool(data.files) or (data.name or "").startswith("generated:")
    if not local or not (Path(tokenizer).is_dir() or tokenizer in BUILTIN):
        return None
    from jaxft.data import chat, dataset, rows
    from jaxft.weights.hub import local_folder

    splits = rows.load(data, settings.run.seed)
    loaded = chat.load_tokenizer(local_folder(tokenizer, key="model.tokenizer", weights=False))
    found = dataset.build(settings, splits, loaded, vocab_size, max_positions)
    real, fill = found.facts["train_tokens"], found.facts["fill"]
    held = found.parts["validation"].counts.tokens if "validation" in found.parts else 0
    return Reading(real, held, fill, f"the rows themselves ({found.facts['train_rows']:,} for training)")


def _from_table(data: Data, family: str) -> Reading | None:
    known = KNOWN.get(data.name or "")
    if known is None or data.files or data.split != "train":
        return None
    rows = min(known.rows, data.limit or known.rows)
    held = 0.0 if data.validation_split or data.validation_files else data.validation_fraction
    length = min(known.tokens.get(family, known.tokens[""]), data.max_length)
    fill = PACKED if data.packing else length / data.max_length
    return Reading(rows * (1 - held) * length, rows * held * length, fill, f"estimated: {known.source}")
