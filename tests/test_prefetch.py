"""Batches made in a thread ahead of the loop: order, errors, the end of the thread, and what is logged of the waiting."""

import json
import threading
import time

import jax
import numpy as np
import pytest
from test_loader import LONG, apart

from jaxft import config, train
from jaxft.config import Config
from jaxft.data.loader import Loader, Prefetch
from jaxft.errors import UserError
from jaxft.learn.loop import Loop, Parts
from jaxft.learn.step import TrainState
from jaxft.parallel.mesh import make_mesh


def prefetching():
    """Whether a prefetching thread lives."""
    return any(thread.name == "prefetch" and thread.is_alive() for thread in threading.enumerate())


def test_prefetched_steps_come_in_order_and_not_further_ahead_than_asked():
    made = []
    ahead = Prefetch(lambda step: made.append(step) or step * step, 3, 40, depth=2)
    for step in range(3, 40):
        assert ahead.next() == step * step and made[: step - 2] == list(range(3, step + 1))
        time.sleep(0.002)
        assert len(made) <= step - 2 + 3  # two that are ready, and one that waits for its place
    ahead.close()
    assert not prefetching()


def test_a_step_beyond_the_last_is_an_error_and_no_endless_wait():
    ahead, raised = Prefetch(lambda step: step, 0, 1), []

    def ask():
        try:
            raised.append((ahead.next(), ahead.next()))
        except Exception as error:
            raised.append(error)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(5)
    assert isinstance(raised[:1][0] if raised else None, Exception)
    ahead.close()


def test_an_error_is_raised_at_the_step_that_made_it():
    def make(step):
        if step == 2:
            raise UserError("rows:9: gone")
        return step

    ahead = Prefetch(make, 0, 10)
    assert [ahead.next(), ahead.next()] == [0, 1]
    with pytest.raises(UserError, match="rows:9: gone"):
        ahead.next()
    ahead.close()
    assert not prefetching()


@pytest.mark.parametrize("taken", [0, 3, 5])
def test_closing_ends_the_thread_wherever_it_stands(taken):
    made, begun = [], threading.Event()

    def make(step):
        begun.set()
        made.append(step)
        return step

    for stop in (5, 1000):  # at the end; waiting for a place
        ahead = Prefetch(make, 0, stop)
        assert [ahead.next() for _ in range(taken)] == list(range(taken))
        time.sleep(0.02)
        ahead.close()
        ahead.close()
        assert not prefetching() and len(made) <= taken + 4
        made.clear()
    begun.clear()
    slow = Prefetch(lambda step: begun.set() or time.sleep(0.1), 0, 1000)
    assert begun.wait(5)
    slow.close()  # in the middle of making one
    assert not prefetching()


def test_the_seconds_waited_add_up_and_what_is_ready_costs_none():
    slow = Prefetch(lambda step: time.sleep(0.05), 0, 4)
    for _ in range(4):
        slow.next()
    assert 0.05 < slow.waited < 10
    slow.close()
    made = []
    ready = Prefetch(lambda step: time.sleep(0.1) or made.append(step), 0, 3, depth=3)
    while len(made) < 3:
        time.sleep(0.01)
    for _ in range(3):
        ready.next()
    assert ready.waited < 0.1
    ready.close()


class Stub:
    """A training step that takes batches of the length it was compiled for, checkpoints and metrics, all of nothing."""

    latest = 0

    def __init__(self, seconds=0.0, fails_at=None):
        self.records, self.calls, self.seconds, self.fails_at = [], 0, seconds, fails_at

    def lower(self, state, frozen, batch, key):
        stub, shape = self, batch["tokens"].shape

        class Compiled:
            def compile(self):
                return lambda *arguments: stub(shape, *arguments)

        return Compiled()

    def __call__(self, shape, state, frozen, batch, key):
        assert batch["tokens"].shape == shape
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return state, {name: np.float32(1) for name in ("nll", "correct", "weight", "grad_norm", "applied")}

    def write(self, record):
        self.records.append(record)

    def save(self, *arguments):
        time.sleep(self.seconds)

    def wait(self):
        pass

    def check(self):
        pass

    def sync(self):
        pass


def loop(stub, loader, steps, **evaluation):
    settings = Config(run=config.Run(log_every=10), eval=config.Eval(**evaluation))
    parts = Parts(make_mesh(devices=jax.devices()[:1]), float, loader, None, stub, {}, stub, stub)
    state = TrainState(np.int32(0), {}, ())
    return Loop(settings, parts, steps, state, None, time.monotonic())


def test_a_loop_takes_batches_of_every_length_and_ends_its_thread():
    stub = Stub()
    assert loop(stub, apart(LONG), 70).run() == "all 70 steps done"
    assert stub.calls == 70 and not prefetching()
    real = sum(int((apart(LONG).batch_at(step).segments > 0).sum()) for step in range(70))
    assert stub.records[-1]["num_tokens"] == real
    with pytest.raises(KeyboardInterrupt):
        loop(Stub(fails_at=5), apart(LONG), 70).run()
    assert not prefetching()


@pytest.mark.parametrize("every_steps", [9, 10, 3])
def test_the_share_of_waiting_is_of_the_steps_since_the_last_line_whenever_evaluations_come(every_steps, monkeypatch):
    stub, at = Stub(seconds=0.02), Loader.batch_at
    monkeypatch.setattr(Loader, "batch_at", lambda self, *at_step: time.sleep(0.01) or at(self, *at_step))
    loop(stub, apart([50] * 400), 30, every_steps=every_steps).run()
    assert [record["step"] for record in stub.records] == [10, 20, 30]
    assert all(0 < record["data_wait"] <= 1 for record in stub.records)


@pytest.mark.exhaustive
def test_a_run_trains_on_unpacked_batches_of_several_lengths(tmp_path, monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    rows = [{"question": "how many words? " * (1 + i % 20), "answer": f"{i}\n#### {i}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--data.files", str(tmp_path / "rows.jsonl"), "--data.packing", "False", "--model.init", "random"]
    ends = ["--eval.tasks", "--eval.samples", "0", "--run.log_every", "2", "--optim.max_steps", "12"]
    train.main(["--config", "tiny_cpu.py", "--run.dir", str(tmp_path / "run"), *options, *ends])
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in logged if "loss" in record]
    assert len(losses) == 6 and losses[-1] < losses[0] - 1
