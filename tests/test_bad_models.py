"""The catalogue of bad models, folders and settings: each ends a run in one line on stderr, with exit 2, and trains nothing."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_train import SHORT, one_device  # noqa: F401

from jaxft import train
from jaxft.errors import run_verb
from jaxft.weights.hub import BUILTIN

WIDTH = json.loads((BUILTIN["builtin:tiny"] / "config.json").read_text())["hidden_size"]
NORM, FIRST = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


def weights(**changes):
    """Other tensors in the model's one file; None takes one out."""

    def spoil(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file) | {name: value for name, value in changes.items() if value is not None}
        save_file({name: value for name, value in tensors.items() if changes.get(name, 0) is not None}, file)

    return spoil


def rewritten(name, change):
    def spoil(folder):
        file = folder / name
        file.write_text(change(file.read_text()))

    return spoil


def removed(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def settings(**changes):
    return rewritten("config.json", lambda text: json.dumps(json.loads(text) | changes))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


SPOILT = {
    "config.json is missing": (removed("config.json"), "config.json"),
    "config.json is no JSON": (rewritten("config.json", lambda text: text[:40]), "config.json"),
    "config.json is a list": (rewritten("config.json", lambda text: "[]"), "config.json"),
    "a family that is not there": (settings(model_type="mamba", architectures=["MambaForCausalLM"]), "mamba"),
    "heads that do not divide": (settings(num_attention_heads=3), "head"),
    "a size that is text": (settings(hidden_size="many"), "hidden_size"),
    "the weights are missing": (removed("model.safetensors"), "safetensors"),
    "the weights are pickled": (pickled, "safetensors"),
    "the weights are cut off": (cut, "model.safetensors"),
    "a tensor is missing": (weights(**{NORM: None}), NORM),
    "a tensor too many": (weights(stray=np.zeros(3, np.float32)), "stray"),
    "a tensor of another shape": (weights(**{FIRST: np.zeros((3, 5), np.float32)}), FIRST),
    "a tensor that is not finite": (weights(**{NORM: np.full(WIDTH, np.nan, np.float32)}), "weights are not finite"),
    "the tokenizer is missing": (removed("tokenizer.json"), "tokenizer"),
    "the tokenizer is no JSON": (rewritten("tokenizer.json", lambda text: text[:99]), "tokenizer"),
}  # fmt: skip


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """What the train verb says on stderr, in one line and with exit 2."""

    def said(*more):
        monkeypatch.setattr(
            sys, "argv", ["train", "--config", "tiny_cpu.py", "--run.dir", str(tmp_path / "run"), *more]
        )
        with pytest.raises(SystemExit) as stopped:
            run_verb(train.main)
        line = capsys.readouterr().err
        assert stopped.value.code == 2, line
        assert line.startswith("error: ") and line.count("\n") == 1 and len(line) < 700
        assert not list(tmp_path.glob("run/checkpoints/[0-9]*"))
        return line

    return said


LATE = ("a tensor that is not finite",)  # found by the first evaluation, after compiling


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow if f in LATE else ()) for f in SPOILT])
def test_a_spoilt_model_is_one_line_that_names_what(said, tmp_path, fault):
    spoil, named = SPOILT[fault]
    folder = shutil.copytree(BUILTIN["builtin:tiny"], tmp_path / "model")
    spoil(folder)
    assert re.search(
        named, said(*[w for w in SHORT if w not in ("--model.init", "random")], "--model.name", str(folder))
    )


FOLDERS = {
    "a file": (lambda run: run.write_text("x"), "Not a directory"),
    "a folder of something else": (lambda run: (run / "photos").mkdir(parents=True), "exists and holds no run"),
    "a damaged config.json": (lambda run: run.mkdir() or (run / "config.json").write_text("{oops"), "config.json"),
    "a damaged results.json": (lambda run: run.mkdir() or (run / "results.json").write_bytes(b"\xff"), "results.json"),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_a_run_folder_that_is_none_is_one_line(said, tmp_path, fault):
    make, named = FOLDERS[fault]
    make(tmp_path / "run")
    assert named in said(*SHORT)


OPTIONS = {
    "a config file that is not there": (["--config", "nowhere.py"], "no such file"),
    "tensor parallel heads that do not divide": (["--mesh.tensor", "3"], "mesh.tensor"),
    "a rank above the matrices": (["--lora.rank", "0"], "lora.rank"),
    "a regular expression that is none": (["--lora.targets", "(q_proj"], "lora.targets|q_proj"),
    "a positive infinity": (["--optim.learning_rate", "inf"], "finite"),
    "a boolean that is none": (["--data.packing", "maybe"], "packing"),
    "an argument too many": (["--optim.clip", "1", "2"], "2"),
    "a data set that is not there": (["--data.name", "generated:poems"], "generated:poems"),
    "a split that is not there": (["--data.split", "tset"], "tset"),
    "a format that does not fit": (["--data.format", "messages"], "messages"),
    "no rows": (["--data.limit", "0"], "data.limit"),
    "a Weights & Biases that is not installed": (["--run.wandb", "mine"], "wandb"),
    "a coordinator that is no address": (["--mesh.coordinator", "x"], "mesh"),
    "more chips than there are": (["--mesh.fsdp", "64"], "device"),
    "weights of an adapter and none": (["--lora", "none", "--model.adapter", "x"], "model.adapter"),
}


@pytest.mark.parametrize("fault", OPTIONS)
def test_a_wrong_setting_is_one_line_before_anything_is_read(said, monkeypatch, fault):
    from jaxft.weights.shards import Slice

    monkeypatch.setattr(Slice, "__getitem__", None)
    more, named = OPTIONS[fault]
    assert re.search(named, said(*SHORT, *more))
