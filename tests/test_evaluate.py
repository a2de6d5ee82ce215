"""`python -m jaxft.evaluate`: base against tuned on the same prompts, the harness's figures, files, and one-line errors."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from checkpoints import peft_model, reload, save, tiny
from evaluated import TINY, adapted, evaluated, of_harness, with_tokenizer, written

import jaxft.evaluate
from jaxft import config
from jaxft.data.rows import Row, Turn
from jaxft.errors import UserError
from jaxft.evals import material, native, results, table
from jaxft.evals import measurement as measuring
from jaxft.evals.measurement import Answer, Document, Measurement, Side
from jaxft.evals.native import TASKS, Settings
from jaxft.evals.subject import Subject, open_subject
from jaxft.models import decoder
from jaxft.tiny import problems


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twelve rows to ask, and eight others to draw shots from."""
    folder, rows = tmp_path_factory.mktemp("rows"), problems.rows("test", 20)
    return written(folder / "test.jsonl", rows[:12]), written(folder / "train.jsonl", rows[12:])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return adapted(tmp_path_factory.mktemp("adapter"), "q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, files, adapter):
    """The verb, once, on everything that is native and small: its files, and what it printed."""
    import contextlib
    import io

    test, train = files
    out, printed = tmp_path_factory.mktemp("out") / "new", io.StringIO()
    with contextlib.redirect_stdout(printed):
        found, lines = evaluated(
            "--model", "builtin:tiny", "--adapter", adapter, "--dtype", "float32", "--test-files", test, "--shot-files", train,
            "--train-files", train, test, "--tasks", "final_answer,final_answer_self_consistency",
            "final_answer_refined", "--limit", 6, "--samples", 3, "--max-new-tokens", 24,
            "--temperature", 1.0, out=out,
        )  # fmt: skip
    return found, lines, printed.getvalue()


def test_both_sides_answer_the_same_prompts_and_every_figure_follows_from_the_samples(measured):
    found, lines, _ = measured
    assert found["sides"] == ["base", "tuned"]
    assert list(found["tasks"]) == ["final_answer", "final_answer_self_consistency", "final_answer_refined"]
    for task, told in found["tasks"].items():
        assert [line["doc_id"] for line in lines[task]] == list(range(6))
        for side in ("base", "tuned"):
            for metric, given in told["sides"][side]["metrics"].items():
                values = [line[side]["values"][metric] for line in lines[task]]
                assert given["value"] == pytest.approx(np.mean(values))
                assert given["interval"][0] <= given["value"] <= given["interval"][1]
                written = found["results" if side == "tuned" else "base_results"][task]
                assert written[metric] == pytest.approx(np.mean(values))
            cut = [float(line[side]["truncated"]) for line in lines[task]]
            assert told["sides"][side]["truncated"] == pytest.approx(np.mean(cut))
            assert told["sides"][side]["tokens_per_second"] > 0
        compared = told["comparisons"][told["primary"]]
        assert compared["difference"] == pytest.approx(compared["second"] - compared["first"])
    outputs = [[line[side]["output"] for line in lines["final_answer"]] for side in ("base", "tuned")]
    assert outputs[0] != outputs[1]
    told = found["tasks"]["final_answer_self_consistency"]["sides"]["tuned"]
    votes = [vote for line in lines["final_answer_self_consistency"] for vote in line["tuned"]["extracted"]["maj@3"]]
    assert told["invalid"]["maj@3"] == pytest.approx(votes.count("[invalid]") / 18)
    for line in lines["final_answer"]:
        right = line["base"]["values"]["exact_match,strict-match"] == 1
        assert (line["base"]["mistake"] is None) == right
        assert line["category"]["steps"] in ("1–2", "3", "4", "5", "6+")
    sampled = lines["final_answer_self_consistency"][0]["tuned"]["output"]
    assert len(sampled) == 3 and len(set(sampled)) > 1


def test_the_files_say_what_was_measured_and_how(measured, adapter, files):
    found, lines, printed = measured
    assert (
        found["model"]["adapter_sha256"]
        == hashlib.sha256((Path(adapter) / "adapter_model.safetensors").read_bytes()).hexdigest()
    )
    told = found["tasks"]["final_answer_self_consistency"]
    assert (told["protocol"]["shots"], told["protocol"]["samples"]) == ("0", 3)
    assert (
        told["protocol"]["decoding"] == "temperature 1, top_p 1, no top_k" and told["protocol"]["max_new_tokens"] == 24
    )
    assert found["seeds"]["sampling"] == 1234 and found["software"]["jax"] == jax.__version__
    assert found["rows"]["final_answer"] == {"rows": files[0], "asked": 6, "pool": 8}
    kinds = {kind["kind"]: kind for kind in told["contamination"]["kinds"]}
    assert kinds["duplicate"]["shared"] == 6  # the files asked were named as trained on
    refined = found["tasks"]["final_answer_refined"]["refinement"]["tuned"]["exact_match,strict-match"]
    line = lines["final_answer_refined"][0]
    assert line["tuned"]["first_pass"]["output"] == lines["final_answer"][0]["tuned"]["output"]
    assert refined["documents"] == 6
    assert "\x1b" not in printed and "results: " in printed
    for verdict in found["verdicts"]:
        assert verdict in printed
    assert sum(row["task"] == "final_answer" for row in found["panel"]) == 1


def test_the_base_side_of_an_adapter_is_the_base_model(measured, files, tmp_path):
    _, lines, _ = measured
    alone, said = evaluated(
        "--model", "builtin:tiny", "--dtype", "float32", "--test-files", files[0], "--tasks", "final_answer", "--limit", 6,
        "--max-new-tokens", 24, out=tmp_path / "out",
    )  # fmt: skip
    assert alone["sides"] == ["base"] and "base_results" not in alone and alone["panel"] == []
    assert [line["base"]["output"] for line in said["final_answer"]] == [
        line["base"]["output"] for line in lines["final_answer"]
    ]
    assert [line["prompt_sha256"] for line in said["final_answer"]] == [
        line["prompt_sha256"] for line in lines["final_answer"]
    ]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"use_dora": True}, marks=pytest.mark.slow),
        {"bias": "lora_only", "modules_to_save": ["lm_head"]},
    ],
)
def test_switching_any_adapter_off_gives_the_base_and_on_the_tuned_model(settings, tmp_path):
    model = tiny("llama", vocab_size=96, attention_bias=True)
    base, adapter = save(model, tmp_path / "base"), tmp_path / "adapter"
    peft_model(reload(base), target_modules=["q_proj", "gate_proj"], **settings).save_pretrained(adapter)
    with_tokenizer(base)
    both = open_subject(str(base), str(adapter), dtype="float32", sides=("base", "tuned"))
    plain = open_subject(str(base), dtype="float32")
    tuned = open_subject(str(base), str(adapter), dtype="float32")
    ids = np.array([[5, 9, 11, 40]])

    def logits(subject: Subject, side: str) -> np.ndarray:
        graphdef, _, frozen = decoder.split(subject.model)
        return np.asarray(decoder.join(graphdef, subject.sides[side], frozen)(ids))

    np.testing.assert_allclose(logits(both, "base"), logits(plain, "base"), atol=1e-5)
    np.testing.assert_allclose(logits(both, "tuned"), logits(tuned, "tuned"), atol=1e-6)
    assert np.abs(logits(both, "base") - logits(both, "tuned")).max() > 1e-2


def harness_tasks(files, names, folder):
    """The harness's own GSM8K tasks on local files, as files for --include-path; names are those given with _local."""
    import lm_eval

    theirs = Path(lm_eval.__file__).parent / "tasks" / "gsm8k"
    for name, file in names.items():
        (folder / f"{name}.yaml").write_text(
            f"include: {theirs / file}\ntask: {name}_local\ndataset_path: json\ndataset_name: null\ntag: null\n"
            f"dataset_kwargs: {{data_files: {{test: {files[0]}, train: {files[1]}}}}}\n"
        )
    return folder


THEIRS = {"gsm8k": "gsm8k.yaml", "gsm8k_cot": "gsm8k-cot.yaml", "gsm8k_cot_zeroshot": "gsm8k-cot-zeroshot.yaml"}


@pytest.fixture(scope="module")
def task_files(tmp_path_factory, files):
    """One folder for all tests: reading thousands of task files takes seconds, and is done once per folder."""
    pytest.importorskip("lm_eval")
    return harness_tasks(files, THEIRS, tmp_path_factory.mktemp("tasks"))


def side_by_side(names, files, task_files, out, *more):
    """Tasks as jaxft asks them and as the harness does, in one evaluation of both, and what is equal in them."""
    found, lines = evaluated(
        "--model", "builtin:tiny", "--dtype", "float32", "--test-files", files[0], "--shot-files", files[1],
        "--include-path", task_files, "--tasks", ",".join([*names, *(f"{name}_local" for name in names)]), *more,
        out=out,
    )  # fmt: skip
    for task in names:
        ours, theirs = found["tasks"][task], found["tasks"][f"{task}_local"]
        assert (ours["backend"], theirs["backend"]) == ("native", "lm-eval")
        for one, other in zip(lines[task], lines[f"{task}_local"], strict=True):
            assert one["prompt_sha256"] == other["prompt_sha256"]
            for side in found["sides"]:
                for key in ("output", "extracted", "values", "truncated"):
                    assert one[side][key] == other[side][key], (task, side, key)
        for metric, value in found["results"][f"{task}_local"].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert found["results"][task][metric] == pytest.approx(value)
        assert ours["comparisons"] == theirs["comparisons"]
    return found


class TestBesideTheHarness:
    pytestmark = of_harness

    def test_native_prompts_outputs_and_scores_are_the_harnesss(self, files, task_files, tmp_path):
        found = side_by_side(["gsm8k"], files, task_files, tmp_path / "out", "--limit", 3, "--num-fewshot", 2)
        assert found["n-shot"]["gsm8k_local"] == 2

    @pytest.mark.slow
    def test_and_so_they_are_for_both_sides_and_chains_of_thought(self, files, task_files, adapter, tmp_path):
        names = ["gsm8k_cot", "gsm8k_cot_zeroshot"]
        found = side_by_side(names, files, task_files, tmp_path / "out", "--limit", 5, "--adapter", adapter)
        assert found["sides"] == ["base", "tuned"]
        assert [found["n-shot"][f"{name}_local"] for name in names] == [8, 0]

    @pytest.mark.slow
    def test_native_chat_prompts_are_the_harnesss(self, files, task_files):
        from jaxft.evals import harnessed

        subject = open_subject("builtin:tiny", dtype="float32")
        subject.tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        rows = [read_row(row) for row in map(json.loads, Path(files[0]).read_text().splitlines())][:3]
        pool = [read_row(row) for row in map(json.loads, Path(files[1]).read_text().splitlines())]
        ours = native.measure(TASKS["gsm8k"], subject, rows, pool, Settings("plain", shots=2, chat=True))
        tasks = harnessed.loaded(["gsm8k_local"], str(task_files), [])
        (theirs,), _ = harnessed.measure(tasks, subject, limit=3, shots=2, chat=True)
        assert [d.prompt_sha256 for d in ours.documents] == [d.prompt_sha256 for d in theirs.documents]
        assert [a.output for a in ours.sides["base"].answers] == [a.output for a in theirs.sides["base"].answers]

    @pytest.mark.slow
    def test_a_group_counts_once_and_its_documents_are_drawn_by_task(self, tmp_path, adapter):
        pytest.importorskip("lm_eval")
        for name in ("one", "two"):
            rows = [
                {"text": f"{name} {i} apples and", "choices": ["four", "ten pens"], "gold": i % 2} for i in range(4)
            ]
            data = written(tmp_path / f"{name}.jsonl", rows)
            (tmp_path / f"{name}.yaml").write_text(
                f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
                "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: choices\ndoc_to_target: gold\n"
                "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
            )
        (tmp_path / "both.yaml").write_text(
            "group: local_both\ntask: [local_one, local_two]\n"
            "aggregate_metric_list: [{metric: acc, weight_by_size: true}, {metric: acc_norm, weight_by_size: true}]\n"
        )
        found, lines = evaluated(
            "--model", "builtin:tiny", "--adapter", adapter, "--include-path", tmp_path, "--tasks", "local_both",
            out=tmp_path / "out",
        )  # fmt: skip
        assert [row["task"] for row in found["panel"]] == ["local_both"]
        whole = found["tasks"]["local_both"]
        assert (whole["documents"], whole["primary"], whole["chance"]) == (8, "acc_norm,none", 0.5)
        assert found["tasks"]["local_one"]["member_of"] == "local_both"
        for metric in ("acc,none", "acc_norm,none"):
            value = whole["sides"]["tuned"]["metrics"][metric]["value"]
            assert found["results"]["local_both"][metric] == pytest.approx(value)
        assert all(len(line["tuned"]["output"]) == 2 for line in lines["local_two"])


def test_the_harness_finds_jaxft_by_its_entry_point():
    import importlib
    import tomllib

    pytest.importorskip("lm_eval")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["jaxft"].partition(":")
    from lm_eval.api.model import LM

    assert issubclass(getattr(importlib.import_module(module), name), LM)


def test_half_a_surrogate_pair_is_hashed_and_written_as_its_escape(tmp_path):
    measurement = made_up([0.0], [1.0])
    (document,) = measurement.documents
    broken = replace(document, question="Tom \ud83d", prompt_sha256=measuring.sha256("Tom \ud83d"))
    measurement = replace(measurement, documents=[broken])
    results.write(
        tmp_path / "out", results.content([measurement], ["Tom \ud83d"], {"model": "m"}, {}, {}), [measurement]
    )
    (line,) = (tmp_path / "out" / "samples_made_up.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["question"] == broken.question
    assert broken.prompt_sha256 == hashlib.sha256(b"Tom \\ud83d").hexdigest()


def test_what_is_opened_is_what_the_run_had_unless_said_otherwise():
    own = config.Model(
        "base",
        tokenizer="t",
        dtype="bfloat16",
        quantize="nf4",
        quantize_double=True,
        quantize_tables=True,
        quantize_skip=("q_proj",),
    )
    run = material.Run(Path("run"), config.Data(), 0, 8, own)
    options = jaxft.evaluate.Options(("gsm8k",))
    same = jaxft.evaluate._opened(options, "base", "run/adapter", run)
    assert same == replace(own, adapter="run/adapter")
    other = jaxft.evaluate._opened(replace(options, quantize="none", dtype="float32"), "base", "run/adapter", run)
    assert (other.dtype, other.quantize, other.quantize_skip) == ("float32", "none", ())
    alone = jaxft.evaluate._opened(replace(options, quantize="int4", quantize_group=32), "m", None, None)
    assert alone == config.Model("m", quantize="int4", quantize_group=32)


def read_row(row):
    return Row((Turn("user", row["question"]), Turn("assistant", row["answer"])), "test:1")


def made_up(base, tuned, **changes):
    """A measurement of one metric with these values."""
    documents = [
        Document(i, "0", f"question {i}", "#### 1", {"steps": "3" if i % 2 else "1–2"}) for i in range(len(base))
    ]
    sides = {
        side: Side([Answer(f"{side} {i}", {"acc,none": v}) for i, v in enumerate(values)], 1.0, 0, {})
        for side, values in (("base", base), ("tuned", tuned))
    }
    return replace(Measurement("made_up", "native", {}, documents, sides, {"acc,none": True}), **changes)


def test_a_clear_gain_is_said_with_its_interval_and_a_category_that_fails_is_shown_with_real_examples():
    n = 120
    tuned = [0.0 if i % 2 and i % 10 else 1.0 for i in range(n)]
    measurement = made_up([0.0] * n, tuned, protocol={"cut_prompts": 7})
    found = results.content([measurement], ["question 5"], {"model": "m"}, {}, {})
    told = found["tasks"]["made_up"]
    (hard,) = [row for row in told["categories"] if row["flag"] == "hard"]
    assert (hard["name"], hard["documents"], len(hard["examples"])) == ("3", 60, 3)
    assert all(tuned[example["doc_id"]] == 0 for example in hard["examples"])
    assert told["comparisons"]["acc,none"]["wrong_to_right"] == sum(tuned)
    assert "tuned 50.00 against base 0.00 on 120 documents: +50.00 points" in found["verdicts"][0]
    assert found["verdicts"][0].endswith("better")
    assert told["contamination"]["kinds"][0]["shared"] == 1
    assert "7 of 120 prompts do not fit" in found["verdicts"][1]
    row = next(line for line in table.lines(found) if line.startswith("made_up"))
    assert "+50.00" in row and "120" in row


def test_a_model_that_gives_nan_is_refused():
    """Its best choice would be the first one everywhere, which TruthfulQA's mc1 counts as right."""
    with pytest.raises(UserError, match=r"made_up: document 1: the tuned model gives .*not finite"):
        measuring.check_pairs(made_up([1.0, 1.0], [1.0, float("nan")]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model builtin:tiny --tasks gsm9k --include-path {tasks}", r"unknown task 'gsm9k'; nearest: gsm8k, gsm8k_"),
        ("--tasks gsm8k", "--model: missing"),
        ("--model builtin:tiny --tasks ,", "--tasks: none given; native ones are final_answer, gsm8k"),
        ("--model builtin:tiny --tasks gsm8k", "gsm8k.*--test-files"),
        (
            "--model builtin:tiny --tasks arc_challenge --include-path {tasks}",
            "arc_challenge: its data cannot be loaded.*--include-path",
        ),
        ("--model builtin:tiny --tasks gsm8k --test-files {test}", "5 shots are drawn from 0 rows; give --shot-files"),
        ("--model builtin:tiny --tasks gsm8k --test-files nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("--model builtin:tiny --tasks final_answer --test-files {text}", "final_answer.*needs `#### NUMBER`.*1 of 1"),
        (
            "--model builtin:tiny --tasks final_answer --test-files {test} --out {full}",
            "exists already; give a new folder",
        ),
        ("--model builtin:tiny --tasks gsm8k --no-base", "--no-base: there is no adapter"),
        ("--model builtin:tiny --tasks gsm8k --limit 0", "--limit: expected at least 1, found 0"),
        (
            "--model {other} --adapter {adapter} --tasks final_answer --test-files {test}",
            r"layers.0.*expected A .* found .*; the adapter names '.*/base' as its base, the model is '.*other' \(llama, 1 l",
        ),
        (
            "--model builtin:tiny --tasks final_answer --train-rows 3",
            "--train-rows: which rows were trained on, a run folder",
        ),
        (
            "--model builtin:tiny --tasks final_answer --quantize-double",
            "--quantize-double: is for --quantize nf4 alone",
        ),
        ("--model builtin:tiny --adapter nowhere --tasks final_answer --test-files {test}", "no folder nowhere"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_mistake_is_one_line(words, said, files, adapter, task_files, tmp_path):
    text = written(tmp_path / "text.jsonl", [{"question": "Why?", "answer": "Because."}])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.json").write_text("{}")
    other = with_tokenizer(save(tiny("llama", vocab_size=96, num_hidden_layers=1), tmp_path / "other"))
    places = {
        "test": files[0],
        "text": text,
        "full": tmp_path / "full",
        "other": other,
        "adapter": adapter,
        "tasks": task_files,
    }
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=said):
        jaxft.evaluate.main([*words.format(**places).split(), *out])
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_a_runs_own_rows_settings_and_training_rows_are_found_in_its_folder(tmp_path):
    from jaxft.train import run

    changes = [
        "--run.dir",
        str(tmp_path / "run"),
        "--optim.max-steps",
        "2",
        "--eval.limit",
        "4",
        "--run.compilation-cache",
        "None",
    ]
    run(config.load("tiny_cpu.py", changes))
    found, lines = evaluated(
        "--adapter", tmp_path / "run", "--tasks", "final_answer", "--limit", 4, "--train-rows", 3, out=tmp_path / "out"
    )
    before = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]["final_answer"]
    for side in ("base", "tuned"):
        assert (
            found["tasks"]["final_answer"]["sides"][side]["metrics"]["exact_match,strict-match"]["value"]
            == (before[side]["exact_match"])
        )
        for line, example in zip(lines["final_answer"], before[side]["examples"]):
            assert line["question"] == example["prompt"] and line[side]["output"] == example["answer"]
    trained = {row["question"] for row in problems.rows("train", 4000)}
    asked = [line["question"] for line in lines["final_answer_train_rows"]]
    assert len(asked) == 3 and set(asked) <= trained
    assert found["tasks"]["final_answer_train_rows"]["seen"] and not found["tasks"]["final_answer"]["seen"]
    assert [row["task"] for row in found["panel"]] == ["final_answer"]
    assert any(line.startswith("final_answer_train_rows: 3 rows that training saw") for line in found["verdicts"])
    with pytest.raises(UserError, match="--train-rows: compares with final_answer on the run's own held-out rows"):
        evaluated("--adapter", tmp_path / "run", "--tasks", "gsm8k", "--train-rows", 3, out=tmp_path / "other")
    assert found["run"] == str(tmp_path / "run") and found["tasks"]["final_answer"]["contamination"]["trained"] > 1000


@pytest.mark.slow
def test_torch_sees_the_same_adapter(adapter):
    """What makes the base and the tuned side differ is what PEFT would add."""
    import peft

    subject = open_subject("builtin:tiny", adapter, dtype="float32", sides=("base", "tuned"))
    ids = np.array([[1, 5, 9, 11, 40]])
    graphdef, _, frozen = decoder.split(subject.model)
    oracle = peft.PeftModel.from_pretrained(reload(TINY), adapter).eval()
    with torch.no_grad():
        wanted = {"tuned": oracle(torch.from_numpy(ids)).logits.numpy()}
        with oracle.disable_adapter():
            wanted["base"] = oracle(torch.from_numpy(ids)).logits.numpy()
    for side, logits in wanted.items():
        found = np.asarray(decoder.join(graphdef, subject.sides[side], frozen)(ids))
        assert np.abs(found - logits).max() <= 1e-4 * logits.std() * 10
