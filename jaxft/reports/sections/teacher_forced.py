"""Loss and token accuracy: what the model gives to the right text, under its own names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxft.analysis import token_accuracy
from jaxft.reports.document import Block, Bullets, Code, Details, Inline, Table
from jaxft.reports.folder import RunRecord
from jaxft.reports.records import TIMES, Example, of_split
from jaxft.reports.wording import counted, nats, points, share, whole

ROWS = (
    ("eval_loss", "eval_loss", nats),
    ("eval_perplexity", "eval_perplexity", nats),
    ("eval_bits_per_byte", "eval_bits_per_byte", nats),
    ("eval_mean_token_accuracy", "eval_mean_token_accuracy", share),
    ("eval_token_accuracy_without_annotations", "eval_token_accuracy_without_annotations", share),
    ("eval_token_accuracy_final_answer", "eval_token_accuracy_final_answer", share),
    ("probe_loss", "probe_loss", nats),
    ("probe_mean_token_accuracy", "probe_mean_token_accuracy", share),
    ("loss", "train_loss", nats),
    ("mean_token_accuracy", "train_mean_token_accuracy", share),
)
OPTIONAL = (
    "eval_bits_per_byte", "eval_token_accuracy_without_annotations", "eval_token_accuracy_final_answer", "probe_loss",
    "probe_mean_token_accuracy",
)  # fmt: skip
DEFINITIONS = {
    "eval_loss": "Σ nll / Σ tokens in nats, over the supervised tokens (the answers) of the whole validation set, whatever the "
    "batch size, packing or mesh. Start is step 0, the base model.",
    "eval_perplexity": "e to the power of eval_loss.",
    "eval_bits_per_byte": "Σ nll / (ln 2 · UTF-8 bytes of the answers): the only one of these to compare between tokenizers.",
    "eval_mean_token_accuracy": "Σ correct / Σ tokens over the same tokens, teacher-forced: each token is guessed from the "
    "right ones before it. How many answers come out right when the model writes them itself is another question.",
    "eval_token_accuracy_without_annotations": "the same without calculator annotations (<<48/2=24>>), whose results copy text "
    "that was just written.",
    "eval_token_accuracy_final_answer": "the same over the digits after ####, given a right solution before them.",
    "probe_loss": "the loss on a fixed sample of training rows, measured as validation is: no dropout, the same evaluator.",
    "probe_mean_token_accuracy": "token accuracy on that sample.",
    "loss": "loss and token accuracy over the training tokens since the log line before, with dropout on and while the weights "
    "change. Start is the first log line, at step {step}, not the base model.",
}
BEST_NOTE = (
    "Best is the step with the lowest validation loss, whose weights are exported; other figures may peak elsewhere."
)
PER_ROW_NOTE = (
    "The last rows are over examples: the mean of each one's own share of right tokens, and the share of examples of which "
    "every token is right."
)


def measure(run: RunRecord) -> dict[str, Any]:
    """What losses per example add: `examples` counted, accuracy per row, and its change; empty lists where there are none."""
    held, probe = (of_split(run.examples, split) for split in ("validation", "probe"))
    return {
        "examples": {"validation": len(held), "probe": len(probe)},
        "rows": _rows(held),
        "accuracy_change": _change(held),
        "kinds": {name: _kind(held, name) for name in dict.fromkeys(k for e in held for k in e.kinds)},
    }


def _rows(held: Sequence[Example]) -> dict[str, dict[str, float]] | None:
    """`mean`: over rows of each one's share of right tokens; `all_right`: the share of rows with no wrong token."""
    if not held:
        return None
    shares = {at: [getattr(e.correct, at) / e.tokens for e in held] for at in TIMES}
    named = zip(("start", "best", "end"), TIMES)
    return {
        "mean": {name: math.fsum(shares[at]) / len(held) for name, at in named},
        "all_right": {
            name: sum(s == 1 for s in shares[at]) / len(held) for name, at in zip(("start", "best", "end"), TIMES)
        },
    }


def _change(held: Sequence[Example]) -> dict[str, Any] | None:
    """Token accuracy from the base to the best step, with its paired interval over rows."""
    if not held:
        return None
    found = token_accuracy.of_counts(
        [int(e.correct.base) for e in held], [int(e.correct.best) for e in held], [e.tokens for e in held]
    )
    return {"rows": found.rows, "tokens": found.tokens, "start": found.start, "best": found.end, "change": found.change,
            "change_interval": list(found.change_interval)}  # fmt: skip


def _kind(held: Sequence[Example], name: str) -> dict[str, Any] | None:
    """The same over tokens of one kind."""
    parts = [part for e in held if (part := e.kinds.get(name)) and 0 < part.tokens <= e.tokens]
    if not parts:
        return None
    found = token_accuracy.of_counts(
        [int(p.correct.base) for p in parts], [int(p.correct.best) for p in parts], [p.tokens for p in parts]
    )
    return {"rows": found.rows, "tokens": found.tokens, "start": found.start, "best": found.end, "change": found.change,
            "change_interval": list(found.change_interval)}  # fmt: skip


def blocks(run: RunRecord, figures: dict[str, Any]) -> list[Block]:
    """The table, and what each of its rows is."""
    shown = [row for row in ROWS if row[1] not in OPTIONAL or any(v is not None for v in figures[row[1]].values())]
    rows: list[Sequence[Inline]] = [
        (Code(name), *(form(figures[key][at]) for at in ("start", "best", "end"))) for name, key, form in shown
    ]
    told = figures["teacher_forced"]
    if told["rows"]:
        rows.append(("Token accuracy, mean over rows", *map(share, told["rows"]["mean"].values())))
        rows.append(("Rows with every token right", *map(share, told["rows"]["all_right"].values())))
    if run.of_gsm8k:
        counts = f"{100 * token_accuracy.NGRAM_ACCURACY:.0f} %"
        rows.append(("For reference: counts of six tokens, no network", counts, counts, counts))
    best, end, evaluated = (whole(figures[key]) for key in ("best_step", "step", "last_evaluation_step"))
    end = f"step {end}" if end == evaluated else f"step {end}, validation {evaluated}"
    head = ("", "Start", f"Best (step {best})", f"End ({end})")
    return [Table(head, rows), *_bullets(run, figures, shown)]


def _bullets(run: RunRecord, figures: dict[str, Any], shown: Sequence[tuple[str, str, Any]]) -> list[Block]:
    told = figures["teacher_forced"]
    definitions: list[Inline] = []
    for name, *_ in shown:
        if name in DEFINITIONS:
            words = DEFINITIONS[name].format(step=whole(figures["train_start_step"]))
            both = [Code(name), ", ", Code("mean_token_accuracy")] if name == "loss" else [Code(name)]
            definitions.append([*both, f": {words}"])
    notes: list[Inline] = [BEST_NOTE]
    change = told["accuracy_change"]
    if change:
        low, high = change["change_interval"]
        definitions.append(PER_ROW_NOTE)
        notes.append(
            f"Token accuracy changed by {points(change['change'])} from the base to the best step (95 % paired bootstrap over "
            f"{counted(change['rows'], 'row')}: {points(low)} to {points(high)})."
        )
    if run.of_gsm8k:
        notes.append(
            "The reference: counts of six tokens in a row, learnt from GSM8K's training answers, guess "
            f"{100 * token_accuracy.NGRAM_ACCURACY:.0f} % of the next tokens of its test answers (39 to 41, by "
            "tokenizer) and can add no two numbers. Token accuracy is no measure of solving."
        )
    return [Bullets(notes), Details("What each of these is", [Bullets(definitions)])]


def bits_per_byte(held: Sequence[Example]) -> dict[str, float | None]:
    """Bits per byte at each time from losses per example, for runs whose lines lack it."""
    size = sum(e.bytes for e in held)
    return {
        name: math.fsum(getattr(e.nll, at) for e in held) / (math.log(2) * size) if size else None
        for name, at in zip(("start", "best", "end"), TIMES)
    }
