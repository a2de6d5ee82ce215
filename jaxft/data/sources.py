"""Where rows come from: local files, a Hub dataset, or one of the generators, all as (origin, record) pairs."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxft.errors import UserError

MAX_ROW_BYTES = 10 * 2**20
MAX_ARRAY_BYTES = 2**30  # of a file that is read whole: JSON arrays and CSV
MAX_EXPANSION, SMALL_BYTES = 100, 2**26  # Parquet's compression, in files whose content is larger than small
BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)
PARQUET_ROWS = 8  # read at a time: a dictionary of one long text makes many long rows

Records = Iterator[tuple[str, Any]]
"""Pairs of an origin (`file:line`, lines from 1) and the parsed record, or the BadRow found in its place."""


class BadRow(Exception):
    """Why one row cannot be used; reading can go on after it."""


def read_files(paths: tuple[str, ...]) -> Records:
    """Records of all `paths`, in order. Raises UserError for a missing, empty, unreadable or unsupported file."""
    for path in paths:
        reader = _reader(Path(path))
        empty = True
        try:
            for line, record in reader(Path(path)):
                empty = False
                yield f"{path}:{line}", record
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        if empty:
            raise UserError(f"{path}: no rows in it; give a file with at least one")


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[int, Any]]]:
    readers = {".jsonl": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: unsupported suffix {path.suffix!r}; use {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file (looked in {path.parent.resolve()}); check data.files")
    return readers[path.suffix.lower()]


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """A JSON array, or one object per line; the first character tells which, because .json files hold either."""
    with path.open("rb") as handle:
        start = handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    yield from _json_array(path) if start.startswith(b"[") else _json_lines(path)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    with path.open("rb") as handle:
        while line := handle.readline(MAX_ROW_BYTES + 1):
            number, size = number + 1, len(line)
            while size > MAX_ROW_BYTES and not line.endswith(b"\n") and (line := handle.readline(2**16)):
                size += len(line)  # never the whole of a line that is too long
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if size > MAX_ROW_BYTES:
                yield number, BadRow(_too_long(size))
            elif line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(_not_utf8(error))
    except RecursionError:
        return BadRow("JSON nested too deeply")
    except ValueError as error:
        return BadRow(f"not JSON ({error}); expected one object per line, or one array of objects")


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    """Elements of one array with the line each begins on; JSON that breaks off is no row's fault, so it stops all."""
    text, decoder, line, counted = _text_of(path), json.JSONDecoder(), 1, 0
    at = _skip_space(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            record, end = _element(decoder, text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{line}: not JSON ({error}); expected an array of objects") from error
        yield line, record
        at = _skip_space(text, end)
        if text[at : at + 1] not in (",", "]"):
            line += text.count("\n", counted, at)
            raise UserError(f"{path}:{line}: not JSON (expected , or ] after an element); is the file cut off?")
        at = _skip_space(text, at + 1) if text[at] == "," else at
    if text[at + 1 :].strip():
        raise UserError(f"{path}:{line}: not JSON (something follows the array); expected one array of objects")


def _element(decoder: json.JSONDecoder, text: str, at: int) -> tuple[Any, int]:
    """The element that begins at `at`, and its end; one that is too long is a BadRow, and never parsed."""
    size = 1 << 12
    while True:
        try:
            record, end = decoder.raw_decode(text[at : at + size])
            if end + len("e+0") < size or at + end == len(text):  # else a number may go on
                return record, at + end
        except ValueError:
            if at + size >= len(text) and size <= MAX_ROW_BYTES:
                raise
        if size > MAX_ROW_BYTES:
            end = _end(text, at)
            return BadRow(_too_long(end - at)), end
        size = min(16 * size, MAX_ROW_BYTES + 1)


def _end(text: str, at: int) -> int:
    """Where an element ends, found without parsing it. Raises ValueError."""
    depth = 0
    for found in BRACKET.finditer(text, at):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0][0], 0)
        if depth <= 0:
            return found.end()
    raise ValueError("it does not end")


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _text_of(path: Path) -> str:
    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise UserError(f"{path}: more than {MAX_ARRAY_BYTES >> 20:,} MB; write one JSON object per line (.jsonl)")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: {_not_utf8(error)}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"


def _too_long(size: int) -> str:
    return f"row of {size / 2**20:.0f} MB; at most {MAX_ROW_BYTES // 2**20} MB are read"


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_ROW_BYTES)  # The default of 128 kB is shorter than some answers.
    reader = csv.DictReader(_text_lines(path), strict=True)
    line = 2  # A quoted field may hold line breaks: a row begins on the line after the last one's end.
    try:
        for record in reader:
            if None in record:
                yield line, BadRow(f"more than the {len(reader.fieldnames or ())} fields of the header")
            else:
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not CSV ({error}); is a quote left open?") from error


def _text_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, however those are written; none is longer than a row may be."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        while True:
            try:
                line = stream.readline(MAX_ROW_BYTES + 1)
            except UnicodeDecodeError:
                _say_not_utf8(path)
                raise
            if len(line) > MAX_ROW_BYTES:
                raise csv.Error(f"field larger than field limit ({MAX_ROW_BYTES})")
            if not line:
                return
            yield line


def _say_not_utf8(path: Path) -> None:
    """Raises UserError with the line."""
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_ROW_BYTES), b""), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: {_not_utf8(error)}") from error


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_expansion(path, file.metadata)
            content, most = 0, max(SMALL_BYTES, MAX_EXPANSION * path.stat().st_size)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                content += batch.nbytes
                if content > most:  # a dictionary's text counts once in what a file says of itself
                    raise UserError(f"{path}: unpacks to more than {most:,} bytes, {MAX_EXPANSION} times its own")
                rows = batch.to_pylist() if batch.nbytes <= MAX_ROW_BYTES * PARQUET_ROWS else [None] * batch.num_rows
                for record in rows:
                    number += 1
                    yield number, BadRow(_too_long(batch.nbytes // batch.num_rows)) if record is None else record
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not Parquet that can be read ({error})") from error


def _check_expansion(path: Path, metadata: Any) -> None:
    """Raises UserError for a file that says of itself that it holds far more than it has bytes."""
    size = path.stat().st_size
    content = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if content > SMALL_BYTES and content > MAX_EXPANSION * size:
        raise UserError(
            f"{path}: {size:,} bytes that unpack to {content:,}; at most {MAX_EXPANSION} times as many are read"
        )


def read_name(name: str, subset: str | None, split: str) -> Records:
    """Records of `split` of a Hub dataset, a local dataset folder, or `generated:…`; raises UserError."""
    rows = _generated(name, split) if name.startswith("generated:") else _hub(name, subset, split)
    empty = True
    for number, record in enumerate(rows, 1):
        empty = False
        yield f"{name}/{split}:{number}", record
    if empty:
        raise UserError(f"data.name {name}: split {split} has no rows")


def _generated(name: str, split: str) -> list[dict[str, str]]:
    from jaxft.tiny import corpus, problems

    if name == "generated:word_problems":
        return problems.rows(split)
    if name != "generated:corpus":
        raise UserError(f"data.name {name}: unknown generator; there are generated:word_problems and generated:corpus")
    return corpus.rows(split)


def _hub(name: str, subset: str | None, split: str) -> Any:
    import datasets

    # Every retry of a request would be a line on stderr before the one that says what is wrong.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # The library raises dozens of types; the chain keeps them for --debug.
        what = " ".join(str(error).split()) or type(error).__name__
        where = f"data.name {name} (subset {subset}, split {split})"
        raise UserError(f"{where}: {what:.400}; {_remedy(error, what)}") from error


def _remedy(error: Exception, what: str) -> str:
    if "gated" in what.lower():
        return "accept its terms on the Hub and run `hf auth login`, or set HF_TOKEN"
    if "Unknown split" in what:
        return "set data.split to one of these"
    if "config" in what.lower() and ("missing" in what or "not found" in what):
        return "set data.subset to one of these"
    if isinstance(error, ConnectionError) or "offline" in what.lower():
        return "offline, and not in the local cache: connect to the network, or give local files with data.files"
    return "check data.name, data.subset and data.split, or give local files with data.files"
