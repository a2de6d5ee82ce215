"""Rows -> tokens with a mask over what is trained: templates, exactly one BOS, and the boundary of an answer."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxft.bounds import bounded
from jaxft.data import conversation
from jaxft.data.conversation import is_jinja
from jaxft.data.marks import Marks, marks
from jaxft.data.rows import Row, Turn
from jaxft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "\ue000an answer\ue001"
CHUNK = 1024
VOCABULARY_BYTES, SETTINGS_BYTES = 64 << 20, 10 << 20  # of a tokenizer; Gemma 3's has 33 MB


@dataclass(frozen=True)
class Example:
    """A row as tokens: `tokens` int32 `[n]`, `loss_mask` bool `[n]`, True where the token is a target.

    `marks` are there where an evaluation counts some of them apart.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    origin: str
    marks: Marks | None = None


@dataclass(frozen=True)
class Counts:
    """What became of the rows: `cut` ones are among the `kept`; `longest` is in tokens, before any cut."""

    kept: int
    cut: int
    dropped: int
    longest: int
    tokens: int
    trained_tokens: int


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder; never the network, never code from the folder. Raises UserError."""
    # transformers reads it once, when imported, and would tell every user that PyTorch is missing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(f"tokenizer {folder}: no such folder (looked in {Path(folder).resolve().parent})")
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((Path(folder) / name).is_file() for name in names):
        raise UserError(f"tokenizer {folder}: no {' or '.join(names)} in it; name another one as model.tokenizer")
    _check_sizes(Path(folder))
    try:
        options = {"use_fast": True, "local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
        tokenizer("a")  # some settings that make no sense show only here
        return tokenizer
    except Exception as error:  # A broken file surfaces as any of a dozen types; the chain keeps it for --debug.
        what = " ".join(str(error).split())
        raise UserError(f"tokenizer {folder}: cannot be loaded ({type(error).__name__}: {what:.300})") from error


def _check_sizes(folder: Path) -> None:
    """Raises UserError for files that would fill the memory; a model's weights and their index are not the tokenizer's."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix == ".json" and ".safetensors" not in file.name:
            large = file.name in ("tokenizer.json", "vocab.json")
            bounded(file, VOCABULARY_BYTES if large else SETTINGS_BYTES, 5_000_000 if large else 500_000)
        elif file.suffix in (".jinja", ".model", ".txt") and file.stat().st_size > VOCABULARY_BYTES:
            raise UserError(f"{file}: {file.stat().st_size:,} bytes; expected at most {VOCABULARY_BYTES:,}")


def choose_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """For the value of data.template: plain, chat, or the text of a Jinja template. Raises UserError."""
    if template.endswith(".jinja"):
        template = _read_template(Path(template))
    if is_jinja(template):
        return template
    if template not in ("auto", "plain", "chat"):
        raise UserError(
            f"data.template: unknown template {template!r}; use auto, plain, chat, or a Jinja template of your own "
            "(its text, or a .jinja file)"
        )
    if template == "chat" and not tokenizer.chat_template:
        raise UserError("data.template: chat, but the tokenizer has no chat template; set data.template plain")
    chosen = ("chat" if tokenizer.chat_template else "plain") if template == "auto" else template
    if chosen == "plain":
        _eos(tokenizer)
    return chosen


def _read_template(file: Path) -> str:
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.template: {file}: cannot be read ({type(error).__name__}); give a file of UTF-8"
        ) from error
    if not is_jinja(text):
        raise UserError(f"data.template: {file}: no Jinja template; it has no {{{{ … }}}} and no {{% … %}}")
    return text


def template_name(template: str) -> str:
    """How a chosen template is called in a line."""
    return "the config's Jinja template" if is_jinja(template) else template


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.eos_token:
        raise UserError(
            "tokenizer: it has no EOS, so a model trained with data.template plain would never stop; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token


@dataclass(frozen=True)
class Rendered:
    """A row as text, and the spans `[start, end)` of characters that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]


def render(row: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> Rendered:
    """The row's text under `template` (as `choose_template` gave it) with its trained spans, end of turn included."""
    if row.turns[-1].role == "text":
        text = _ended(row.turns[-1].content, _eos(tokenizer))
        return Rendered(text, ((0, len(text)),))
    if template != "plain":
        return _render_chat(row, tokenizer, template)
    if row.prompt is not None:
        text = row.prompt + _ended(row.turns[-1].content, _eos(tokenizer))
        return Rendered(text, ((len(row.prompt), len(text)),))
    return _render_plain(row.turns, _eos(tokenizer))


def _ended(answer: str, eos: str) -> str:
    """Text with exactly one EOS at its end: rows rendered beforehand bring their own."""
    return answer if answer.endswith(eos) else answer + eos


def _render_plain(turns: Sequence[Turn], eos: str) -> Rendered:
    """`Question: …\\nAnswer: …` for each exchange.

    The space before an answer is the answer's: at the end of a prompt it would be a token of its own, where training
    saw it joined to the first word.
    """
    text, spans = "", []
    for turn in turns:
        if turn.role == "assistant":
            text += "\nAnswer:" if text else "Answer:"
            start = len(text)
            text += _ended(f" {turn.content}", eos)
            spans.append((start, len(text)))
        else:
            text += ("\n\n" if text else "") + ("Question: " if turn.role == "user" else "") + turn.content
    return Rendered(text, tuple(spans))


def _render_chat(row: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> Rendered:
    """A Jinja template with its spans found by prefixes, which works for any template.

    An answer is what comes between the conversation before it, rendered with the generation prompt, and the
    conversation with it.
    """
    whole = _chat(row.turns, tokenizer, template, row.origin, False)
    ending = _after_answers(tokenizer, template)
    spans = []
    for i, turn in enumerate(row.turns):
        if turn.role != "assistant" or all(earlier.role != "user" for earlier in row.turns[:i]):
            continue  # what an assistant says before anybody asked cannot be prompted for
        number, last = len(spans) + 1, i == len(row.turns) - 1
        before = _chat(row.turns[:i], tokenizer, template, row.origin, True)
        after = whole if last else _chat(row.turns[: i + 1], tokenizer, template, row.origin, False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{row.origin}: the chat template cannot be masked: what it renders before answer {number} "
                "is no prefix of the whole conversation; set data.template plain"
            )
        if ending is None or turn.content.strip() not in after[len(before) :]:
            raise UserError(f"{row.origin}: the chat template drops answer {number}; set data.template plain")
        spans.append((len(before), len(after)))
    if not spans:
        raise UserError(f"{row.origin}: no answer follows a user's turn; mend the row, or set data.template plain")
    if ending is not None and not ending.strip():  # a model would learn never to stop
        whole += _eos(tokenizer)
        spans[-1] = (spans[-1][0], len(whole))
    return Rendered(whole, tuple(spans))


@functools.lru_cache(maxsize=8)
def _after_answers(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """What the template puts after the last answer; None where it does not show the answer."""
    turns = (Turn("user", "?"), Turn("assistant", PROBE))
    text = _chat(turns, tokenizer, template, "data.template", False)
    return text.partition(PROBE)[2] if PROBE in text else None


def _chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: str, origin: str, generate: bool) -> str:
    """What a template makes of the turns: the tokenizer's own for chat, else the one given."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    remedy = "mend the row, or set data.template plain"
    return conversation.render(messages, tokenizer, template, origin=origin, generate=generate, remedy=remedy)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before ordinary text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts that carry their own special tokens."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _bos(text_tokens: list[int], tokenizer: PreTrainedTokenizerBase, wanted: bool) -> list[int]:
    """The BOS to put in front: none where the text, rendered by a template, begins with it already."""
    return [tokenizer.bos_token_id] if wanted and text_tokens[:1] != [tokenizer.bos_token_id] else []


def prompt_tokens(source: Row | Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """What a model is given to answer: a row before its last answer, or turns that end with the user's.

    Begins with BOS exactly once and ends with the generation prompt. A text row gives BOS alone, because all of it is
    trained; text given as turns is the prompt itself.
    """
    text = _prompt(source, tokenizer, template)
    tokens = _tokenize([text], tokenizer)[0] if text else []
    return _bos(tokens, tokenizer, adds_bos(tokenizer)) + tokens


def _prompt(source: Row | Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    turns, row = (source.turns, source) if isinstance(source, Row) else (tuple(source), None)
    if turns[-1].role == "text":
        return "" if row else turns[-1].content
    turns = turns[:-1] if turns[-1].role == "assistant" else turns
    if template != "plain":
        return _chat(turns, tokenizer, template, row.origin if row else "prompt", True)
    if row and row.prompt is not None:
        return row.prompt
    text = _render_plain(turns, _eos(tokenizer)).text
    return text + ("\nAnswer:" if text else "Answer:")


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, template: str, train_on: str = "all") -> Example:
    """One row as tokens; see `encode_rows` for many."""
    return next(encode_rows([row], tokenizer, template, train_on))


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: str, train_on: str = "all"
) -> Iterator[Example]:
    """Examples in the rows' order, whole, with all assistant turns trained or the last.

    Tokenised in chunks, on all cores: one call a row would cost five times as much.
    """
    wanted = adds_bos(tokenizer)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        rendered = _rendered(chunk, tokenizer, template, train_on)
        texts = list(dict.fromkeys(text for r in rendered for text in _pieces(r)))
        tokens = dict(zip(texts, _tokenize(texts, tokenizer), strict=True)) if texts else {}
        for row, r in zip(chunk, rendered, strict=True):
            yield _example(r, tokens, _bos(tokens[r.text], tokenizer, wanted), row.origin)


def marked(
    examples: Sequence[Example],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    train_on: str = "all",
) -> list[Example]:
    """What `encode_rows` made of the rows, with marks; those rows are tokenised once more, with their characters' places."""
    rendered = _rendered(rows, tokenizer, template, train_on)
    sizes = [len(example.tokens) for example in examples]
    found = marks([r.text for r in rendered], [r.spans for r in rendered], sizes, tokenizer)
    return [replace(example, marks=of_row) for example, of_row in zip(examples, found, strict=True)]


def _rendered(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: str, train_on: str) -> list[Rendered]:
    rendered = [render(row, tokenizer, template) for row in rows]
    return [replace(r, spans=r.spans[-1:]) for r in rendered] if train_on == "last" else rendered


def _pieces(rendered: Rendered) -> Iterator[str]:
    """The texts whose tokens place the mask: the whole, and the whole up to each boundary."""
    yield rendered.text
    for boundary in {b for span in rendered.spans for b in span} - {0, len(rendered.text)}:
        yield rendered.text[:boundary]


def _example(rendered: Rendered, tokens: dict[str, list[int]], bos: list[int], origin: str) -> Example:
    whole = tokens[rendered.text]
    mask = np.zeros(len(bos) + len(whole), bool)
    for start, end in rendered.spans:
        first = _common(whole, tokens[rendered.text[:start]]) if start else 0
        last = len(whole)
        if end < len(rendered.text):
            through = tokens[rendered.text[:end]]
            last = _common(whole, through)
            last += last < len(through)  # A token that holds the answer's end and more is trained, as at its start.
        mask[len(bos) + first : len(bos) + last] = True
    mask[0] = False  # Nothing comes before the first token that could predict it.
    return Example(np.array(bos + whole, np.int32), mask, origin)


def _common(whole: list[int], part: list[int]) -> int:
    """Length of the common prefix."""
    if whole[: len(part)] == part:
        return len(part)
    return next(i for i, token in enumerate(part) if i >= len(whole) or whole[i] != token)


def encode_all(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    vocab_size: int | None = None,
) -> tuple[list[Example], Counts]:
    """Rows as examples of at most `max_length` tokens; see `encode_rows` and `fit`."""
    return fit(encode_rows(rows, tokenizer, template), max_length, tokenizer=tokenizer, vocab_size=vocab_size)


def fit(
    examples: Iterable[Example],
    max_length: int,
    on_long_row: str = "cut",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int | None = None,
) -> tuple[list[Example], Counts]:
    """Examples of at most `max_length` tokens, and what became of the rows.

    A longer row is cut at its end where a target remains, else dropped; with `on_long_row` drop it always is. Raises
    UserError where none is left, and for a token id that a model of `vocab_size` does not have.
    """
    kept, lengths, cut = [], [], 0
    for example in examples:
        if vocab_size is not None:
            _check_ids(example, tokenizer, vocab_size)
        lengths.append(len(example.tokens))
        long, mask = lengths[-1] > max_length, example.loss_mask[:max_length]
        if mask.any() and not (long and on_long_row == "drop"):
            cut += long
            of_row = example.marks and example.marks.first(max_length)
            kept.append(replace(example, tokens=example.tokens[:max_length], loss_mask=mask, marks=of_row))
    if not lengths:
        raise UserError("data: no rows to encode")
    if not kept:
        raise UserError(
            f"data.max_length: {max_length} tokens leave no room for the answer of any of {len(lengths)} rows; "
            f"the shortest row has {min(lengths)} tokens; raise data.max_length"
        )
    tokens = sum(len(example.tokens) for example in kept)
    trained = sum(int(example.loss_mask.sum()) for example in kept)
    return kept, Counts(len(kept), cut, len(lengths) - len(kept), max(lengths), tokens, trained)


def _check_ids(example: Example, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises UserError for a token id that a model of `vocab_size` does not have: indexing would clamp it in silence."""
    worst = int(example.tokens.max(initial=0))
    if worst >= vocab_size:
        text = tokenizer.convert_ids_to_tokens(worst)
        raise UserError(
            f"{example.origin}: token id {worst} ({text!r}) is beyond the model's vocabulary of {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
