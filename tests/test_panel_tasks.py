"""The regression panel's real tasks, offline, from data sets as the Hub has them: transformers' results, and traps."""

import math
from pathlib import Path

import hub_datasets
import numpy as np
import pytest
from evaluated import TINY, adapted, evaluated, of_harness
from safetensors.numpy import load_file, save_file

from jaxft.errors import UserError
from jaxft.evals.harness import check_finite

lm_eval = pytest.importorskip("lm_eval")

pytestmark = of_harness
TASKS = ["arc_challenge", "mmlu", "hellaswag", "drop", "mathqa", "truthfulqa_mc2", "truthfulqa_mc1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """With every subject of MMLU: the harness's group asks all 57."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    subjects = [file.stem.removeprefix("mmlu_") for file in folder.glob("mmlu_*.yaml")]
    return hub_datasets.write(tmp_path_factory.mktemp("hub"), subjects)


def theirs(model, tasks, shots=None):
    """The harness's own evaluation with its transformers backend, of the same tasks."""
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        if shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)
    return evaluate(model, tasks, bootstrap_iters=0, log_samples=True)


def hugging_face(folder, **more):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", batch_size=8, device="cpu", **more)


def assert_same_results(ours, wanted, names):
    """To a hundred thousandth: likelihoods agree to that."""
    for task in names:
        for metric, value in wanted["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, abs=1e-5), (task, metric)


@pytest.mark.slow
def test_the_panel_offline_is_what_the_transformers_backend_gets_base_and_tuned(data, tmp_path, capsys):
    from jaxft.evals import harnessed

    adapter = adapted(tmp_path / "adapter", "q_proj", "down_proj")
    ours, lines = evaluated(
        "--model", TINY, "--adapter", adapter, "--dtype", "float32", "--tasks", ",".join(TASKS), "--task-data", data,
        "--num-fewshot", 1, out=tmp_path / "out",
    )  # fmt: skip
    tasks = harnessed.loaded(TASKS, None, [], str(data))
    wanted = {
        "base_results": theirs(hugging_face(TINY), tasks, 1),
        "results": theirs(hugging_face(TINY, peft=adapter), tasks, 1),
    }
    for side, found in wanted.items():
        assert_same_results({"results": ours[side]}, found, [*tasks["tasks"], "mmlu"])
    assert ours["base_results"] != ours["results"]
    for task in tasks["tasks"]:
        hashes = dict.fromkeys(sample["prompt_hash"] for sample in wanted["results"]["samples"][task])
        assert list(dict.fromkeys(line["prompt_sha256"] for line in lines[task])) == list(hashes)
    assert [row["task"] for row in ours["panel"]] == [
        "mmlu", "arc_challenge", "hellaswag", "drop", "mathqa", "truthfulqa_mc2", "truthfulqa_mc1",
    ]  # fmt: skip
    assert ours["tasks"]["mmlu"]["documents"] == 57 and ours["n-shot"]["mmlu_anatomy"] == 1
    assert ours["n-shot"]["truthfulqa_mc2"] == 0  # whatever is asked for
    said = [line for line in ours["verdicts"] if line.startswith("drop: as a shot's answer")]
    assert said and said[0] in capsys.readouterr().out and "caution" in ours["tasks"]["drop"]["protocol"]


@pytest.mark.slow
def test_a_model_of_nans_has_no_score_where_the_harness_gives_it_all_of_truthfulqa(data, tmp_path):
    from jaxft.evals import harnessed

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in TINY.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(TINY / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    tasks = harnessed.loaded(["truthfulqa_mc1"], None, [], str(data))
    assert theirs(hugging_face(broken), tasks)["results"]["truthfulqa_mc1"]["acc,none"] == 1.0
    words = ["--model", broken, "--dtype", "float32", "--task-data", data, "--tasks"]
    for task in ("truthfulqa_mc1", "truthfulqa_mc2", "arc_challenge"):
        with pytest.raises(
            UserError, match=r"the base model gives nan as the log-likelihood of .* continuations; check"
        ):
            evaluated(*words, task, out=tmp_path / task)
        assert not (tmp_path / task).exists()


@pytest.mark.slow
def test_probabilities_too_small_for_a_float_still_have_shares(data):
    from jaxft.evals import harnessed

    task = harnessed.loaded(["truthfulqa_mc2"], None, [], str(data))["tasks"]["truthfulqa_mc2"]
    doc = {"mc2_targets": {"labels": [1, 1, 0]}}
    for least in (0.0, -800.0):
        found = task.process_results(doc, [(least - 1.0, False), (least - 2.0, False), (least - 1.5, True)])
        shares = [math.exp(-1.0), math.exp(-2.0), math.exp(-1.5)]
        assert found["acc"] == pytest.approx(sum(shares[:2]) / sum(shares))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--tasks drop",
            r"drop: its data cannot be loaded .*EleutherAI/drop.*--task-data the folder in which it lies under",
        ),
        ("--tasks drop --task-data nowhere", "--task-data: no folder nowhere"),
        ("--tasks arc_chalenge,hellaswag", "unknown task 'arc_chalenge'; nearest: arc_challenge"),
        ("--tasks truthfulqa_mc3", "unknown task 'truthfulqa_mc3'; nearest: truthfulqa_mc"),
    ],
)
def test_a_task_that_cannot_be_asked_is_one_line(words, said, tmp_path):
    with pytest.raises(UserError, match=said) as raised:
        evaluated("--model", "builtin:tiny", *words.split(), out=tmp_path / "out")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("strange", [math.nan, -math.inf])
def test_a_likelihood_that_is_no_number_is_refused(strange):
    check_finite([-1.0, -900.0], "tuned")
    with pytest.raises(UserError, match=r"the tuned model gives .* as the log-likelihood of 1 of 2 continuations"):
        check_finite([-1.0, strange], "tuned")
