"""Models, adapters and rows made to do harm: no code of theirs runs, nothing elsewhere is read, nobody waits for ever."""

import json
import os
import pickle
import pty
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jaxft import config, export
from jaxft.data import chat, conversation, rows, sources
from jaxft.data.rows import Row, Turn
from jaxft.data.sandbox import LIMIT_BYTES, Sandbox, TemplateFault
from jaxft.errors import UserError
from jaxft.learn.folder import RunFolder
from jaxft.weights import hub, model, peft, shards
from jaxft.weights.hub import BUILTIN
from jaxft.weights.shards import write_file

TINY = BUILTIN["builtin:tiny"]
ROW = Row((Turn("user", "What?"), Turn("assistant", "That.")), "file:1")


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.fixture
def base(tmp_path):
    """A copy of the embedded model."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in TINY.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def adapter(tmp_path):
    """A small adapter of the embedded model."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "builtin:tiny"}
    (folder / peft.CONFIG).write_text(json.dumps(settings))
    path = f"{peft.PREFIX}model.layers.0.self_attn.o_proj.lora"
    write_file(
        folder / peft.WEIGHTS,
        {f"{path}_A.weight": np.ones((2, 128), np.float32), f"{path}_B.weight": np.ones((128, 2), np.float32)},
    )
    return folder


def opened(adapter):
    return peft.open_adapter(adapter, hub.read_arch(TINY))


def test_no_pickle_is_ever_read(base, adapter, tmp_path):
    canary = tmp_path / "ran"
    for folder, name in ((base, "pytorch_model.bin"), (adapter, "adapter_model.bin")):
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    model.find(config.Model(str(base)))
    opened(adapter)
    (base / "model.safetensors").unlink()
    (adapter / peft.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"pickle weights \(pytorch_model.bin\), which can run code"):
        model.find(config.Model(str(base)))
    with pytest.raises(UserError, match=r"pickle weights \(adapter_model.bin\), which can run code"):
        opened(adapter)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_link_out_of_a_models_folder_is_refused(base, tmp_path, name):
    real = tmp_path / "elsewhere"
    real.write_bytes((base / name).read_bytes() if (base / name).exists() else b"my secret")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(real)
    with pytest.raises(UserError, match=rf"{name}: is a link to .*elsewhere, outside its folder; copy the file"):
        model.find(config.Model(str(base)))
    with pytest.raises(UserError, match=r"outside its folder"):
        model.find(config.Model("builtin:tiny", tokenizer=str(base)))


def test_a_link_out_of_an_adapters_folder_is_refused_and_nothing_is_exported(adapter, tmp_path):
    (tmp_path / "secret").write_text("my secret")
    (adapter / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"tokenizer_config.json: is a link to .*secret, outside its folder"):
        export.main(["--adapter", str(adapter), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_links_within_a_folder_and_into_the_hubs_blobs_are_followed(base, tmp_path):
    (base / "model.safetensors").rename(base / "weights")
    (base / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(base)
    assert model.find(config.Model(str(tmp_path / "link"))).files
    cache = tmp_path / "models--owner--name"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = base.rename(cache / "snapshots" / "0123")
    (snapshot / "config.json").rename(cache / "blobs" / "abc")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert model.find(config.Model(str(snapshot))).files


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(base, name):
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    with pytest.raises(UserError, match=rf"{name}: is no file"):
        model.find(config.Model(str(base)))


BOMBS = {
    "many layers": {"num_hidden_layers": 10**9},
    "a huge layer": {"hidden_size": 10**30},
    "no number": {"vocab_size": float("inf")},
    "a large file": {"note": "a" * hub.JSON_LIMIT_BYTES},
    "deep": {"rope_scaling": "DEEP"},
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_config_that_asks_for_everything_is_refused_at_once(base, bomb):
    text = json.dumps(json.loads((base / "config.json").read_text()) | BOMBS[bomb])
    (base / "config.json").write_text(text.replace('"DEEP"', "[" * 100_000))
    began = time.process_time()
    with pytest.raises(UserError, match=r"config.json: "):
        model.find(config.Model(str(base)))
    assert time.process_time() - began < 2


HEADERS = {
    "empty lists": b'{"a":[' + b"[]," * 3_400_000 + b"[]]}",
    "small tensors": b"{" + b",".join(b'"%d":{}' % i for i in range(900_000)) + b"}",
    "deep": b"[" * 10_000_000,
    "one byte too large": b" " * (shards.HEADER_LIMIT_BYTES + 1),
}


@pytest.mark.parametrize(
    "header", [h if h == "small tensors" else pytest.param(h, marks=pytest.mark.slow) for h in HEADERS]
)
def test_a_header_takes_little_memory_whatever_is_in_it(header, tmp_path):
    """Of a whole process that reads it, against one that reads the embedded model: 1.5 times as much at most."""
    file = tmp_path / "bomb.safetensors"
    file.write_bytes(len(HEADERS[header]).to_bytes(8, "little") + HEADERS[header])
    source = (
        "import sys; from pathlib import Path; from jaxft.weights import model; from jaxft.weights.shards import open_file\n"
        "try: open_file(Path(sys.argv[1]))\nexcept Exception as error: print(type(error).__name__)\n"
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    bytes_of = {}
    for path in (TINY / "model.safetensors", file):
        said = subprocess.run(
            [sys.executable, "-c", source, path], capture_output=True, text=True, check=True
        ).stdout.split()
        bytes_of[path] = int(said[-1])
    assert said[0] == "UserError" and bytes_of[file] < 1.5 * bytes_of[TINY / "model.safetensors"] + 250_000


PATTERNS = {
    "nested repeats": {r"(\w+\.?)+!": 4},
    "many repeats": {".*.*.*.*!": 4},
    "too many": {f"a{i}": 4 for i in range(2000)},
}


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_of_an_adapter_that_search_for_ever_are_refused(adapter, key, patterns):
    settings = json.loads((adapter / peft.CONFIG).read_text()) | {key: PATTERNS[patterns]}
    (adapter / peft.CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"adapter_config.json: {key}: expected at most 1000 names or simple patterns"):
        opened(adapter)


@pytest.fixture(scope="module")
def tokenizer():
    return chat.load_tokenizer(TINY)


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "repeating": "{{ 'a' * 10**10 }}",
    "padding": "{{ 'a'|center(10**10) }}",
    "a list": "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_never_ends_or_fills_the_memory_is_ended_and_the_next_one_renders(
    template, tokenizer, monkeypatch
):
    monkeypatch.setattr(conversation, "SANDBOX", Sandbox(cpu_seconds=0.5))
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"file:1: the chat template refuses turns user, assistant \(.*; mend the row, or set"
    ):
        chat.encode(ROW, tokenizer, ENDLESS[template])
    assert time.monotonic() - began < 60
    good = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    good += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert chat.render(ROW, tokenizer, good).text == "user: What?</s>assistant: That.</s>"
    conversation.SANDBOX.close()


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.mkdir('CANARY') }}",
    "{% set n = namespace(__init__=1) %}",
    "{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '\\ud800' }}",
)


def test_a_template_that_escapes_is_refused_and_none_of_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sandbox = Sandbox()
    for template in ESCAPES:
        try:  # some names are just not there, which renders as nothing
            assert sandbox.render(template.replace("CANARY", str(tmp_path / "ran")), {"messages": []}) == ""
        except TemplateFault as fault:
            assert str(fault)
    assert list(tmp_path.iterdir()) == []
    assert (
        sandbox.render("{{ bos_token }}{{ messages|tojson }}", {"bos_token": "<s>", "messages": [{"é": 1}]})
        == '<s>[{"é": 1}]'
    )
    sandbox.close()


def test_the_process_of_templates_has_no_environment_and_little_memory(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sandbox = Sandbox()
    sandbox.render("", {})
    place = Path(f"/proc/{sandbox._process.pid}")
    assert b"hf_" not in (place / "environ").read_bytes()
    (limit,) = re.findall(r"Max address space +(\d+)", (place / "limits").read_text())
    assert int(limit) == LIMIT_BYTES
    row = "😀" * (sources.MAX_ROW_BYTES // 4)  # the largest that is read
    assert sandbox.render("{% for m in messages %}{{ m }}!{% endfor %}", {"messages": [row]}) == row + "!"
    sandbox.close()


def test_a_long_line_is_never_held_whole(tmp_path):
    """200 MB without a line break, then good rows."""
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:
        for _ in range(200):
            stream.write(b"a" * 2**20)
        stream.write(b'\n{"text": "good"}\n')
    tracemalloc.start()
    (first, bad), (second, good) = sources.read_files((str(file),))
    assert tracemalloc.get_traced_memory()[1] < 3 * sources.MAX_ROW_BYTES
    tracemalloc.stop()
    assert (first, second, good) == (f"{file}:1", f"{file}:2", {"text": "good"})
    assert isinstance(bad, sources.BadRow) and str(bad) == "row of 200 MB; at most 10 MB are read"


def test_the_elements_of_an_array_are_those_of_json_wherever_a_window_of_it_ends(tmp_path):
    """A window has 4,096 characters, and then sixteen times as many."""
    file = tmp_path / "rows.json"
    for size in range(4080, 4100):
        for element in (
            "1" * size + ".5", "1" * size + "e-4000", '"' + "b" * size + '\\\\"', '{"a": "' + "é" * size + '", "b": 1.5e+10}',
            "[" * 3 + "1," * (size // 2) + '"]"]' + "]" * 2, '{"text": "' + "\\n" * 16 * size + '"}',
        ):  # fmt: skip
            file.write_text(f"[{element},\n {element} ]", "utf-8")
            assert list(sources.read_files((str(file),))) == [(f"{file}:{i}", json.loads(element)) for i in (1, 2)]


@pytest.mark.slow
def test_a_parquet_file_that_unpacks_to_far_more_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = "a" * (100 << 20)
    pq.write_table(pa.table({"text": [text]}), tmp_path / "one.parquet", compression="zstd")
    with pytest.raises(
        UserError, match=r"one.parquet: [0-9,]+ bytes that unpack to [0-9,]+; at most 100 times as many"
    ):
        list(sources.read_files((str(tmp_path / "one.parquet"),)))
    # One text in a dictionary, named by 100,000 rows.
    pq.write_table(pa.table({"text": pa.array([text[: 20 << 20]] * 40)}), tmp_path / "many.parquet", compression="zstd")
    with pytest.raises(UserError, match=r"many.parquet: unpacks to more than 67,108,864 bytes, 100 times its own"):
        list(sources.read_files((str(tmp_path / "many.parquet"),)))


def test_hostile_rows_are_shown_with_their_escapes_spelt_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"\x1b]0;gone\x07": "<script>", "answer": 1}) + "\n")
    with pytest.raises(UserError) as error:
        rows.load(config.Data(files=(str(file),)), 0)
    from jaxft.errors import one_line

    assert one_line(error.value).isprintable()


SAYS = """
import sys, types
import jaxft.evals.decode as decode
import jaxft
jaxft.load = lambda *a, **k: (types.SimpleNamespace(dtype="float32"), None)
decode.completions = lambda *a, **k: [("one\\x1b[2J\\ntwo\\x07", 7)]
import importlib
main = importlib.import_module("jaxft.generate").main
main(["--model", "builtin:tiny", "--prompt", "x", "--compilation-cache", "None"])
"""


def test_what_a_model_says_cannot_drive_a_terminal_and_goes_into_a_pipe_as_it_is(tmp_path):
    command = [sys.executable, "-c", SAYS]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"one\x1b[2J\ntwo\x07\n"
    reads, writes = pty.openpty()
    subprocess.run(command, stdout=writes, check=True)
    os.close(writes)
    assert os.read(reads, 1000).replace(b"\r\n", b"\n") == b"one\\x1b[2J\ntwo\\x07\n"
    os.close(reads)


def test_a_secret_in_a_setting_is_never_written_and_the_run_resumes(tmp_path):
    token = "hf_" + "aB3" * 11
    settings = config.Config(
        model=config.Model(name=f"https://me:{token}@host/model"), run=config.Run(dir=str(tmp_path / "r"))
    )
    for _ in range(2):
        folder = RunFolder(settings)
        with folder.held():
            folder.start({"data": {"fingerprint": "abc"}})
    written = "".join(file.read_text() for file in (tmp_path / "r").iterdir() if file.is_file())
    assert token not in written and "https://***@host/model" in written


def test_a_run_folder_in_use_is_refused_and_its_readers_need_no_lock(tmp_path):
    from jaxft.reports import folder as reports

    settings = config.Config(run=config.Run(dir=str(tmp_path / "r")))
    folder = RunFolder(settings)
    with folder.held():
        folder.start({"data": {"fingerprint": "abc"}})
        with (
            pytest.raises(UserError, match=rf"run.dir: .* is in use by process {os.getpid()} on "),
            RunFolder(settings).held(),
        ):
            pass
        assert reports.read(tmp_path / "r").fact("state") == "running"
