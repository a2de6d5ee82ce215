"""GSM8K's protocols asked by jaxft itself: the training template, the harness's prompts, voting samples, a second pass."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from jaxft.analysis.gsm8k.answers import FLEXIBLE, STRICT, exact_match
from jaxft.analysis.gsm8k.mistakes import mistake
from jaxft.analysis.statistics import standard_error
from jaxft.data import chat, conversation
from jaxft.data.rows import Row, Turn
from jaxft.errors import UserError
from jaxft.evals import protocols
from jaxft.evals.decode import Generator, Sampling, continuation, eos_ids
from jaxft.evals.measurement import Answer, Document, Measurement, Side, check_pairs, classes_of, sha256
from jaxft.evals.protocols import PROTOCOLS, Protocol
from jaxft.evals.self_consistency import majority, majority_vote
from jaxft.evals.subject import Subject
from jaxft.evals.tasks import fitted, question

SAMPLES = 8
TRAINING = "final_answer"

_TRAINING = Protocol(TRAINING, 1, "", "", 0, (STRICT, FLEXIBLE), (), "`#### N`")
_ONCE = (_TRAINING, *(PROTOCOLS[name] for name in ("gsm8k", "gsm8k_cot", "gsm8k_cot_zeroshot")))


@dataclass(frozen=True)
class Task:
    """A protocol, asked once, by `votes` of several samples, or once more after a request to check (`refined`)."""

    name: str
    protocol: Protocol
    votes: bool = False
    refined: bool = False
    seen: bool = False
    """Whether the rows are those trained on."""

    @property
    def in_training_template(self) -> bool:
        """Whether rows are asked as training asked them, and not as the harness words them."""
        return self.protocol.name == TRAINING


TASKS = {
    task.name: task
    for task in (
        *(Task(protocol.name, protocol) for protocol in _ONCE),
        *(Task(f"{protocol.name}_refined", protocol, refined=True) for protocol in _ONCE),
        Task("gsm8k_cot_self_consistency", PROTOCOLS["gsm8k_cot_self_consistency"], votes=True),
        Task(f"{TRAINING}_self_consistency", replace(_TRAINING, extractors=(STRICT,), temperature=0.2), votes=True),
    )
}

SEEN = Task(f"{TRAINING}_train_rows", _TRAINING, seen=True)


@dataclass(frozen=True)
class Settings:
    """How native tasks are asked; None leaves a task its own. `template` is a chosen one (`chat.choose_template`)."""

    template: str
    shots: int | None = None
    samples: int = SAMPLES
    temperature: float | None = None
    seed: int = 1234
    batch_size: int = 16
    max_new_tokens: int = protocols.MAX_NEW_TOKENS
    in_training_template: int = protocols.MAX_NEW_TOKENS
    """The same, of final_answer."""
    chat: bool = False


class Prompt(NamedTuple):
    """A prompt as text and as the tokens that the model reads; `turns` is the conversation that it renders, if any."""

    text: str
    tokens: list[int]
    turns: tuple[Turn, ...] | None = None


class Said(NamedTuple):
    """A generated text, whether it was cut at the limit, and its tokens."""

    text: str
    truncated: bool
    tokens: int


def measure(
    task: Task,
    subject: Subject,
    rows: Sequence[Row],
    pool: Sequence[Row],
    settings: Settings,
    told: Callable[[str, Side], None] = lambda side, found: None,
) -> Measurement:
    """Asks all `rows` of every side of the subject, and grades. `told` hears of each side when it is done."""
    plain = [{"question": question(row), "answer": row.turns[-1].content} for row in rows]
    asker = _Asker(task, subject, settings)
    prompts = asker.prompts(rows, plain, pool)
    classes = classes_of(plain)
    documents = [
        Document(i, sha256(prompt.text), row["question"], row["answer"], of_row)
        for i, (prompt, row, of_row) in enumerate(zip(prompts, plain, classes, strict=True))
    ]
    sides, metrics = {}, {}
    for name, trainable in subject.sides.items():
        began = time.perf_counter()
        said = asker.say(prompts, trainable)
        second = asker.say(asker.again(prompts, said), trainable) if task.refined else None
        seconds = time.perf_counter() - began
        answers = _graded(task, plain, said, second, settings)
        metrics = {metric: True for metric in answers[0].values}
        tokens = sum(each.tokens for part in (said, second or []) for samples in part for each in samples)
        sides[name] = Side(answers, seconds, tokens, _results(task, answers))
        told(name, sides[name])
    protocol = asker.described(prompts, documents)
    measurement = Measurement(task.name, "native", protocol, documents, sides, metrics, seen=task.seen)
    check_pairs(measurement)
    return measurement


class _Asker:
    """Prompts and answers of one task."""

    def __init__(self, task: Task, subject: Subject, settings: Settings):
        self.task, self.subject, self.settings = task, subject, settings
        self.tokenizer, arch = subject.tokenizer, subject.model.arch
        self.generator = Generator(subject.model, eos_ids(subject.model, self.tokenizer), self.tokenizer)
        self.new = settings.max_new_tokens
        if task.in_training_template:  # as training's own measurement does it
            self.new = min(settings.in_training_template, arch.max_positions // 2)
        self.room = arch.max_positions - self.new
        if self.room < 1:
            raise UserError(
                f"--max-new-tokens: {self.new} new tokens leave no room for a prompt in {arch.max_positions} positions"
            )
        own = task.protocol.temperature if settings.temperature is None else settings.temperature
        self.sampling = (
            Sampling(own, samples=settings.samples, seed=settings.seed) if task.votes else Sampling(seed=settings.seed)
        )
        eos = "" if self.tokenizer.eos_token_id is None else self.tokenizer.decode(self.tokenizer.eos_token_id)
        self.stops = [] if task.in_training_template else [*task.protocol.stops, *([eos] if eos else [])]
        self.shots = task.protocol.shots if settings.shots is None or not task.protocol.shots else settings.shots

    def prompts(self, rows: Sequence[Row], plain: Sequence[Mapping[str, str]], pool: Sequence[Row]) -> list[Prompt]:
        if self.task.in_training_template:
            return [self._in_template(row) for row in rows]
        shown = [{"question": question(row), "answer": row.turns[-1].content} for row in pool]
        options = {"pool": shown, "shots": self.shots}
        if not self.settings.chat:
            return [self._text(text) for text in protocols.prompts(self.task.protocol, plain, **options)]
        asked = protocols.conversations(self.task.protocol, plain, **options)
        return [self._conversation(tuple(Turn(m["role"], m["content"]) for m in messages)) for messages in asked]

    def again(self, prompts: Sequence[Prompt], said: Sequence[Sequence[Said]]) -> list[Prompt]:
        """The prompts of the second pass."""
        first = [samples[0].text for samples in said]
        if prompts[0].turns is None:
            texts = [prompt.text for prompt in prompts]
            return [self._text(text) for text in protocols.refinement_prompts(self.task.protocol, texts, first)]
        request = Turn("user", protocols.check_request(self.task.protocol))
        asked = [
            (*prompt.turns, Turn("assistant", text.strip()), request)
            for prompt, text in zip(prompts, first, strict=True)
        ]
        return [
            self._in_template(turns) if self.task.in_training_template else self._conversation(turns) for turns in asked
        ]

    def _in_template(self, asked: Row | tuple[Turn, ...]) -> Prompt:
        tokens = chat.prompt_tokens(asked, self.tokenizer, self.settings.template)
        turns = asked if isinstance(asked, tuple) else asked.turns[:-1]
        return Prompt(self.tokenizer.decode(tokens), tokens, turns)

    def _text(self, text: str, turns: tuple[Turn, ...] | None = None) -> Prompt:
        return Prompt(text, self.subject.encode(text), turns)

    def _conversation(self, turns: tuple[Turn, ...]) -> Prompt:
        if self.tokenizer.chat_template is None:
            raise UserError("--chat: the tokenizer has no chat template; leave --chat out")
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return self._text(conversation.prompt(messages, self.tokenizer, remedy="leave --chat out"), turns)

    def read(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt that the model reads; of what is too long the harness keeps the end."""
        return fitted(prompt.tokens, self.room) if self.task.in_training_template else prompt.tokens[-self.room :]

    def say(self, prompts: Sequence[Prompt], trainable: dict[str, jax.Array]) -> list[list[Said]]:
        """The answers to each prompt, as many as there are samples."""
        read = [self.read(prompt) for prompt in prompts]
        options = {"sampling": self.sampling, "stop": self.stops, "batch_size": self.settings.batch_size}
        new = self.generator(read, max_new_tokens=self.new, trainable=trainable, **options)
        each = self.sampling.samples
        return [
            [self._said(prompt, tokens) for tokens in new[i * each : (i + 1) * each]] for i, prompt in enumerate(read)
        ]

    def _said(self, prompt: list[int], tokens: list[int]) -> Said:
        if self.task.in_training_template:
            return Said(continuation(self.tokenizer, prompt, tokens), len(tokens) == self.new, len(tokens))
        whole = self.tokenizer.decode(tokens, skip_special_tokens=True)
        text = protocols.cut(whole, self.stops)
        return Said(text, len(tokens) == self.new and text == whole, len(tokens))

    def described(self, prompts: Sequence[Prompt], documents: Sequence[Document]) -> dict[str, Any]:
        """How it was asked, JSON-ready."""
        task, settings = self.task, self.settings
        about = protocols.described(task.protocol, self.shots)
        if task.in_training_template:
            about |= {"protocol": "asked as training asked it", "template": chat.template_name(settings.template)}
        if task.votes:
            about |= {"decoding": f"temperature {self.sampling.temperature:g}, top_p 1, no top_k"}
            about |= {"samples": self.sampling.samples, "vote": f"majority of {self.sampling.samples}"}
        del about["repeats"]
        if task.refined:
            about["second_pass"] = protocols.check_request(task.protocol)
        return about | {
            "max_new_tokens": self.new,
            "stops": self.stops,
            "chat_template": settings.chat and not task.in_training_template,
            "seed": settings.seed,
            "shot_seed": protocols.SHOT_SEED,
            "cut_prompts": sum(len(prompt.tokens) > self.room for prompt in prompts),
            "prompts_sha256": sha256("\0".join(prompt.text for prompt in prompts)),
            "rows_sha256": hashlib.sha256(
                json.dumps([[d.question, d.reference] for d in documents]).encode()
            ).hexdigest(),
        }


def _graded(
    task: Task,
    rows: Sequence[Mapping[str, str]],
    said: Sequence[Sequence[Said]],
    second: Sequence[Sequence[Said]] | None,
    settings: Settings,
) -> list[Answer]:
    if task.votes:
        return _voted(task, rows, said, settings.samples)
    first = [_answer(task.protocol, row, samples[0]) for row, samples in zip(rows, said, strict=True)]
    if second is None:
        return first
    last = [_answer(task.protocol, row, samples[0]) for row, samples in zip(rows, second, strict=True)]
    return [replace(answer, first=before) for answer, before in zip(last, first, strict=True)]


def _answer(protocol: Protocol, row: Mapping[str, str], said: Said) -> Answer:
    reference = protocols.reference(protocol, row)
    found = {extract.name: extract(said.text) for extract in protocol.extractors}
    values = {f"exact_match,{name}": float(exact_match(text, reference)) for name, text in found.items()}
    wrong = mistake(row["question"], reference, said.text, truncated=said.truncated, extract=protocol.extractors[0])
    return Answer(said.text, values, found=found, truncated=said.truncated, mistake=wrong)


def _voted(task: Task, rows: Sequence[Mapping[str, str]], said: Sequence[Sequence[Said]], k: int) -> list[Answer]:
    """maj@k counts; beside it the first sample alone, and what k draws of one answer are right on average."""
    (extract,) = task.protocol.extractors
    answers = []
    for row, samples in zip(rows, said, strict=True):
        reference = protocols.reference(task.protocol, row)
        votes = [extract(each.text) for each in samples]
        right = [exact_match(vote, reference) for vote in votes]
        grade = majority_vote([[each.text for each in samples]], [reference], k, extract=extract)
        values = {
            f"exact_match,maj@{k}": float(exact_match(majority(votes), reference)),
            "exact_match,score-first": float(right[0]),
            f"equal_number,maj@{k}": grade.equal_number,
            f"exact_match,mean-of-{k}": sum(right) / k,
        }
        cut = sum(each.truncated for each in samples) / k
        answers.append(Answer([each.text for each in samples], values, found={f"maj@{k}": votes}, truncated=cut))
    return answers


def _results(task: Task, answers: Sequence[Answer]) -> dict[str, Any]:
    """As lm-evaluation-harness shapes a task's results."""
    results: dict[str, Any] = {"alias": task.name, "sample_len": len(answers)}
    for metric in answers[0].values:
        name, _, filter_ = metric.partition(",")
        values = [answer.values[metric] for answer in answers]
        results[metric] = sum(values) / len(values)
        results[f"{name}_stderr,{filter_}"] = standard_error(values) if len(values) > 1 else None
    return results


def check_rows(rows: Sequence[Row], what: str) -> None:
    """Raises UserError where there are no rows, or where references have no final answer."""
    without = [row for row in rows if STRICT(row.turns[-1].content) == "[invalid]"]
    if not rows:
        raise UserError(f"{what}: no rows; give some with --test-files or --data")
    if without:
        raise UserError(
            f"{what}: needs `#### NUMBER` in every reference; {len(without)} of {len(rows)} have none, first "
            f"{without[0].origin}; give rows in GSM8K's format with --test-files"
        )
