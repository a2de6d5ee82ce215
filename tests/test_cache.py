"""Tokenised rows on disk: found only where the same tokens would be made again, and never in the way."""

import dataclasses
import io
import os
import random
import time

import numpy as np
import pytest
from test_chat import CHATML, HEADERS, TALK, build, exchange
from tokenizers import AddedToken

from jaxft import train
from jaxft.config import Config, Data, Model, Optim
from jaxft.data import cache, chat, conversation
from jaxft.data.marks import KINDS
from jaxft.data.rows import Row, Turn

ROWS = [*(exchange(f"How many? {i}", f"{i} apples") for i in range(30)), TALK]


@pytest.fixture
def encoded(tmp_path, monkeypatch):
    """`cache.encoded` of the rows with these differences, and whether it had to tokenise them."""
    calls, real = [], cache._encode

    def counting(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(cache, "_encode", counting)

    def encoded(rows=ROWS, tokenizer=None, template="plain", train_on="all", folder=tmp_path / "tokens", marked=False):
        before = len(calls)
        examples = cache.encoded(rows, tokenizer or build(CHATML), template, train_on, folder, marked=marked)
        return examples, len(calls) > before

    encoded.folder = tmp_path / "tokens"
    return encoded


def same(one, two):
    return len(one) == len(two) and all(
        a.origin == b.origin
        and (a.tokens.dtype, a.loss_mask.dtype) == (b.tokens.dtype, b.loss_mask.dtype) == (np.int32, bool)
        and np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.loss_mask, b.loss_mask)
        and same_marks(a.marks, b.marks)
        for a, b in zip(one, two)
    )


def same_marks(one, two):
    if one is None or two is None:
        return one is two
    columns = [(one.bytes, two.bytes), *((one.kinds[kind], two.kinds[kind]) for kind in KINDS)]
    return one.cut == two.cut and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in columns)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("template", ["plain", "chat", CHATML.replace("\n", " ")])
def test_the_second_reading_equals_the_first_bit_for_bit(encoded, template):
    for train_on in ("all", "last"):
        first, made = encoded(template=template, train_on=train_on)
        second, again = encoded(template=template, train_on=train_on)
        assert made and not again and same(first, second)
        assert same(first, list(chat.encode_rows(ROWS, build(CHATML), template, train_on)))
    assert len(files(encoded.folder)) == 2 and all(name.endswith(".npz") for name in files(encoded.folder))


def test_marks_are_kept_beside_the_tokens(encoded):
    rows = [exchange("How many?", f"<<1+{i}={i + 1}>>{i + 1} Äpfel\n#### {i + 1}") for i in range(20)]
    first, made = encoded(rows, marked=True)
    second, again = encoded(rows, marked=True)
    assert made and not again and same(first, second)
    assert same(first, chat.marked(list(chat.encode_rows(rows, build(CHATML), "plain")), rows, build(CHATML), "plain"))
    assert all(example.marks.kinds["final answer"].any() for example in second)
    assert encoded(rows)[1] and encoded(rows)[0][0].marks is None


def test_one_row_and_no_row_are_kept_like_many(encoded):
    for rows in (ROWS[:1], []):
        first, _ = encoded(rows)
        second, _ = encoded(rows)
        assert same(first, second) and len(second) == len(rows)


def test_whatever_decides_a_token_or_a_mask_asks_for_other_tokens(encoded, monkeypatch):
    def with_first(**change):
        return [dataclasses.replace(ROWS[0], **change), *ROWS[1:]]

    question, answer = ROWS[0].turns
    taught = build(CHATML)
    taught.backend_tokenizer.add_tokens([AddedToken("apples")])
    unpadded = build(CHATML)
    unpadded.pad_token = "<|eot|>"
    changes = {
        "nothing": {},
        "an answer": {"rows": with_first(turns=(question, Turn("assistant", "0 apples.")))},
        "a question": {"rows": with_first(turns=(Turn("user", "How many?"), answer))},
        "a role": {"rows": with_first(turns=(Turn("system", question.content), answer))},
        "where a text ends": {"rows": with_first(turns=(Turn("user", "How many? 00"), Turn("assistant", " apples")))},
        "one turn or two": {"rows": [*ROWS[:-1], dataclasses.replace(TALK, turns=TALK.turns[1:])]},
        "a prompt": {"rows": with_first(prompt="Q: How many?")},
        "another prompt": {"rows": with_first(prompt="")},
        "the order": {"rows": ROWS[::-1]},
        "a row less": {"rows": ROWS[1:]},
        "the vocabulary": {"tokenizer": taught},
        "BOS put before": {"tokenizer": build(CHATML, bos=None)},
        "EOS": {"tokenizer": build(CHATML, eos="<|eot|>")},
        "a special token that templates may name": {"tokenizer": unpadded},
        "the tokenizer's template": {"tokenizer": build(HEADERS)},
        "data.template": {"template": "chat"},
        "a template of one's own": {"template": CHATML},
        "a space in it": {"template": CHATML.replace("\n", " ")},
        "data.train_on": {"train_on": "last"},
        "marks": {"marked": True},
    }
    for count, (what, change) in enumerate(changes.items(), 1):
        assert encoded(**change)[1], what
        assert len(files(encoded.folder)) == min(count, cache.KEPT), what
    assert not any(encoded(**change)[1] for change in changes.values())
    for module, name, value in ((cache, "FORM", cache.FORM + 1), (conversation, "DATE", "27 Jul 2024")):
        monkeypatch.setattr(module, name, value)
        assert encoded()[1], name


def test_origins_are_those_of_todays_rows(encoded):
    encoded()
    moved = [dataclasses.replace(row, origin=f"other.jsonl:{i}") for i, row in enumerate(ROWS)]
    examples, made = encoded(moved)
    assert not made and [example.origin for example in examples] == [row.origin for row in moved]


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "cut by a byte": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "zeroed from the middle": lambda file: file.write_bytes(file.read_bytes()[:600].ljust(file.stat().st_size, b"\0")),
    "text": lambda file: file.write_text("hello"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_replaced_in_silence(encoded, damage, capfd):
    first, _ = encoded()
    (file,) = encoded.folder.iterdir()
    DAMAGE[damage](file)
    second, made = encoded()
    assert made and same(first, second) and files(encoded.folder) == [file.name]
    third, made = encoded()
    assert not made and same(first, third)
    assert capfd.readouterr() == ("", "")


def test_no_flipped_bit_gives_other_tokens_or_an_error(encoded):
    first, _ = encoded(ROWS[:3])
    (file,) = encoded.folder.iterdir()
    good = file.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= random.Random(at).choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
        file.write_bytes(bad)
        found = cache._read(file, ROWS[:3])
        assert found is None or same(found, first), at


def failing(error):
    """An os.fdopen whose file takes some bytes and then raises `error`."""

    class Failing(io.FileIO):
        def write(self, data):
            super().write(data[:4])
            raise error

    return lambda handle, mode: Failing(handle, mode)


@pytest.mark.parametrize("when", ["the folder cannot be made", "the disk is full", "the file cannot be put in place"])
def test_a_folder_that_cannot_be_written_costs_only_the_cache(encoded, tmp_path, monkeypatch, when, capfd):
    folder = tmp_path / "tokens"
    if when == "the folder cannot be made":
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "tokens"
    elif when == "the disk is full":
        monkeypatch.setattr(os, "fdopen", failing(OSError(28, "No space left on device")))
    else:
        monkeypatch.setattr(os, "replace", lambda old, new: (_ for _ in ()).throw(PermissionError(13, "denied")))
    for _ in range(2):
        examples, made = encoded(folder=folder)
        assert made and same(examples, list(chat.encode_rows(ROWS, build(CHATML), "plain")))
    assert when == "the folder cannot be made" or files(folder) == []
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_write_leaves_nothing(encoded, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            encoded()
    assert files(encoded.folder) == []
    assert encoded()[1] and not encoded()[1]


def test_the_newest_files_are_kept(encoded):
    now = time.time()
    for number in range(cache.KEPT + 4):
        encoded(ROWS[: number + 1])
        for file in encoded.folder.iterdir():
            if file.stat().st_mtime > now - 1000:
                os.utime(file, (now - 9000 + number,) * 2)
    assert len(files(encoded.folder)) == cache.KEPT
    again = [encoded(ROWS[: number + 1])[1] for number in range(cache.KEPT + 3, 3, -1)]
    assert not any(again) and encoded(ROWS[:1])[1]


def test_none_keeps_nothing(encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert encoded(folder=None)[1] and encoded(folder=None)[1] and files(tmp_path) == []


def settings(folder, **data):
    data = Data(name="generated:word_problems", limit=40, max_length=256, cache=folder, **data)
    return Config(model=Model("builtin:tiny"), data=data, optim=Optim(batch_size=8))


def test_a_run_keeps_its_rows_under_data_cache_and_reads_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    without = train.prepare(settings(None)).data.facts
    assert files(tmp_path) == []
    first = train.prepare(settings("~/kept")).data.facts
    assert len(files(tmp_path / "kept" / "tokens")) == 3  # training and validation rows, and the probe
    monkeypatch.setattr(cache, "_encode", None)
    assert train.prepare(settings("~/kept")).data.facts == first == without
    # What is done with tokens afterwards asks for no others.
    shorter = settings("~/kept", on_long_row="drop", packing=False)
    assert train.prepare(shorter).data.facts["train_rows"] == first["train_rows"]


def test_rows_are_told_apart_where_their_texts_run_together(encoded):
    """Fingerprints of joined texts would not tell these apart."""
    apart = [
        [exchange("a", "b"), exchange("c", "d")],
        [exchange("a", "bc"), exchange("", "d")],
        [Row((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")), "f:1")],
        [exchange("a\0user\0b", "c"), exchange("d", "d")],
    ]
    assert all(encoded(rows)[1] for rows in apart) and len(files(encoded.folder)) == len(apart)
