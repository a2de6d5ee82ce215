"""The catalogue of bad data: each ends a run in one line, with exit 2, before a weight is read."""

import json
import re
import shutil
import sys

import pytest

from jaxft import train
from jaxft.errors import run_verb
from jaxft.weights.hub import BUILTIN
from jaxft.weights.shards import Slice

ROW = {"question": "1+1?", "answer": "2"}
ROWS = [ROW | {"question": f"{i}+1?"} for i in range(5)]
DROPS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
ESCAPES = "{{ messages.__class__.__mro__ }}"


def broken_weights(folder):
    (folder / "model.safetensors").write_bytes(b"garbage")


def no_eos(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}))


def one_token_more(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": 640, "content": "3+1", "special": False, "normalized": False}
    tokenizer["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


# What is in the file, and what the line says after the file's name. The model's folder has no weights worth reading.
BAD_ROWS = {
    "a column is missing": ([*ROWS, {"question": "q"}], ":6: format gsm8k needs answer; .* data.on_bad_row skip"),
    "a column is called otherwise": (
        [{"q": "1+1?", "a": "2"}],
        ":1: no known format has the fields q, a; expected one",
    ),
    "a field of another type": ([*ROWS, ROW | {"answer": 2}], ":6: answer: expected text, found int 2; .* skip"),
    "an empty file": (b"", ": no rows in it; give a file with at least one"),
    "an empty answer": ([*ROWS, ROW | {"answer": " "}], ":6: empty answer; .* skip"),
    "invalid UTF-8": (b'{"question": "q", "answer": "\xff"}', ":1: not UTF-8 .*0xff.*; convert the file to UTF-8"),
    "a row of 50 MB": (
        b'{"question": "' + b"a" * (50 << 20) + b'"}',
        ":1: row of 50 MB; at most 10 MB are read; .* skip",
    ),
}

# What is said on the command line, what is done to the model's folder, and what the line says.
BAD_RUNS = {
    "a column is not there": (
        ["columns", "answer", "solution"],
        None,
        "FILE:1: data.columns: no column 'solution'; .*",
    ),
    "no answer fits": (["max_length", "8"], None, "data.max_length: 8 tokens .* of 4 rows; .* raise data.max_length"),
    "a template drops the answer": (
        ["template", DROPS],
        None,
        "FILE:1: the chat template drops answer 1; set data.template",
    ),
    "a template escapes": (
        ["template", ESCAPES],
        None,
        "FILE:1: the chat template refuses .* is unsafe.*set data.template",
    ),
    "no EOS": ([], no_eos, "tokenizer.*: it has no EOS, .*; set eos_token in its tokenizer_config.json"),
    "a token beyond": ([], one_token_more, "FILE:4: token id 640 .'3.1'. .* of 640; use the tokenizer that belongs"),
}


@pytest.fixture
def answer(tmp_path, monkeypatch, capsys):
    """What a run on these rows and a spoilt copy of the embedded model says on stderr."""

    def answer(content, options=(), spoil=None):
        folder = shutil.copytree(BUILTIN["builtin:tiny"], tmp_path / "model")
        file = tmp_path / "rows.jsonl"
        file.write_bytes(content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode())
        if spoil:
            spoil(folder)
        monkeypatch.setattr(Slice, "__getitem__", None)
        monkeypatch.setattr(Slice, "read_rows", None)
        more = [f"--data.{options[0]}", *options[1:]] if options else []
        command = [
            "--run.dir",
            tmp_path / "run",
            "--model.name",
            folder,
            "--data.files",
            file,
            "--data.cache",
            "none",
            *more,
        ]
        monkeypatch.setattr(sys, "argv", ["train", "--config", "tiny_cpu.py", "--eval.tasks", *map(str, command)])
        with pytest.raises(SystemExit) as stopped:
            run_verb(train.main)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and not (tmp_path / "run").exists()
        assert said.count("\n") == 1 and len(said) < 450 + len(str(file))
        return said.removeprefix("error: ").replace(str(file), "FILE")

    return answer


@pytest.mark.parametrize("mistake", BAD_ROWS)
def test_bad_rows_end_a_run_in_one_line_before_anything_of_the_model_is_read(answer, mistake):
    content, expected = BAD_ROWS[mistake]
    said = answer(content, spoil=broken_weights)
    assert re.match("FILE" + expected, said), said


@pytest.mark.parametrize("mistake", BAD_RUNS)
def test_bad_settings_and_tokenizers_end_a_run_in_one_line_before_a_weight_is_read(answer, mistake):
    options, spoil, expected = BAD_RUNS[mistake]
    said = answer(ROWS, options, spoil)
    assert re.match(expected, said), said
