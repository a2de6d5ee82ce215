"""The train verb as a whole, on a random start of the embedded base, so that nothing but the code is needed."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from launched import TIMES, lines, on_one_device

import jaxft
from jaxft import train
from jaxft.errors import UserError, one_line, run_verb
from jaxft.learn.loop import Loop

SHORT = [
    "--model.init", "random", "--data.limit", "60", "--data.max_length", "96", "--optim.max_steps", "20",
    "--eval.every_steps", "5", "--run.log_every", "4", "--eval.tasks", "--eval.samples", "0",
]  # fmt: skip


def start(folder, *more):
    """Runs the train verb in this process."""
    train.main(["--config", "tiny_cpu.py", "--run.dir", str(folder), *SHORT, *more])
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Most of these runs are about files and order, and quicker on one device than on eight that share two cores."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        yield patch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return start(tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_folder_holds_what_is_promised(finished):
    # Else it imports TensorFlow where that is installed, which takes longer than the run.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = {
        "config.json",
        "examples.jsonl",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "adapter",
        "report.md",
        "report.html",
        "plots",
    }
    assert names | {"report.json"} <= {path.name for path in finished.iterdir()}
    assert json.loads((finished / "config.json").read_text())["optim"]["max_steps"] == 20
    logged = [r for r in lines(finished) if "loss" in r]
    wanted = {"step", "epoch", "loss", "mean_token_accuracy", "learning_rate", "grad_norm", "num_tokens"}
    assert [r["step"] for r in logged] == [4, 8, 12, 16, 20]
    assert all(wanted <= r.keys() for r in logged)
    measured = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert all(r.keys() >= TIMES - {"eval_seconds"} and "mfu" not in r for r in measured if "loss" in r)  # on a CPU
    evaluated = [r for r in lines(finished) if "eval_loss" in r]
    assert [r["step"] for r in evaluated] == [0, 5, 10, 15, 20]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] - 0.5
    board = EventAccumulator(str(finished / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("eval/loss")] == [0, 5, 10, 15, 20]
    assert board.Scalars("train/loss")[-1].value == pytest.approx(logged[-1]["loss"], rel=1e-6)
    adapter = {path.name for path in (finished / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= adapter


def test_examples_have_the_losses_of_the_base_the_best_and_the_last_step(finished):
    found = [json.loads(line) for line in (finished / "examples.jsonl").read_text().splitlines()]
    evaluated = {r["step"]: r for r in lines(finished) if "eval_loss" in r}
    best = json.loads((finished / "results.json").read_text())["best_step"]
    for split, loss in (("validation", "eval_loss"), ("probe", "probe_loss")):
        of = [line for line in found if line["split"] == split]
        assert len(of) == 3  # 5 % of 60
        for time, step in (("base", 0), ("best", best), ("end", 20)):
            nll, tokens = sum(line["nll"][time] for line in of), sum(line["tokens"] for line in of)
            assert nll / tokens == pytest.approx(evaluated[step][loss], rel=1e-12)
    assert all("#### " in line["answer"] and line["bytes"] > line["tokens"] / 2 for line in found)
    assert all(line["kinds"]["final answer"]["tokens"] > 0 for line in found)


def stopping_at(step):
    """A `Loop._train_once` that is interrupted after `step`."""
    once = Loop._train_once

    def train_once(self):
        once(self)
        if self.step == step:
            raise KeyboardInterrupt

    return train_once


def test_a_resumed_run_is_bitwise_the_uninterrupted_one_and_each_start_compiles_one_step(
    finished, tmp_path, monkeypatch, capsys
):
    """Stopped between two checkpoints, after lines were logged that the resumed run logs again."""
    begin, loops = Loop.__init__, []
    monkeypatch.setattr(Loop, "__init__", lambda self, *arguments: loops.append(self) or begin(self, *arguments))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_train_once", stopping_at(13))
        start(tmp_path)
    start(tmp_path)
    weights = "adapter/adapter_model.safetensors"
    for name in (weights, "examples.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    assert lines(tmp_path) == lines(finished)
    assert [(loop.step, list(loop._steps)) for loop in loops] == [(13, [(8, 96)]), (20, [(8, 96)])]
    assert all(
        loop._steps == loop.parts.compiled for loop in loops
    )  # compiled while the weights were read, and then no more
    assert capsys.readouterr().out.count("compiled the training step for 8 × 96 in") == 2


def traced(folder):
    """The steps in each trace of a run folder, oldest first, by their annotation."""
    files = sorted((folder / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb"))
    planes = [jax.profiler.ProfileData.from_file(str(file)).planes for file in files]
    events = [[e for plane in one for line in plane.lines for e in line.events if e.name == "train"] for one in planes]
    return [sorted(dict(event.stats)["step_num"] for event in found) for found in events]


TRACED = """
import sys
sys.path.insert(0, "tests")
import pytest
from jaxft.learn.loop import Loop
from tests.test_train import start, stopping_at

ends = ["--run.profile", "7", "8", "--optim.max_steps", "9"]
with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Loop, "_train_once", stopping_at(7))
    start(sys.argv[1], *ends)
start(sys.argv[1], *ends)  # goes on from step 5
"""


@pytest.mark.slow  # two starts in a new process
def test_chosen_steps_are_traced_for_tensorboard_in_every_start_that_runs_them(tmp_path):
    """In a process of its own: JAX's profiler crashes where libtpu was loaded to compile for a TPU that is not there."""
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", TRACED, tmp_path], env=on_one_device(), cwd=root, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert re.findall(r"traced steps (\d+) to (\d+): ", ran.stdout) == [("7", "7"), ("7", "8")]
    assert traced(tmp_path) == [[7], [7, 8]]


@pytest.mark.exhaustive  # test_families_on_a_mesh and test_step hold eight devices against one in less time
def test_eight_devices_log_the_losses_of_one(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", jax.local_devices)
    start(tmp_path, "--mesh.data", "4", "--mesh.fsdp", "2", "--optim.max_steps", "20")
    for one, eight in zip(lines(finished), lines(tmp_path), strict=True):
        assert eight == pytest.approx(one, rel=2e-4)  # a sum's order, amplified by twenty Adam steps


def test_an_ended_run_is_left_alone_and_other_settings_are_refused(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    start(finished)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"optim.learning_rate 0.01 → 0.1"):
        start(finished, "--optim.learning_rate", "0.1")
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_that_never_gets_better_stops_early_and_gives_the_adapter_of_step_0(tmp_path):
    from safetensors.numpy import load_file

    start(tmp_path, "--optim.learning_rate", "0", "--eval.every_steps", "2", "--eval.patience", "3")
    report = json.loads((tmp_path / "results.json").read_text())
    assert (report["step"], report["best_step"]) == (6, 0)
    assert "early stop" in report["ended"]
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(not value.any() for name, value in adapter.items() if "lora_B" in name)
    assert any(value.any() for name, value in adapter.items() if "lora_A" in name)


@pytest.mark.slow
def test_training_every_weight_writes_a_model_that_transformers_reads(tmp_path):
    import torch
    import transformers

    start(tmp_path, "--lora", "none", "--optim.learning_rate", "1e-3", "--eval.samples", "1")
    folder = tmp_path / "model"
    model, tokenizer = jaxft.load(str(folder))
    ids = np.array([tokenizer("Tom has 3 apples.")["input_ids"]])
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(model(ids) - expected).max() < 1e-4 * np.ptp(expected)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_training_goes_on_from_an_adapter(finished, tmp_path):
    start(tmp_path, "--model.adapter", str(finished / "adapter"), "--optim.max_steps", "2")
    first, last = lines(tmp_path)[0], [r for r in lines(finished) if "eval_loss" in r][-1]
    assert first["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-6)


def test_without_packing_and_without_validation_a_run_ends_with_its_last_step(tmp_path):
    start(tmp_path, "--data.packing", "false", "--data.validation_fraction", "0", "--optim.max_steps", "3")
    assert json.loads((tmp_path / "results.json").read_text())["best_step"] == 3
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_batch_that_does_not_split_over_the_devices_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", jax.local_devices)
    with pytest.raises(UserError, match="multiple of 8"):
        start(tmp_path / "run", "--optim.batch_size", "6")


ROW = '{"question": "1+1?", "answer": "2\\n#### 2"}\n'
MISTAKES = {
    "a missing model folder": (["--model.name", "./no_such_model"], None, "no_such_model"),
    "a missing data file": (["--data.files", "gone.jsonl"], None, "gone.jsonl"),
    "an empty data file": ([], "", "rows.jsonl"),
    "a line that is no JSON": ([], ROW + ROW + "{oops\n", "rows.jsonl:3"),
    "a row without the fields": ([], ROW + '{"prompt": "x", "text": 3}\n', "rows.jsonl:2"),
    "an unknown key": (["--optim.lr", "1"], None, "did you mean optim.learning_rate?"),
    "a target that matches nothing": (["--lora.targets", "query"], None, "q_proj"),
    "an unknown task": (["--eval.tasks", "gsm8k"], None, "final_answer"),
    "a mesh that does not multiply": (["--mesh.data", "3"], None, "1 device"),
    "an adapter that is not there": (["--model.adapter", "nowhere"], None, "nowhere"),
    "answers that do not fit": (["--data.max_length", "4"], ROW * 4, "data.max_length"),
    "a chat template that is not there": (["--data.template", "chat"], None, "data.template"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2_and_writes_nothing(mistake, tmp_path, monkeypatch, capsys):
    more, rows, said = MISTAKES[mistake]
    if rows is not None:
        (tmp_path / "rows.jsonl").write_text(rows)
        more = [*more, "--data.files", str(tmp_path / "rows.jsonl")]
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train", "--config", "tiny_cpu.py", "--run.dir", str(folder), *SHORT, *more])
    with pytest.raises(SystemExit) as stopped:
        run_verb(train.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error
    assert not folder.exists()


@pytest.mark.slow
def test_rows_whose_answers_do_not_fit_are_counted_and_harmless(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    long = json.dumps({"question": "how many words are here? " * 30, "answer": "1\n#### 1"}) + "\n"
    rows.write_text("".join(ROW.replace("1+1", f"{i}+1") for i in range(40)) + long * 3)
    start(tmp_path / "run", "--data.files", str(rows), "--optim.max_steps", "4", "--data.validation_fraction", "0.1")
    said = capsys.readouterr().out
    assert re.search(r"\d are cut at 96 tokens and [123] dropped", said)
    assert all(np.isfinite(v) for record in lines(tmp_path / "run") for v in record.values())


def test_a_mistake_ends_a_real_process_with_exit_2_and_no_traceback():
    command = [sys.executable, "-m", "jaxft.train", "--config", "tiny_cpu.py", "--optim.lerning_rate", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr == one_line(ended.stderr) + "\n"
    assert "did you mean optim.learning_rate?" in ended.stderr


def test_a_step_that_fits_no_device_ends_with_what_it_needs_and_exit_3(tmp_path, monkeypatch, capsys):
    from jaxft.parallel import mesh

    monkeypatch.setattr(mesh, "usable_bytes", lambda mesh: 1 << 20)
    with pytest.raises(SystemExit) as ended:
        run_verb(lambda argv: start(tmp_path))
    said = capsys.readouterr()
    assert ended.value.code == 3
    (line,) = said.err.splitlines()
    assert line.startswith("error: the training step does not fit") and "lower optim.batch_size" in line
    parts = re.search(
        r"with model.remat dots: weights (.*), lora (.*), optimizer (.*), batch (.*), activations (.*)\n", said.out
    )
    weights, lora, optimizer, *_ = map(float, parts.groups())
    assert optimizer == pytest.approx(2 * lora, abs=0.02) and weights < 0.1
