"""Sources, formats, bad input and the validation split."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft import config
from jaxft.config import Data
from jaxft.data import rows, sources
from jaxft.data.rows import Row, Turn
from jaxft.errors import UserError, one_line

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
GSM8K = {"question": "1+1?", "answer": "2"}


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED / "data"


@pytest.fixture
def write(tmp_path):
    def write(content, name="rows.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(map(json.dumps, content))
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def load(path, **fields):
    return rows.load(Data(files=(path,), **{"validation_fraction": 0.0, **fields}), 0)


def test_each_format_is_told_by_its_fields_and_read_as_turns(write):
    talk = [Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r"), Turn("assistant", "b")]
    messages = [{"role": t.role, "content": t.content} for t in talk]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    cases = {
        "gsm8k": (GSM8K, [Turn("user", "1+1?"), Turn("assistant", "2")]),
        "alpaca": ({"instruction": "i", "output": "o", "text": "x"}, [Turn("user", "i"), Turn("assistant", "o")]),
        "prompt_completion": ({"prompt": "p ", "completion": "c"}, [Turn("user", "p "), Turn("assistant", "c")]),
        "text": ({"text": "t"}, [Turn("text", "t")]),
        "messages": ({"messages": [*messages, {"role": "user", "content": "bye"}]}, talk),
        "sharegpt": ({"conversations": [{"from": names[t.role], "value": t.content} for t in talk]}, talk),
    }
    for format, (record, turns) in cases.items():
        splits = load(write([record]))
        assert (splits.format, splits.train[0].turns) == (format, tuple(turns))
        assert any(note.startswith(f"format: {format} (fields ") for note in splits.notes)


def test_an_alpaca_row_keeps_its_standard_prompt_with_and_without_input(write):
    record = {"instruction": "Add {these}.", "input": "", "output": "o"}
    bare, full = load(write([record, record | {"input": "1 2"}])).train
    assert bare.prompt.endswith("request.\n\n### Instruction:\nAdd {these}.\n\n### Response:\n")
    assert full.prompt.endswith("### Instruction:\nAdd {these}.\n\n### Input:\n1 2\n\n### Response:\n")
    assert full.turns[0] == Turn("user", "Add {these}.\n\n1 2")


def test_every_file_type_gives_the_same_rows(write, tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [{"question": 'a "quoted",\nthing', "answer": "é\u2028ü"}, GSM8K]
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    files = {
        "lines.json": ":2", "rows.jsonl": ":2", "bom.jsonl": ":2", "array.json": ":6", "rows.csv": ":4",
        "rows.parquet": ":2",
    }  # fmt: skip
    write(records, "lines.json")
    write(records, "rows.jsonl")
    write(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode(), "bom.jsonl")
    write(json.dumps(records, indent=1), "array.json")
    write('question,answer\r\n"a ""quoted"",\nthing",é\u2028ü\r\n1+1?,2\r\n', "rows.csv")
    expected = load(str(tmp_path / "rows.jsonl")).train
    for name, line in files.items():
        got = load(str(tmp_path / name)).train
        assert [r.turns for r in got] == [r.turns for r in expected], name
        assert got[1].origin == str(tmp_path / name) + line


BAD = {
    "empty file": (b"", "no rows"),
    "empty array": (b" []\n", "no rows"),
    "only a header": (b"question,answer\n", "no rows"),
    "not JSON": (b'{"question": "q", "answer": "a"}\n{"question"\n', ":2: not JSON"),
    "cut-off array": (b'[\n{"question": "q", "answer": "a"},\n{"question"', ":3: not JSON"),
    "array without comma": (b'[{"text": "q"}\n{"text": "a"}]', ":2: not JSON"),
    "array with a tail": (b'[{"text": "q"}]\nx', ":1: not JSON"),
    "no object": (b'{"text": "q"}\n7\n', ":2: expected an object with named fields, found int 7"),
    "unknown fields": (b'{"q": "x", "a": "y"}\n', ":1: no known format has the fields q, a"),
    "field missing later": (b'{"question": "q", "answer": "a"}\n{"question": "q"}\n', ":2: format gsm8k needs answer"),
    "number": (b'{"question": "q", "answer": 7}\n', ":1: answer: expected text, found int 7; fields seen: question"),
    "None": (b'{"question": null, "answer": "a"}\n', ":1: question: expected text, found None"),
    "empty answer": (b'\n{"question": "q", "answer": " \\n"}\n', ":2: empty answer; fields seen: question, answer"),
    "invalid UTF-8": (b'{"text": "a"}\n{"text": "\xff"}\n', ":2: not UTF-8 (byte 0xff)"),
    "invalid UTF-8 in an array": (b'[{"text": "a"},\n{"text": "\xff"}]\n', ":2: not UTF-8 (byte 0xff)"),
    "half a surrogate pair": (b'{"text": "\\ud800"}\n', ":1: text: half a surrogate"),
    "deep nesting": (b'{"text": ' + b"[" * 100_000 + b"\n", ":1: JSON nested too deeply"),
    "huge row": (b'{"text": "' + b"a" * 11 * 2**20 + b'"}', ":1: row of 11 MB"),
    "messages of strings": (b'{"messages": ["hi"]}', ":1: messages: expected a list of objects"),
    "no messages": (b'{"messages": []}', ":1: messages: no assistant turn"),
    "unanswered": (b'{"messages": [{"role": "user", "content": "q"}]}', ":1: messages: no assistant turn"),
    "unknown role": (b'{"messages": [{"role": "wizard", "content": "q"}]}', "[0]: unknown role str 'wizard'"),
    "no content": (b'{"messages": [{"role": "user"}]}', ":1: messages[0]: expected role and content"),
    "content None": (b'{"messages": [{"role": "user", "content": null}]}', "messages[0].content: expected text"),
    "empty turn": (b'{"messages": [{"role": "assistant", "content": ""}]}', "messages[0]: empty answer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_file_line_and_fields(write, name):
    content, message = BAD[name]
    suffix = ".csv" if name == "only a header" else ".json" if "array" in name else ".jsonl"
    path = write(content, "rows" + suffix)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(path) and message in str(caught.value)
    assert len(one_line(caught.value)) < 500 + len(path)


def test_files_that_cannot_be_rows_are_refused_by_name(write, tmp_path):
    for path, message in [
        (str(tmp_path / "none.jsonl"), "no such file"),
        (str(tmp_path / "folder.json"), "no such file"),
        (write("x", "rows.txt"), "unsupported suffix '.txt'; use .jsonl, .json, .csv, .parquet"),
        (write("x", "rows.parquet"), "not Parquet"),
        (write('question,answer\nq,"a\n', "open.csv"), ":2: not CSV"),
        (write("question,answer\nq,a,b\n", "wide.csv"), ":2: more than the 2 fields"),
        (write("question,answer\nq\n", "short.csv"), ":2: answer: expected text, found None"),
    ]:
        (tmp_path / "folder.json").mkdir(exist_ok=True)
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(caught.value).startswith(path) and message in str(caught.value)


def test_an_unknown_format_names_the_known_ones(write):
    with pytest.raises(UserError, match=r"data\.format: unknown format 'csv'; use auto, messages"):
        load(write([GSM8K]), format="csv")


def test_skipped_rows_are_counted_and_stop_above_one_percent(write):
    good, bad = [GSM8K] * 198, [{"question": "q"}, {"question": "q", "answer": 1}]
    splits = load(write(bad[:1] + good + bad[1:]), on_bad_row="skip", format="gsm8k")
    assert (len(splits.train), splits.skipped) == (198, 2)
    assert "2 bad rows left out" in " ".join(splits.notes)
    with pytest.raises(UserError, match=r"3 of 201 rows are bad, more than 1 %; the first: .*:199: format gsm8k needs"):
        load(write(good + bad + bad[:1]), on_bad_row="skip")


def test_limit_takes_the_first_rows_before_splitting(write):
    records = [{"text": str(i)} for i in range(100)]
    splits = load(write(records), limit=20, validation_fraction=0.1)
    texts = {row.turns[0].content for row in splits.train + splits.validation}
    assert texts == {str(i) for i in range(20)} and len(splits.validation) == 2


def test_files_displace_a_named_data_set_and_a_note_says_so(write):
    data = Data(name="openai/gsm8k", test_split="test", validation_fraction=0.0, files=(write([GSM8K]),))
    splits = rows.load(data, 0)
    assert not splits.test and not splits.validation
    assert "data.name openai/gsm8k and its split, test_split are ignored" in splits.notes[0]


def test_validation_and_test_files_replace_the_fraction(write):
    other = write([GSM8K | {"answer": "3"}] * 2, "other.jsonl")
    splits = load(write([GSM8K] * 5), validation_files=(other,), test_files=(other, other), validation_fraction=0.5)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [5, 2, 4]


def test_the_generators_are_sources():
    splits = rows.load(Data(name="generated:word_problems", test_split="test", limit=50), 0)
    assert (len(splits.train), len(splits.validation), splits.format) == (45, 5, "gsm8k") and splits.test
    assert splits.train[0].origin.startswith("generated:word_problems/train:")
    assert rows.load(Data(name="generated:corpus", limit=10), 0).format == "text"
    for name, split in [("generated:nothing", "train"), ("generated:corpus", "test")]:
        with pytest.raises(UserError, match="generated:"):
            rows.load(Data(name=name, split=split), 0)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "offline, and not in the local cache"),
        (ValueError("Unknown split \"x\". Should be one of ['train', 'test']."), "set data.split to one of these"),
        (ValueError("Config name is missing.\nPlease pick one among ['main']"), "set data.subset to one of these"),
        (RuntimeError("Dataset 'a/b' is a gated dataset on the Hub."), "hf auth login"),
        (FileNotFoundError("Dataset 'a/b' doesn't exist"), "check data.name"),
    ],
)
def test_a_hub_failure_names_repository_split_and_remedy(monkeypatch, error, remedy):
    import datasets

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as caught:
        rows.load(Data(name="a/b", split="x"), 0)
    assert str(caught.value).startswith("data.name a/b (subset None, split x): ") and remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_splits_are_read_by_name_and_subset(monkeypatch):
    import datasets

    made = {"train": [GSM8K] * 3, "dev": [GSM8K] * 2, "test": [GSM8K]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: made[split] if subset == "main" else [])
    splits = rows.load(Data(name="a/b", subset="main", validation_split="dev", test_split="test"), 0)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [3, 2, 1]
    with pytest.raises(UserError, match="split train has no rows"):
        rows.load(Data(name="a/b"), 0)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60), st.floats(0.01, 0.9), st.integers(0, 99))
def test_the_split_loses_no_row_and_keeps_duplicates_on_one_side(texts, fraction, seed):
    made = [Row((Turn("text", t if i % 2 else f" {t.upper()}\n"),), str(i)) for i, t in enumerate(texts)]
    train, held = rows.split(made, fraction, seed)
    assert sorted(train + held, key=lambda r: int(r.origin)) == made
    sides = [{r.turns[0].content.strip().lower() for r in part} for part in (train, held)]
    assert not sides[0] & sides[1] and train
    assert held or len(set(texts)) == 1
    assert (train, held) == rows.split(made, fraction, seed)


def test_rows_that_are_all_equal_stay_in_training():
    for count in (1, 2, 10):
        made = [Row((Turn("text", "same"),), str(i)) for i in range(count)]
        assert rows.split(made, 0.9, 0) == (made, [])


def test_the_draw_does_not_depend_on_the_rows_order_and_changes_with_the_seed():
    made = [Row((Turn("text", str(i)),), str(i)) for i in range(200)]
    held = {r.origin for r in rows.split(made, 0.1, 0)[1]}
    assert held == {r.origin for r in rows.split(made[::-1], 0.1, 0)[1]}
    assert len(held) == 20 and held != {r.origin for r in rows.split(made, 0.1, 1)[1]}


def test_gsm8k_splits_into_6726_and_747(shared):
    splits = rows.load(Data(files=(str(shared / "gsm8k_train.jsonl"),)), 0)
    assert (len(splits.train), len(splits.validation), splits.format) == (6726, 747, "gsm8k")


def test_alpaca_rows_carry_the_line_they_begin_on(shared):
    path = str(shared / "alpaca_gpt4_1k.json")
    lines = Path(path).read_text().split("\n")
    origins = [row.origin for row in load(path).train]
    assert len(origins) == 999
    assert all(lines[int(origin.rpartition(":")[2]) - 1].strip() == "{" for origin in origins)


def test_a_bad_row_in_the_middle_of_a_source_does_not_end_it(write):
    records = list(sources.read_files((write(b'{"text": "a"}\n\xff\n{"text": "b"}\n'),)))
    assert [isinstance(record, sources.BadRow) for _, record in records] == [False, True, False]


def test_columns_of_other_names_are_read_as_the_formats_fields(write):
    file = write([{"problem": "1+1?", "solution": "2", "answer": "no", "id": 7}])
    columns = {"question": "problem", "answer": "solution"}
    splits = load(file, columns=columns, validation_files=(file,), test_files=(file,))
    expected = (Turn("user", "1+1?"), Turn("assistant", "2"))
    assert [part[0].turns for part in (splits.train, splits.validation, splits.test)] == [expected] * 3
    assert splits.format == "gsm8k" and "format: gsm8k (fields question, answer)" in splits.notes
    crossed = load(write([GSM8K]), columns={"question": "answer", "answer": "question"}).train[0]
    assert [turn.content for turn in crossed.turns] == ["2", "1+1?"]
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert load(write([{"chat": talk}]), columns={"messages": "chat"}).format == "messages"
    file = write([{"task": "Add.", "more": "1 2", "output": "3"}])
    given = load(file, columns={"instruction": "task", "input": "more"})
    assert given.train[0].turns[0] == Turn("user", "Add.\n\n1 2") and given.format == "alpaca"


def test_a_wrong_column_is_named_with_the_row_and_a_wrong_field_with_the_known_ones(write):
    columns = {"question": "problem", "answer": "solution"}
    good, bad = {"problem": "q", "solution": "a"}, {"problem": "q", "answer": "a"}
    file = write([good, bad])
    with pytest.raises(UserError) as caught:
        load(file, columns=columns)
    assert str(caught.value).startswith(f"{file}:2: data.columns: no column 'solution'; fields seen: problem, answer; ")
    splits = load(write([good] * 99 + [bad]), columns=columns, on_bad_row="skip")
    assert (len(splits.train), splits.skipped) == (99, 1)
    with pytest.raises(UserError, match=r"3 of 3 rows are bad, .* data\.columns: no column 'solution'"):
        load(write([bad] * 3), columns=columns, on_bad_row="skip")
    with pytest.raises(UserError, match=r":1: answer: expected text, found int 7; fields seen: problem, solution"):
        load(write([good | {"solution": 7}]), columns=columns)
    with pytest.raises(UserError, match=r"^data\.columns: no format has a field 'query'; fields are answer, "):
        load(write([GSM8K]), columns={"query": "question"})


def test_data_options_are_set_on_the_command_line():
    typed = "--data.columns question problem answer solution --data.calculator strip --data.train-on last"
    data = config.load("tiny_cpu.py", f"{typed} --data.on_long_row drop --data.cache none".split()).data
    assert data.columns == {"question": "problem", "answer": "solution"}
    assert (data.calculator, data.train_on, data.on_long_row, data.cache) == ("strip", "last", "drop", None)
    for key, wrong in {"columns": "question", "calculator": "drop", "train-on": "first", "on-long-row": "keep"}.items():
        with pytest.raises(UserError, match=rf"--data\.{key}"):
            config.load("tiny_cpu.py", [f"--data.{key}", wrong])


def test_calculator_annotations_are_taken_out_of_answers_where_asked(write):
    text = "<<1+1=2>>2 and <<2*3=6>>6 < 7 << 8"
    talk = [{"role": role, "content": text} for role in ("user", "assistant", "user", "assistant")]
    file = write([{"messages": talk}])
    kept, bare = ([t.content for t in load(file, calculator=c).train[0].turns] for c in ("keep", "strip"))
    assert kept == [text] * 4 and bare == [text, "2 and 6 < 7 << 8"] * 2
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*data\.calculator keep"):
        load(write([GSM8K, GSM8K | {"answer": "<<1+1=2>>"}]), calculator="strip")
