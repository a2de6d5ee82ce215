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

from jaxft.errors import Stopped, UserError
from jaxft.learn import recompute, step
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
