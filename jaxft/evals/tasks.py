"""Tasks measured by generation, in the training template: rows in, answers and scores out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxft.analysis.gsm8k import answers
from jaxft.analysis.gsm8k.answers import Scored
from jaxft.data import chat
from jaxft.data.rows import Row
from jaxft.errors import UserError
from jaxft.evals.decode import Generator, continuation, eos_ids
from jaxft.models.decoder import Decoder

SHOWN = 3  # problems kept in the results, for the report


def samples(rows: Sequence[Row], answerer: Answerer, trainable: dict[str, jax.Array], limit: int) -> tuple[str, float]:
    """Answers of at most `limit` tokens as text to read, each with where it ended, and the share that ended by themselves."""
    shown, stopped = [], 0
    for row, (text, tokens, cut) in zip(rows, answerer.told(rows, trainable, limit)):
        ended = f"cut at {tokens} tokens" if cut else f"stopped after {tokens} tokens"
        shown.append(f"{question(row)}\n→ {text.strip()}\n[{ended}]")
        stopped += not cut
    return "\n\n".join(shown), stopped / max(1, len(rows))


class Answerer:
    """Answers rows as training asked them, with any trainable parameters; compiled programs are kept between calls."""

    def __init__(self, model: Decoder, tokenizer: Any, template: str, max_new_tokens: int):
        self.tokenizer, self.template = tokenizer, template
        self.generator = Generator(model, eos_ids(model, tokenizer))
        # Half of the positions at most, so that a prompt has room whatever the setting.
        self.new = min(max_new_tokens, model.arch.max_positions // 2)
        self.room = model.arch.max_positions - self.new

    def __call__(self, rows: Sequence[Row], trainable: dict[str, jax.Array], limit: int | None = None) -> list[str]:
        """The greedy answer to each row, of at most `limit` tokens. A prompt too long for the model loses its head, not BOS."""
        return [text for text, _ in self.answered(rows, trainable, limit)]

    def answered(
        self, rows: Sequence[Row], trainable: dict[str, jax.Array], limit: int | None = None
    ) -> list[tuple[str, bool]]:
        """Each answer, and whether it was cut at the limit."""
        return [(text, cut) for text, _, cut in self.told(rows, trainable, limit)]

    def told(
        self, rows: Sequence[Row], trainable: dict[str, jax.Array], limit: int | None = None
    ) -> list[tuple[str, int, bool]]:
        """Each answer, of how many tokens it is, and whether it was cut at the limit."""
        prompts = [fitted(chat.prompt_tokens(row, self.tokenizer, self.template), self.room) for row in rows]
        most = min(self.new, limit or self.new)
        new = self.generator(prompts, max_new_tokens=most, trainable=trainable)
        texts = [continuation(self.tokenizer, prompt, tokens) for prompt, tokens in zip(prompts, new)]
        return [(text, len(tokens), len(tokens) == most) for text, tokens in zip(texts, new)]


def fitted(prompt: list[int], room: int) -> list[int]:
    """The prompt in at most `room` tokens: what is too long loses its head, but for the first token, which is BOS."""
    return prompt if len(prompt) <= room else prompt[:1] + prompt[len(prompt) - room + 1 :]


def question(row: Row) -> str:
    """What the row asks, for showing."""
    return next((turn.content for turn in reversed(row.turns) if turn.role == "user"), "") or (row.prompt or "")


def final_answer(rows: Sequence[Row], answerer: Answerer, trainable: dict[str, jax.Array]) -> list[Scored]:
    """GSM8K's form: the number after `####`, compared with the reference's as text."""
    references = [row.turns[-1].content for row in rows]
    said = answerer.answered(rows, trainable)
    texts, cut = [text for text, _ in said], [was_cut for _, was_cut in said]
    return answers.score([question(row) for row in rows], references, texts, cut)


def check_final_answer(rows: Sequence[Row]) -> None:
    """Raises UserError where references have no final answer."""
    without = [row for row in rows if answers.final_answer(row.turns[-1].content) is None]
    if not rows:
        raise UserError(
            "eval.tasks: final_answer has no rows; set data.test_split, data.test_files or validation_fraction"
        )
    if without:
        raise UserError(
            f"eval.tasks: final_answer needs `#### NUMBER` in every reference; {len(without)} of {len(rows)} have none, "
            f"first {without[0].origin}; for such data leave the task out with a bare --eval.tasks"
        )


Task = Callable[[Sequence[Row], Answerer, dict[str, jax.Array]], list[Scored]]
TASKS: dict[str, tuple[Task, Callable[[Sequence[Row]], None]]] = {"final_answer": (final_answer, check_final_answer)}


def measure(
    task: str, rows: Sequence[Row], answerer: Answerer, trainable: dict[str, jax.Array]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A task's scores with their intervals, and every problem; both JSON-ready."""
    scored = TASKS[task][0](rows, answerer, trainable)
    return answers.summary(scored, SHOWN), answers.problems(scored)


def check(tasks: Sequence[str], rows: Sequence[Row]) -> None:
    """Raises UserError for an unknown task and for rows that a task cannot be measured on."""
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"eval.tasks: unknown task {task!r}; tasks are {', '.join(TASKS)}")
        TASKS[task][1](rows)
