"""A run stopped after every single step is the uninterrupted one, to the last bit; and what a resumed run may change."""

import dataclasses
import hashlib
import json
import os
import signal

import jax
import numpy as np
import pytest
from test_train import lines, one_device, start  # noqa: F401

from jaxft import config
from jaxft.errors import Stopped, UserError
from jaxft.learn import recompute, step
from jaxft.learn.description import moved
from jaxft.learn.folder import RunFolder
from jaxft.learn.loop import Loop
from jaxft.parallel import preemption

STEPS = 40
# With packing and a cosine schedule, as the config has them; evaluations and log lines come at steps of their own.
WHOLE = (
    "--optim.max_steps", str(STEPS), "--optim.accumulation_steps", "2", "--lora.dropout", "0.2", "--eval.every_steps", "7",
    "--run.log_every", "3", "--eval.patience", "4", "--eval.min_delta", "0.05", "--optim.warmup", "5",
)  # fmt: skip


def digest(state):
    """sha256 of every array of a state, with its place in it."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
        found.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


@pytest.fixture
def states(monkeypatch):
    """Each start's loop, and the digest of its state before the first step and after each; programs compile but once."""
    monkeypatch.setattr(preemption, "GRACE_SECONDS", 600.0)  # this process is the tests', and must not end
    for owner, name in ((recompute, "compile_step"), (step, "make_eval_step")):
        monkeypatch.setattr(owner, name, once(getattr(owner, name)))
    seen, begin, train_once = {}, Loop._train, Loop._train_once

    def note(loop):
        return seen.setdefault(loop.step, []).append(digest(loop.state))

    monkeypatch.setattr(Loop, "_train", lambda self: note(self) or begin(self))
    monkeypatch.setattr(Loop, "_train_once", lambda self: (train_once(self), note(self)))
    return seen


def once(make):
    made = []

    def call(*arguments):
        if not made:
            made.append(make(*arguments))
        return made[0]

    return call


def stand(loop):
    """Best loss and step, patience, sums and counts, but for what the clock decides."""
    return {name: value for name, value in dataclasses.asdict(loop.stand).items() if not name.endswith("seconds")}


@pytest.mark.slow
def test_a_run_stopped_after_each_of_its_40_steps_is_the_uninterrupted_one(states, tmp_path, monkeypatch):
    """Parameters, moments, counts, losses, the best step, patience, examples and the adapter; each start draws its own keys."""
    stands, run = [], Loop.run
    monkeypatch.setattr(Loop, "run", lambda self: (run(self), stands.append(stand(self)))[0])
    whole, of_whole = start(tmp_path / "whole", *WHOLE), stands.pop()
    wanted = {at: found[0] for at, found in states.items()}
    last = max(wanted)
    states.clear()
    begins = []

    def stopped_after_one(self, train_once=Loop._train_once):
        begins.append(self.step)
        train_once(self)
        os.kill(os.getpid(), signal.SIGTERM)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_once", stopped_after_one)
        for at in range(1, last + 1):
            with pytest.raises(Stopped, match=f"step {at} is saved"):
                start(parts, *WHOLE)
    start(parts, *WHOLE)
    assert begins == list(range(last)) and len(wanted) == last + 1
    assert {at: set(found) for at, found in states.items()} == {at: {found} for at, found in wanted.items()}
    assert stands[-1] == of_whole
    assert lines(parts) == lines(whole)
    for name in ("adapter/adapter_model.safetensors", "examples.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


CHANGES = ("--eval.every_steps", "2", "--run.keep", "3", "--optim.learning_rate", "1e-3", "--optim.max_steps", "8")


@pytest.mark.slow  # four starts
def test_a_resumed_run_may_change_some_settings_says_others_and_refuses_the_rest(tmp_path, monkeypatch, capsys):
    once, more = Loop._train_once, ("--optim.max_steps", "6", "--eval.every_steps", "3")
    monkeypatch.setattr(preemption, "GRACE_SECONDS", 600.0)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="step 4 is saved"):
        patch.setattr(
            Loop, "_train_once", lambda self: (once(self), self.step == 4 and os.kill(os.getpid(), signal.SIGTERM))
        )
        start(tmp_path, *more)
    with pytest.raises(
        UserError, match=r"lora.rank 8 → 4; optim.batch_size 8 → 4; run.seed 0 → 1; give a new --run.dir"
    ):
        start(tmp_path, *more, "--lora.rank", "4", "--run.seed", "1", "--optim.batch_size", "4", *CHANGES)
    capsys.readouterr()
    start(tmp_path, *more, *CHANGES)
    said = "optim.learning_rate 0.01 → 0.001; optim.max_steps 6 → 8"
    assert f"changed since this run began, and from here on only: {said}\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["step"], "; ".join(results["changes"])) == (8, said)
    with pytest.raises(UserError, match=r"optim.max_steps 8 → 9; give a new --run.dir"):  # it has ended
        start(tmp_path, *more, *CHANGES, "--optim.max_steps", "9")


def begun(folder, without=(), **results):
    """A folder in which a run with the tiny default's settings has begun, by a version that did not know all of them."""
    settings = config.to_dict(config.load("tiny_cpu.py", ["--run.dir", str(folder)]))
    for key in without:
        section, name = key.split(".")
        del settings[section][name]
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "results.json").write_text(json.dumps({"state": "running", **results}))


def opened(folder, *words):
    return RunFolder(config.load("tiny_cpu.py", ["--run.dir", str(folder), *words]))


def test_a_refused_change_can_be_allowed_by_its_name(tmp_path):
    begun(tmp_path)
    words = ("--data.max_length", "64", "--lora.rank", "4")
    remedy = r"\(or go on all the same with --run.allow_change data.max_length lora.rank\)$"
    with pytest.raises(UserError, match=r"max_length \d+ → 64; lora.rank 8 → 4; give a new --run.dir " + remedy):
        opened(tmp_path, *words)
    with pytest.raises(UserError, match=r"lora.rank 8 → 4; give a new"):
        opened(tmp_path, *words, "--run.allow_change", "data.max_length")
    opened(tmp_path, *words, "--run.allow_change", "data.max_length", "lora.rank")
    with pytest.raises(UserError, match=r"run.allow_change: unknown key data.max_len; did you mean data.max_length\?"):
        opened(tmp_path, "--run.allow_change", "data.max_len")
    begun(tmp_path, state="finished")
    with pytest.raises(UserError, match=r"give a new --run.dir$"):
        opened(tmp_path, *words, "--run.allow_change", "data.max_length", "lora.rank")


def test_a_setting_that_was_unknown_when_the_run_began_counts_as_its_default(tmp_path):
    begun(tmp_path, without=("lora.dora", "model.param_dtype", "run.allow_change"))
    opened(tmp_path)
    with pytest.raises(UserError, match=r"lora.dora False → True"):
        opened(tmp_path, "--lora.dora", "True")
    with pytest.raises(UserError, match=r"lora.rank 8 → None"):
        opened(tmp_path, "--lora", "none")


def test_a_run_that_goes_on_elsewhere_says_that_its_bits_are_others():
    here = {"device": {"kind": "cpu", "count": 8, "processes": 1}, "mesh": {"data": 1, "fsdp": 8, "tensor": 1}}
    there = {"device": {"kind": "TPU v5 lite", "count": 4, "processes": 2}, "mesh": {"data": 1, "fsdp": 4, "tensor": 1}}
    assert moved({}, here) is None and moved(here, here) is None
    assert moved(here, here | {"device": {"kind": "cpu", "count": 8, "processes": 4}}) is None  # to the same bits
    assert moved(there, here).startswith("was on 4 × TPU v5 lite (data=1, fsdp=4, tensor=1): from here on")
    assert moved(here | {"mesh": {"data": 8, "fsdp": 1, "tensor": 1}}, here) is not None
