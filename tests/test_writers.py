"""What a run tells besides metrics.jsonl: TensorBoard, the model card, answers to every problem, Weights & Biases."""

import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from checkpoints import llama, load, save, with_random_b

from jaxft import report, train
from jaxft.config import Lora, Mesh
from jaxft.errors import UserError
from jaxft.learn.metrics import Metrics
from jaxft.learn.norms import adapter_norms
from jaxft.learn.writers import Board, flat
from jaxft.models.adaptation import plan_of
from jaxft.parallel.mesh import make_mesh
from jaxft.weights.hub import read_arch

SHORT = [
    "--data.limit", "60", "--data.max_length", "96", "--optim.max_steps", "4",
    "--eval.every_steps", "2", "--run.log_every", "2",
]  # fmt: skip
# As TRL's SFTTrainer has them in TensorBoard.
TRL = {
    "train/loss", "train/learning_rate", "train/grad_norm", "train/epoch", "train/num_tokens", "train/mean_token_accuracy",
    "eval/loss", "eval/mean_token_accuracy",
}  # fmt: skip

BESIDES = (
    "eval_perplexity", "eval_bits_per_byte", "eval_token_accuracy_without_annotations", "eval_token_accuracy_final_answer",
    "probe_loss", "probe_mean_token_accuracy", "eval_samples_stopped",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with a task and samples."""
    folder, first = tmp_path_factory.mktemp("runs") / "told", jax.devices()[:1]
    told = ["--eval.limit", "2", "--eval.max_new_tokens", "6", "--eval.samples", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        patch.setattr(report, "write", lambda folder: None)  # test_report's
        train.main(["--config", "tiny_cpu.py", "--run.dir", str(folder), *SHORT, *told])
    return folder


@pytest.fixture(scope="module")
def board(run):
    # Else it imports TensorFlow where that is installed, which takes longer than the run.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "histograms": 0}).Reload()


def record(run, step):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(r for r in found if r["step"] == step and "eval_loss" in r)


def test_scalars_have_trls_names_and_evaluations_stand_together(run, board):
    tags = set(board.Tags()["scalars"])
    assert tags >= TRL
    measured = record(run, 4)
    for name in BESIDES:
        assert board.Scalars(name.replace("_", "/", 1))[-1].value == pytest.approx(measured[name], rel=1e-6)
    assert all(tag.partition("/")[0] in ("train", "eval", "probe", "final") for tag in tags)


def test_there_is_one_run_with_its_settings_and_final_figures_in_the_table_of_runs(run, board):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    assert len(list((run / "tensorboard").glob("**/events.out.*"))) == 1

    def content(tag):
        data = board.SummaryMetadata(f"_hparams_/{tag}").plugin_data
        assert data.plugin_name == "hparams"
        return HParamsPluginData.FromString(data.content)

    started = content("session_start_info").session_start_info.hparams
    assert started["lora.rank"].number_value == 8 and started["optim.schedule"].string_value == "cosine"
    assert started["data.packing"].bool_value is True and not {"run.dir", "data.cache"} & set(started)
    names = [info.name.tag for info in content("experiment").experiment.metric_infos]
    results = json.loads((run / "results.json").read_text())
    figures = results["best_loss"], results["tasks"]["final_answer"]["tuned"]["exact_match"]
    assert names == ["final/best_eval_loss", "final/final_answer_exact_match"]
    assert [board.Scalars(name)[0].value for name in names] == pytest.approx(figures)
    assert content("session_end_info").session_end_info.status == 1  # success


def test_histograms_show_lengths_once_and_how_far_the_adapter_moved_at_each_evaluation(board):
    assert [e.step for e in board.Histograms("data/train_row_tokens")] == [0]
    assert board.Histograms("data/train_row_tokens")[0].histogram_value.num == 57
    for name in ("A", "B", "added"):
        assert [e.step for e in board.Histograms(f"lora_norm/{name}")] == [0, 2, 4]
    added = [e.histogram_value for e in board.Histograms("lora_norm/added")]
    assert added[0].max == 0 < added[1].min <= added[2].max and added[0].num == 4 * 7  # layers × modules


def test_samples_say_whether_they_stopped(board):
    (first, *_) = board.Tensors("samples/text_summary")
    text = first.tensor_proto.string_val[0].decode()
    assert text.count("→") == 2 and text.count("[cut at 6 tokens]") + text.count("[stopped after ") == 2
    assert all(line.startswith("    ") for line in text.splitlines())


def test_every_problem_has_both_models_answers(run):
    lines = [json.loads(line) for line in (run / "tasks_final_answer.jsonl").read_text().splitlines()]
    scores = json.loads((run / "results.json").read_text())["tasks"]["final_answer"]
    assert [line["doc"] for line in lines] == [0, 1]
    for side in ("base", "tuned"):
        assert sum(line[side]["right"] for line in lines) / 2 == scores[side]["exact_match"]
        assert sum(line[side]["cut"] for line in lines) / 2 == scores[side]["truncated"]
        assert [line[side]["text"] for line in lines] == [e["answer"] for e in scores[side]["examples"]]


def test_the_card_is_read_by_the_hubs_parser_and_has_no_teacher_forced_figure_in_its_index(run):
    from huggingface_hub import ModelCard

    card = ModelCard.load(run / "adapter" / "README.md")
    scores = json.loads((run / "results.json").read_text())["tasks"]["final_answer"]["tuned"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("exact_match", round(scores["exact_match"], 4))
    assert (result.task_type, result.dataset_name, result.dataset_split) == (
        "text-generation", "generated:word_problems", "test",
    )  # fmt: skip
    assert card.data.library_name == "peft" and card.data.tags == ["jaxft", "lora"]
    low, high = scores["exact_match_interval"]
    assert f"(95 % interval {100 * low:.1f} to {100 * high:.1f}) on 2 problems" in card.text
    best = json.loads((run / "results.json").read_text())["best_step"]
    assert f"loss {record(run, best)['eval_loss']:.4f} nats" in card.text.partition("## Teacher-forced")[2]
    assert "loss" not in card.data.to_yaml() and "token" not in card.data.to_yaml()


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 2}], ids=["one device", "2·2·2"])
def test_norms_are_those_of_the_pairs_and_of_their_product(mesh, tmp_path):
    lora = Lora(rank=4, alpha=6, rslora=True)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else make_mesh(Mesh(**mesh))
    loaded = with_random_b(load(save(llama(vocab_size=96), tmp_path), lora, mesh=mesh))
    found = adapter_norms(loaded.rows, plan_of(lora, read_arch(tmp_path)), mesh)(loaded.trainable)
    wanted = {"A": [], "B": [], "added": []}
    for row in loaded.rows:
        if row.adapter and row.path.endswith(".a"):
            pairs = zip(np.asarray(loaded.trainable[row.path]), np.asarray(loaded.trainable[row.path[:-1] + "b"]))
            for a, b in pairs:
                for name, matrix in (("A", a), ("B", b), ("added", 6 / 4**0.5 * a @ b)):
                    wanted[name].append(np.linalg.norm(matrix))
    assert len(wanted["A"]) == 2 * 7
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)
    assert (
        adapter_norms([row for row in loaded.rows if not row.adapter], plan_of(None, read_arch(tmp_path)), mesh) is None
    )


def test_settings_are_told_flat_without_what_is_off_and_where_things_lie():
    settings = {"lora": None, "run": {"dir": "/home/me", "seed": 0, "wandb": None}, "data": {"files": [], "limit": 3}}
    assert flat(settings) == {"run.seed": 0, "data.limit": 3}


def test_numbers_that_are_not_finite_stop_no_writer(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.writers.append(Board(tmp_path / "tensorboard", None, {}, ["final/x"]))
        metrics.write({"step": 1, "loss": float("nan"), "grad_norm": 1.0})
        for values in (np.array([np.inf]), np.zeros(0)):
            metrics.histogram("lengths", values, 1)
        metrics.scores({"final/x": 1.0}, 1)
    metrics.close()


def test_without_its_package_weights_and_biases_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    with pytest.raises(UserError, match=r"run.wandb: .* `pip install 'jaxft\[wandb\]'`"):
        train.main(["--config", "tiny_cpu.py", "--run.dir", str(tmp_path / "run"), "--run.wandb", "mine", *SHORT])
    assert not (tmp_path / "run").exists()


OFFLINE = """
import glob, json, sys
from wandb.proto import wandb_internal_pb2

def records(data, block=32768, header=7):
    \'\'\'Of the package's file: LevelDB's log format behind seven bytes of its own.\'\'\'
    at, whole = header, b""
    while at + header <= len(data):
        left = block - at % block
        if left < header:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + header : at + header + size]
        at += header + size
        if kind in (1, 4):  # all of a record, or its end
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""

(file,) = glob.glob(sys.argv[1] + "/wandb/offline-run-*/run-*.wandb")
kept = {"history": [], "config": {}, "kinds": []}
for record in records(open(file, "rb").read()):
    kind = record.WhichOneof("record_type")
    kept["kinds"].append(kind)
    if kind == "history":
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        kept["history"].append(items)
    elif kind == "run":
        kept["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
print(json.dumps(kept))
"""


@pytest.mark.slow  # a run in a process of its own
def test_weights_and_biases_gets_the_settings_and_the_records_and_nothing_else(tmp_path):
    pytest.importorskip("wandb", exc_type=ImportError)
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "XLA_FLAGS": ""}
    folder = tmp_path / "run"
    command = ["-m", "jaxft.train", "--config", "tiny_cpu.py", "--run.dir", str(folder), "--run.wandb", "mine", *SHORT]
    ran = subprocess.run(
        [sys.executable, *command, "--eval.tasks", "--eval.samples", "0"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    read = subprocess.run(
        [sys.executable, "-c", OFFLINE, folder], env=environment, capture_output=True, text=True, check=True
    )
    kept = json.loads(read.stdout.splitlines()[-1])
    wanted = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [{k: v for k, v in items.items() if not k.startswith("_")} for items in kept["history"]]
    by_step: dict = {}
    for one in wanted:  # what is logged at one step is one entry
        by_step.setdefault(one["step"], {}).update(one)
    assert told == list(by_step.values())
    assert kept["config"]["lora.rank"] == 8 and "run.dir" not in kept["config"]
    assert not {"stats", "output", "output_raw", "files"} & set(kept["kinds"]), kept["kinds"]
