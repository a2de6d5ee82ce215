"""SIGTERM and Ctrl-C in every phase of a run: what is trained is saved, the exit code says so, and the same command goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from launched import Run, lines, logged, same_files, saved
from marked import exhaustive, slow
from test_train import one_device, start  # noqa: F401

from jaxft import report
from jaxft.data.loader import Loader
from jaxft.errors import EXIT_AGAIN, EXIT_INTERRUPTED, Stopped
from jaxft.evals import tasks
from jaxft.learn import result
from jaxft.learn.evaluator import Evaluator
from jaxft.learn.loop import Loop
from jaxft.parallel import preemption
from jaxft.parallel.preemption import Preemption
from jaxft.weights import model
from jaxft.weights.checkpoint import Checkpoints

WEIGHTS = "adapter/adapter_model.safetensors"


def signalled(owner, name, number=signal.SIGTERM, when=lambda *arguments: True):
    """`owner.name`, but for a signal to this process before it."""
    made = getattr(owner, name)

    def call(*arguments, **options):
        if when(*arguments):
            os.kill(os.getpid(), number)
        return made(*arguments, **options)

    return call


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """This process is the tests', and must not end for want of an answer."""
    monkeypatch.setattr(preemption, "GRACE_SECONDS", 600.0)


@pytest.fixture
def in_the_foreground():
    """Where Ctrl-C is heard; a job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
def test_a_signal_is_noted_while_something_is_held_and_ends_the_run_elsewhere():
    said = r"stopped by SIGTERM at .*: step 5 is saved; the same command goes"
    with pytest.raises(Stopped, match=said) as found, Preemption() as heard:
        heard.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        while heard.agreed() is None:
            time.sleep(0.01)
        assert heard.agreed() == EXIT_AGAIN
        heard.release("step 5 is saved")
    assert found.value.code == EXIT_AGAIN
    with pytest.raises(Stopped, match=r"stopped by Ctrl-C .* nothing was trained yet"), Preemption():
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(10)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


BUSY = """
import ctypes, signal, sys, time
from jaxft.errors import run_verb
from jaxft.parallel import preemption

preemption.GRACE_SECONDS = 0.5
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background does not have

def main(argv):
    with preemption.Preemption() as found:
        if argv == ["held"]:
            found.hold()
        print("here", flush=True)
        for _ in range(60):
            ctypes.PyDLL(None).sleep(0) if argv == ["held"] else None
            ctypes.CDLL(None).sleep(30)  # as a compiler does: Python hears no signal meanwhile

run_verb(main)
"""


@pytest.mark.parametrize(("held", "numbers", "code"), [("", [signal.SIGTERM], 75), ("held", [signal.SIGINT] * 2, 130)])
def test_a_process_that_compiles_ends_soon_and_a_second_interrupt_ends_it_at_once(held, numbers, code):
    command = [sys.executable, "-u", "-c", BUSY, *([held] if held else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        for number in numbers:
            time.sleep(0.3)
            process.send_signal(number)
        began = time.monotonic()
        (line,) = process.communicate(timeout=60)[1].splitlines()
        assert process.returncode == code and time.monotonic() - began < 10
    assert line.startswith("stopped by ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return start(tmp_path_factory.mktemp("runs") / "whole", *MORE)


MORE = ("--eval.samples", "1", "--eval.tasks", "final_answer", "--eval.limit", "2", "--eval.max_new_tokens", "4")
# Where a signal comes, in the order of a run that goes on after each, and the step saved then; None where none is said.
PHASES = {
    "reading rows": (Loader, "__init__", lambda *_: True, None),
    "reading weights": (model, "materialise", lambda *_: True, None),
    "measuring the base": (tasks, "measure", lambda *_: True, None),
    "the first evaluation": (Evaluator, "__call__", lambda *_: True, None),
    "an evaluation": (Evaluator, "_done", lambda *_: EVALUATED.append(0) or len(EVALUATED) > 2, 5),
    "a step that is logged": (Loop, "_train_once", lambda loop: loop.step == 7, 8),
    "generating": (Loop, "_epoch", lambda loop: loop.step == 10, 10),
    "saving": (Checkpoints, "save", lambda _, step, *more: step == 15, 16),
    "a step": (Loop, "_train_once", lambda loop: loop.step == 17, 18),
    "the last evaluation": (Loop, "_evaluate", lambda loop, _: loop.step == 20, 20),
    "exporting": (result, "export", lambda *_: True, 20),
    "the report": (report, "write", lambda *_: True, None),
}
EVALUATED = []


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize(
    ("number", "code"), [slow(signal.SIGTERM, EXIT_AGAIN), exhaustive(signal.SIGINT, EXIT_INTERRUPTED)]
)
def test_a_signal_in_each_phase_saves_and_the_same_command_ends_as_if_there_had_been_none(
    finished, tmp_path, monkeypatch, number, code
):
    EVALUATED.clear()
    for phase, (owner, name, when, step) in PHASES.items():
        with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
            patch.setattr(owner, name, signalled(owner, name, number, when))
            start(tmp_path, *MORE)
        assert stopped.value.code == code, phase
        durable = [int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")]
        assert max(durable, default=None) == (step if phase != "the report" else 20), phase
        assert step is None or f"step {step} is saved" in str(stopped.value), phase
    start(tmp_path, *MORE)
    for file in (WEIGHTS, "examples.jsonl", "tasks_final_answer.jsonl"):
        assert (tmp_path / file).read_bytes() == (finished / file).read_bytes()
    assert lines(tmp_path) == lines(finished)
    assert (tmp_path / "report.html").exists()
    assert json.loads((tmp_path / "results.json").read_text())["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(("told", "number", "code"), [(1, signal.SIGTERM, 75)])
def test_when_one_of_two_processes_is_told_to_stop_both_save_one_step_and_the_run_goes_on(tmp_path, told, number, code):
    more = ("--optim.max_steps", "24", "--eval.every_steps", "12", "--lora.dropout", "0.2")
    with Run(tmp_path / "alone", 1, 2, *more) as alone:
        alone.all_end_well()
    with Run(tmp_path / "run", 2, 1, *more) as run:
        run.until(logged(run.folder, 2), what="step 2")
        run.processes[told].send_signal(number)
        began = time.monotonic()
        assert [run.ends(index) for index in (0, 1)] == [code, code], run.said(0) + run.said(1)
        assert time.monotonic() - began < 30
    said = [re.fullmatch(r"stopped by SIGTERM: step (\d+) is saved; the same .*\n", run.said(i)) for i in (0, 1)]
    assert all(said), run.said(0) + run.said(1)
    (step,) = {int(found[1]) for found in said}
    assert 2 <= step < 24 and saved(run.folder, step)()
    with Run(run.folder, 2, 1, *more) as resumed:
        resumed.all_end_well()
    assert f"resumed at step {step}" in resumed.said(0, "out")
    same_files(alone.folder, run.folder)
