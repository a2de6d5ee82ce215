"""Records of any known format -> rows of turns, split into train, validation and test."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxft import config
from jaxft.data import sources
from jaxft.data.sources import BadRow, Records
from jaxft.errors import UserError

ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip

# The prompts of the Alpaca paper's code. The line break before the answer is the prompt's, so that generation starts
# where training did.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

MAX_BAD_SHARE = 0.01
CALCULATOR = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True)
class Turn:
    """One message; `role` is system, user, assistant, or text (trained whole, without a template)."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One example. Its last turn is an assistant's or a text."""

    turns: tuple[Turn, ...]
    origin: str
    """file:line or name/split:row, for messages."""
    prompt: str | None = None
    """What the plain template puts, verbatim, before a single answer; None renders the turns."""


@dataclass(frozen=True)
class Splits:
    """Rows for each purpose, the format they came in, how many were left out, and lines to print about them."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    format: str
    skipped: int
    notes: list[str]


def load(data: config.Data, seed: int) -> Splits:
    """Reads the sources that `data` names and splits off the validation rows. Raises UserError, one line per fault."""
    format, notes, skipped = data.format, _ignored(data), 0
    _check_columns(data.columns)
    if format != "auto" and format not in FORMATS:
        raise UserError(f"data.format: unknown format {format!r}; use auto, {', '.join(FORMATS)}")
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for part, (label, records) in _sources(data).items():
        limit = data.limit if part == "train" else None
        parts[part], verdict, bad = _read(_renamed(records, data.columns), label, format, data.on_bad_row, limit)
        skipped += bad
        notes.append(f"{part}: {len(parts[part])} rows of {label}" + (f", {bad} bad rows left out" if bad else ""))
        if part == "train":
            format = verdict
            notes.insert(len(notes) - 1, f"format: {format} (fields {', '.join(FORMATS[format][0])})")
    if not parts["validation"] and data.validation_fraction > 0:
        parts["train"], parts["validation"] = split(parts["train"], data.validation_fraction, seed)
        notes.append(f"validation: {len(parts['validation'])} of these rows held out, {len(parts['train'])} trained on")
    if data.calculator == "strip":  # after the split, which then holds out the same rows either way
        parts = {part: [_without_annotations(row) for row in found] for part, found in parts.items()}
    return Splits(**parts, format=format, skipped=skipped, notes=notes)


def _check_columns(columns: dict[str, str]) -> None:
    known = {field for fields, _ in FORMATS.values() for field in fields} | {"input"}
    for field in columns:
        if field not in known:
            raise UserError(f"data.columns: no format has a field {field!r}; fields are {', '.join(sorted(known))}")


def _renamed(records: Records, columns: dict[str, str]) -> Records:
    """Records with their columns under the names of the format's fields."""
    for origin, record in records:
        if columns and isinstance(record, dict):
            missing = [column for column in columns.values() if column not in record]
            if missing:
                record = BadRow(f"data.columns: no column {missing[0]!r}; fields seen: {_fields(record)}")
            else:
                record = record | {field: record[column] for field, column in columns.items()}
        yield origin, record


def _without_annotations(row: Row) -> Row:
    """The row with the calculator's `<<48/2=24>>` taken out of its answers."""
    turns = [replace(t, content=CALCULATOR.sub("", t.content)) if t.role == "assistant" else t for t in row.turns]
    if not all(turn.content.strip() for turn in turns if turn.role == "assistant"):
        raise UserError(f"{row.origin}: nothing is left of an answer without annotations; set data.calculator keep")
    return replace(row, turns=tuple(turns))


def _ignored(data: config.Data) -> list[str]:
    """A note where files displace a named data set, because both are easily set by a config and an override."""
    if not (data.files and data.name):
        return []
    keys = ["split"] + [k for k in ("subset", "validation_split", "test_split") if getattr(data, k)]
    return [f"data.files are used; data.name {data.name} and its {', '.join(keys)} are ignored"]


def _sources(data: config.Data) -> dict[str, tuple[str, Records]]:
    """Label and records of each part that has a source of its own; train comes first."""
    files = {"train": data.files, "validation": data.validation_files, "test": data.test_files}
    splits = {"train": data.split, "validation": data.validation_split, "test": data.test_split}
    found: dict[str, tuple[str, Records]] = {}
    for part in files:
        if files[part]:
            found[part] = (" ".join(files[part]), sources.read_files(files[part]))
        elif splits[part] and data.name and not data.files:
            found[part] = (f"{data.name}/{splits[part]}", sources.read_name(data.name, data.subset, splits[part]))
    if "train" not in found:
        raise UserError("data.name and data.files: both empty; give a dataset's name or files")
    return found


def _read(records: Records, label: str, format: str, on_bad_row: str, limit: int | None) -> tuple[list[Row], str, int]:
    """The rows, the format (decided by the first record where auto) and the number of bad rows left out."""
    rows: list[Row] = []
    bad: list[str] = []
    for origin, record in records:
        try:
            if format == "auto":
                format = _detect(_checked(record), origin)
            rows.append(_convert(record, format, origin))
        except BadRow as error:
            bad.append(f"{origin}: {error}")
            if on_bad_row == "stop":
                raise UserError(f"{bad[0]}; mend it, or leave bad rows out with data.on_bad_row skip") from error
        if len(rows) == limit:
            break
    if len(bad) > MAX_BAD_SHARE * (len(bad) + len(rows)):
        total = len(bad) + len(rows)
        raise UserError(f"{label}: {len(bad)} of {total} rows are bad, more than 1 %; the first: {bad[0]}")
    return rows, format, len(bad)


def _checked(record: Any) -> dict[str, Any]:
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow(f"expected an object with named fields, found {_say(record)}")
    return record


def _detect(record: dict[str, Any], origin: str) -> str:
    for format, (fields, _) in FORMATS.items():
        if all(field in record for field in fields):
            return format
    known = "; ".join(f"{format}: {', '.join(fields)}" for format, (fields, _) in FORMATS.items())
    raise UserError(f"{origin}: no known format has the fields {_fields(record)}; expected one of {known}")


def _convert(record: Any, format: str, origin: str) -> Row:
    fields, convert = FORMATS[format]
    record = _checked(record)
    missing = [field for field in fields if field not in record]
    if missing:
        raise BadRow(f"format {format} needs {', '.join(missing)}; fields seen: {_fields(record)}")
    turns, prompt = convert(record)
    if not turns[-1].content.strip():
        raise BadRow(f"empty answer; fields seen: {_fields(record)}")
    return Row(tuple(turns), origin, prompt)


def _gsm8k(record: dict[str, Any]) -> tuple[list[Turn], None]:
    return [Turn("user", _text(record, "question")), Turn("assistant", _text(record, "answer"))], None


def _alpaca(record: dict[str, Any]) -> tuple[list[Turn], str]:
    instruction, answer = _text(record, "instruction"), _text(record, "output")
    given = _text(record, "input") if record.get("input") is not None else ""
    prompt = (ALPACA_WITH_INPUT if given else ALPACA).format(instruction=instruction, input=given)
    return [Turn("user", f"{instruction}\n\n{given}" if given else instruction), Turn("assistant", answer)], prompt


def _prompt_completion(record: dict[str, Any]) -> tuple[list[Turn], str]:
    prompt = _text(record, "prompt")
    return [Turn("user", prompt), Turn("assistant", _text(record, "completion"))], prompt


def _plain_text(record: dict[str, Any]) -> tuple[list[Turn], None]:
    return [Turn("text", _text(record, "text"))], None


def _messages(record: dict[str, Any]) -> tuple[list[Turn], None]:
    return _conversation(record, "messages"), None


def _sharegpt(record: dict[str, Any]) -> tuple[list[Turn], None]:
    return _conversation(record, "conversations"), None


def _conversation(record: dict[str, Any], field: str) -> list[Turn]:
    """Turns up to the last answer: what follows it (ShareGPT often ends with the human) has no answer to learn."""
    messages = record[field]
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise BadRow(f"{field}: expected a list of objects, found {_say(messages)}; fields seen: {_fields(record)}")
    turns = [_turn(message, f"{field}[{i}]") for i, message in enumerate(messages)]
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise BadRow(f"{field}: no assistant turn among {len(turns)}; fields seen: {_fields(record)}")
    for i in answers:
        if not turns[i].content.strip():
            raise BadRow(f"{field}[{i}]: empty answer; fields seen: {_fields(messages[i])}")
    return turns[: answers[-1] + 1]


def _turn(message: dict[str, Any], where: str) -> Turn:
    role_key = "role" if "role" in message else "from"
    content_key = "content" if "content" in message else "value"
    if role_key not in message or content_key not in message:
        raise BadRow(f"{where}: expected role and content, or from and value; fields seen: {_fields(message)}")
    role = ROLES.get(str(message[role_key]).lower())
    if role is None:
        raise BadRow(f"{where}: unknown {role_key} {_say(message[role_key])}; known: {', '.join(ROLES)}")
    return Turn(role, _text(message, content_key, f"{where}."))


def _text(record: dict[str, Any], field: str, where: str = "") -> str:
    value = record[field]
    if not isinstance(value, str):
        raise BadRow(f"{where}{field}: expected text, found {_say(value)}; fields seen: {_fields(record)}")
    if len(value) > sources.MAX_ROW_BYTES:
        raise BadRow(f"{where}{field}: text of {len(value) / 2**20:.0f} MB; at most 10 MB are read")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise BadRow(f"{where}{field}: half a surrogate pair, which is no Unicode text")
    return value


def _fields(record: dict[str, Any]) -> str:
    return f"{', '.join(map(str, record)):.200}" or "none"


def _say(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], tuple[list[Turn], str | None]]]] = {
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "gsm8k": (("question", "answer"), _gsm8k),
    "alpaca": (("instruction", "output"), _alpaca),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "text": (("text",), _plain_text),
}
"""Format -> the fields it needs, and record -> (turns, plain prompt). Detection takes the first whose fields are there:
`text` is last because data sets in the other formats carry a rendered copy under that name."""


def split(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Train and validation rows, both in their first order; rows with equal text stay on one side.

    Groups of equal rows are drawn in the order of a hash of (seed, text), so the draw depends neither on the rows'
    order nor on a library's random stream. At least one validation row, unless all rows are equal.
    """
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_key(row, seed), []).append(index)
    held: list[int] = []
    target = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    drawn = [groups[key] for key in sorted(groups)]
    for group in drawn:
        if len(held) + len(group) <= target:
            held += group
    if not held and len(drawn) > 1:
        held = min(drawn, key=len)
    out = set(held)
    return [r for i, r in enumerate(rows) if i not in out], [r for i, r in enumerate(rows) if i in out]


def _key(row: Row, seed: int) -> bytes:
    text = "\0".join(" ".join(f"{turn.role} {turn.content}".split()).casefold() for turn in row.turns)
    return hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=16).digest()
