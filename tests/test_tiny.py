"""The generated data and the embedded model's folder: right arithmetic, separate splits, an exact tokenizer."""

import hashlib
import json
import math
import re
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest

import jaxft.tiny
from jaxft.errors import UserError
from jaxft.tiny import corpus, make, problems

BASE = Path(jaxft.tiny.__file__).parent / "base"
SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": Fraction}
PROBLEMS_SHA256 = {"train": "08ba6c804f4e6467", "test": "fd5b5778d30eaa76", "fresh": "be2ca585097cdf1a"}
CORPUS_SHA256 = "d016f2fc622695f2"


@cache
def documents() -> list[str]:
    """All documents of the corpus, made once."""
    return [row["text"] for row in corpus.rows("train")]


@cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def digest(rows: list) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def as_prompted(row: dict[str, str]) -> str:
    return f"Question: {row['question']}\nAnswer: {row['answer']}"


def is_right(a: str, sign: str, b: str, c: str) -> bool:
    return SIGNS[sign](int(a), int(b)) == int(c)


@pytest.mark.parametrize("split", problems.SIZES)
def test_every_annotation_and_final_answer_is_right(split):
    for row in problems.rows(split):
        *steps, last = row["answer"].split("\n")
        assert 1 <= len(steps) <= 3
        for step in steps:
            (a, sign, b, c, said), *others = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", step)
            assert not others and c == said and is_right(a, sign, b, c), step
        assert last == f"#### {c}", row
        assert 2 <= int(c) <= 100


def test_every_operand_is_told_or_worked_out_before_it_is_used():
    for row in problems.rows("train"):
        # Seven days to a week and two halves to a whole are the only numbers that no question tells.
        known = {*re.findall(r"\d+", row["question"]), "7", "2"}
        for a, b, c in re.findall(r"<<(\d+)[-+*/](\d+)=(\d+)>>", row["answer"]):
            assert {a, b} <= known, row
            known.add(c)


def test_no_question_occurs_twice_within_or_across_splits():
    questions = [problems.normalised(row["question"]) for split in problems.SIZES for row in problems.rows(split)]
    assert len(questions) == sum(problems.SIZES.values()) == len(set(questions))


def test_the_problems_are_the_same_everywhere_and_every_time():
    assert {split: digest(problems.rows(split)) for split in problems.SIZES} == PROBLEMS_SHA256
    assert problems.rows("train", 10) == problems.rows("train")[:10]


def test_the_corpus_is_the_same_everywhere_and_every_time():
    assert digest(documents()) == CORPUS_SHA256
    assert [row["text"] for row in corpus.rows("train", 100)] == documents()[:100]


def test_every_split_has_the_same_sixteen_templates():
    shapes = [{shape(row["question"]) for row in problems.rows(split)} for split in problems.SIZES]
    assert len(problems.TEMPLATES) == 16 == len(shapes[0])
    assert shapes[0] == shapes[1] == shapes[2]


def shape(question: str) -> str:
    words = "|".join((*problems.NAMES, *problems.NOUNS))
    return re.sub(r"\d+", "#", re.sub(rf"\b({words})\b", "_", question))


def test_an_unknown_split_or_too_many_rows_is_refused():
    with pytest.raises(UserError, match="no split 'dev'; it has train, test, fresh"):
        problems.rows("dev")
    with pytest.raises(UserError, match="201 rows asked of test, which has 200"):
        problems.rows("test", 201)
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        corpus.rows("test")


def test_the_corpus_has_no_gsm8k_marks_and_no_prompt():
    for mark in ("####", "<<", ">>", "Question:", "Answer:"):
        assert not any(mark in text for text in documents()), mark


def test_every_equation_of_the_corpus_is_right():
    for text in documents():
        for a, sign, b, c in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", text):
            assert is_right(a, sign, b, c), text


def test_the_tokenizer_decodes_to_the_very_text():
    texts = [
        *map(as_prompted, problems.rows("test")),
        *documents()[:200],
        "",
        " ",
        "  two  spaces ",
        "I don't , know .",
    ]
    texts += ["tabs\tand\r\nlines\n\n", "naïve 日本語 🙂"]
    for text in texts:
        assert tokenizer().decode(tokenizer()(text).input_ids, skip_special_tokens=True) == text


def test_every_digit_is_one_token():
    tokens = tokenizer().tokenize("7890 <<12*3=36>>36\n#### 36, a1b2")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("789012336363612")


def test_every_name_and_noun_is_one_token():
    for word in problems.NAMES + problems.NOUNS:
        assert len(tokenizer().tokenize(f" {word}")) == 1, word


def test_a_text_begins_with_bos_exactly_once():
    for text in ("", "Today", "Question: 1+1?\nAnswer:"):
        ids = tokenizer()(text).input_ids
        assert ids[0] == tokenizer().bos_token_id and ids.count(tokenizer().bos_token_id) == 1
        assert tokenizer().bos_token_id not in tokenizer()(text, add_special_tokens=False).input_ids


def test_the_config_and_the_tokenizer_agree():
    config = json.loads((BASE / "config.json").read_text())
    assert len(tokenizer()) == config["vocab_size"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer(), name) == config[name]


def test_making_the_folder_again_gives_the_shipped_files(tmp_path):
    make.make(tmp_path)
    for name in ("README.md", "config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (BASE / name).read_bytes(), name
    made, shipped = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, BASE))
    assert made["model"]["vocab"] == shipped["model"]["vocab"]
    assert made["model"]["merges"] == shipped["model"]["merges"]


def test_the_shipped_weights_are_small_and_complete():
    file = BASE / "model.safetensors"
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    assert len(content) < 4_000_000
    assert {entry["dtype"] for entry in tensors} == {"BF16"}
    assert sum(math.prod(entry["shape"]) for entry in tensors) == make.parameters()


def test_weights_are_copied_in_bfloat16_and_a_missing_file_is_named(tmp_path):
    (tmp_path / "again").mkdir()
    make.copy_weights(BASE, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (BASE / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        make.copy_weights(tmp_path, tmp_path / "again")


def test_problems_and_documents_fit_the_packed_length():
    texts = [*map(as_prompted, problems.rows("train")), *sorted(documents(), key=len)[-2000:]]
    assert max(len(ids) for ids in tokenizer()(texts).input_ids) + 1 <= 112
