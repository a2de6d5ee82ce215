"""Files made to fill the memory: each is refused, and takes at most half as much again as a good run's preparation does."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxft.weights.hub import BUILTIN

TINY = BUILTIN["builtin:tiny"]
MB = 1 << 20
LISTS = b"[" + b"[]," * 3_300_000 + b"[]]"  # ten megabytes of text, a quarter of a gigabyte as Python holds it
GOOD = b"".join(
    json.dumps({"question": f"{i}+1?", "answer": f"It is #### {i + 1}"}).encode() + b"\n" for i in range(50)
)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def header(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


def config(more: bytes) -> bytes:
    return (TINY / "config.json").read_bytes().strip().removesuffix(b"}") + b',"x":' + more + b"}"


def parquet(texts: int, megabytes: int) -> Callable[[Path], None]:
    """So many rows of one long text, which stands in the file once."""

    def write(file: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": pyarrow.array(["a" * (megabytes * MB)] * texts)})
        pyarrow.parquet.write_table(table, file, compression="zstd")

    return write


class Bomb(NamedTuple):
    """A file of the model's folder, or of rows (`rows.…`), its content, and what the one line says."""

    file: str
    content: bytes | Callable[[Path], None]
    said: str


INDEX = "model.safetensors.index.json"
BOMBS = {
    "a header of lists": Bomb("model.safetensors", header(b'{"a":' + LISTS + b"}"), "values in 9"),
    "a header of tensors": Bomb("model.safetensors", header(b"{" + b'"":{},' * 900_000 + b'"a":{}}'), "values in 5"),
    "a deep header": Bomb("model.safetensors", header(b"[" * 10_000_000), "values in 10,"),
    "a header of 100 MB": Bomb("model.safetensors", header(b" " * 100 * MB), "a header of 104857600 bytes"),
    "an index of lists": Bomb(INDEX, b'{"weight_map":' + LISTS + b"}", "values in 9"),
    "an index of names": Bomb(
        INDEX, b'{"weight_map":{' + b",".join(b'"%x":"b"' % i for i in range(700_000)) + b"}}", "'b'"
    ),
    "an index of 100 MB": Bomb(INDEX, b" " * 100 * MB, "104,857,600 bytes"),
    "a config of lists": Bomb("config.json", config(LISTS), "values in 9"),
    "a deep config": Bomb("config.json", config(b"[" * 900_000), "RecursionError"),
    "a tokenizer of lists": Bomb("tokenizer.json", b'{"added_tokens":' + LISTS + b"}", "values in 9"),
    "a tokenizer of fewer": Bomb(
        "tokenizer.json", b'{"added_tokens":' + LISTS[:6_000_000] + b"[]]}", "cannot be loaded"
    ),
    "a tokenizer of 90 MB": Bomb("tokenizer.json", b" " * 90 * MB, "94,371,840 bytes"),
    "tokenizer settings": Bomb("tokenizer_config.json", b'{"a":' + LISTS + b"}", "values in 9"),
    "a template that doubles": Bomb(
        "chat_template.jinja",
        b"{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "it takes more than 224 MB",
    ),
    "a template that goes on": Bomb(
        "chat_template.jinja",
        b"{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "more than 224 MB",
    ),
    "a template's text": Bomb("chat_template.jinja", b"{{ 'a' * 30000000 }}", "it takes more than 224 MB"),
    "a row of 100 MB": Bomb("rows.jsonl", GOOD + b'{"question": "' + b"a" * 100 * MB + b'"}\n', "row of 100 MB"),
    "a row of lists": Bomb("rows.jsonl", GOOD + b'{"question": ' + LISTS + b"}\n", "needs answer"),
    "a deep row": Bomb("rows.jsonl", GOOD + b'{"question": ' + b"[" * 5_000_000 + b"\n", "nested too deeply"),
    "an array's large row": Bomb("rows.json", b'[{"a":[' + b"[]," * 20_000_000 + b"[]]}]", "row of 57 MB"),
    "an array's long row": Bomb("rows.json", b'[{"question":"' + b"a" * 100 * MB + b'"}]', "row of 100 MB"),
    "a deep array": Bomb("rows.json", b"[" * 50_000_000, "recursion"),
    "a field of 100 MB": Bomb("rows.csv", b'question,answer\n"' + b"a" * 100 * MB + b'",b\n', "field larger than"),
    "Parquet of one text": Bomb("rows.parquet", parquet(1, 100), "unpack to 104,857,652; at most 100 times"),
    "Parquet of 40 texts": Bomb("rows.parquet", parquet(40, 20), "unpacks to more than 67,108,864 bytes"),
    "Parquet of good texts": Bomb("rows.parquet", parquet(100, 9), "unpacks to more than 67,108,864 bytes"),
}
# Prepares a run, as training does before a weight is read; prints what it said, and the most memory that it took, in kB, its
# sandbox's included.
PREPARES = """
import json, sys
from pathlib import Path
from jaxft import config, train
from jaxft.data import conversation
from jaxft.errors import UserError, one_line

def peak(place):
    return next(int(l.split()[1]) for l in Path(place, "status").read_text().splitlines() if l.startswith("VmHWM"))

said, (model, rows) = "", sys.argv[1:]
named = ["--model.name", model, "--data.files", rows, "--data.cache", "none", "--eval.tasks"]
try:
    train.prepare(config.load("tiny_cpu.py", named))
except UserError as error:
    said = one_line(error)
process, most = conversation.SANDBOX._process, peak("/proc/self")
if process is not None and process.poll() is None:
    most += peak(f"/proc/{process.pid}")
print(json.dumps([said, most]))
"""


def prepared(place: Path, bomb: Bomb | None):
    """What a process of its own says, and the kB that it takes."""
    model, rows = shutil.copytree(TINY, place / "model"), place / "rows.jsonl"
    (model / "chat_template.jinja").write_text(TEMPLATE)
    rows.write_bytes(GOOD)
    if bomb is not None:
        rows = place / bomb.file if bomb.file.startswith("rows.") else rows
        file = rows if bomb.file.startswith("rows.") else model / bomb.file
        bomb.content(file) if callable(bomb.content) else file.write_bytes(bomb.content)
    command = [sys.executable, "-c", PREPARES, model, rows]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell a process's peak")
    said, kilobytes = prepared(tmp_path_factory.mktemp("good"), None)
    assert said == ""
    return kilobytes


SHOWN = {
    "a header of lists", "an index of names", "a config of lists", "tokenizer settings", "a template that goes on",
    "an array's large row", "Parquet of 40 texts",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SHOWN else pytest.mark.exhaustive) for name in BOMBS]
)
def test_a_bomb_is_refused_and_takes_at_most_half_as_much_memory_again_as_what_is_good(tmp_path, good, name):
    said, kilobytes = prepared(tmp_path, BOMBS[name])
    print(f"{name}: {kilobytes / 1024:.0f} MB, {kilobytes / good:.2f} of the good case: {said}")
    assert BOMBS[name].said in said, said
    assert kilobytes <= 1.5 * good
