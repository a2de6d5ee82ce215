"""Evaluations: example by example what transformers computes, the same however rows are batched, and kept over a resume."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from checkpoints import with_random_b
from test_chat import CHATML, build, exchange

import jaxft.tiny
from jaxft import config, train
from jaxft.config import Config, Data, Eval, Lora, Model, Optim
from jaxft.data import chat
from jaxft.data.chat import Example
from jaxft.data.loader import Loader, sample
from jaxft.data.rows import Row, Turn
from jaxft.errors import UserError
from jaxft.learn.evaluator import Evaluator, Found, Rows
from jaxft.learn.examples import Examples, Text
from jaxft.learn.step import make_eval_step
from jaxft.weights import model

BASE = Path(jaxft.tiny.__file__).parent / "base"
SAME = 1e-6  # of a row's loss: fp32 sums in another order


def evaluation(batch_size=8, packing=True, devices=1, mesh=None, **eval):
    """The job, its evaluator and what it finds with an adapter that does something."""
    data = Data(name="generated:word_problems", limit=120, max_length=200, packing=packing, cache=None)
    settings = Config(
        model=Model("builtin:tiny", dtype="float32"), lora=Lora(rank=4), data=data, mesh=mesh or config.Mesh(),
        optim=Optim(batch_size=batch_size), eval=Eval(**eval),
    )  # fmt: skip
    first = jax.devices()[:devices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        job = train.prepare(settings)
    loaded = with_random_b(model.materialise(job.source, job.mesh))
    sets = {name: part.loader for name, part in job.data.measured.items()}
    evaluator = Evaluator(make_eval_step(loaded, job.mesh), loaded.frozen, job.mesh, sets)
    return job, evaluator, evaluator(loaded.trainable), loaded


@pytest.fixture(scope="module")
def whole():
    return evaluation()


def test_every_set_is_there_and_the_probe_is_a_sample_of_the_training_rows_as_large(whole):
    job, _, found, _ = whole
    assert {name: len(of.nll) for name, of in found.items()} == {"validation": 12, "probe": 12}
    trained = {tuple(example.tokens) for example in job.data.train.examples}
    probe = job.data.measured["probe"]
    assert all(tuple(example.tokens) in trained for example in probe.loader.examples)
    assert [row.origin for row in probe.rows] == [example.origin for example in probe.loader.examples]


def test_figures_are_quotients_of_sums_over_all_rows(whole):
    _, evaluator, found, _ = whole
    figures, rows, of = evaluator.figures(found), evaluator.rows["validation"], found["validation"]
    assert figures["eval_loss"] == pytest.approx(of.nll.sum() / rows.tokens.sum(), rel=1e-12)
    assert figures["eval_perplexity"] == pytest.approx(math.exp(figures["eval_loss"]))
    assert figures["eval_mean_token_accuracy"] == of.correct.sum() / rows.tokens.sum()
    assert figures["eval_bits_per_byte"] == pytest.approx(of.nll.sum() / rows.bytes.sum() / math.log(2))
    probe = evaluator.rows["probe"], found["probe"]
    assert figures["probe_loss"] == pytest.approx(probe[1].nll.sum() / probe[0].tokens.sum(), rel=1e-12)
    for kind, name in (("no annotations", "without_annotations"), ("final answer", "final_answer")):
        assert figures[f"eval_token_accuracy_{name}"] == of.kinds[kind].sum() / rows.kinds[kind].sum()
        assert 0 < rows.kinds[kind].sum() < rows.tokens.sum()


@pytest.fixture(scope="module")
def oracle(whole):
    """Each validation row's loss by transformers, one row at a time, with our adapter merged."""
    job, _, _, loaded = whole
    plain = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    weights = dict(plain.named_parameters())
    arrays = {**loaded.trainable, **loaded.frozen}
    with torch.no_grad():
        for row in loaded.rows:
            if row.adapter and row.names[0].endswith("lora_A.weight"):
                b = np.asarray(arrays[row.path.removesuffix("a") + "b"], np.float64)
                for i, name in enumerate(row.names):
                    path = name.removesuffix(".lora_A.weight")
                    scale = job.source.plan.adapters[path].scale
                    moved = scale * np.asarray(arrays[row.path], np.float64)[i] @ b[i]
                    weights[f"{path}.weight"] += torch.from_numpy(moved.T).float()
    return plain.eval()


@pytest.mark.parametrize("name", ["validation", "probe"])
def test_the_loss_of_each_row_is_that_of_transformers(whole, oracle, name):
    job, evaluator, found, _ = whole
    for i, example in enumerate(job.data.measured[name].loader.examples):
        ids = torch.from_numpy(example.tokens.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(example.loss_mask)[None], ids, -100)
        with torch.no_grad():
            said = oracle(ids, labels=labels)
        tokens = int(example.loss_mask.sum())
        assert evaluator.rows[name].tokens[i] == tokens
        assert found[name].nll[i] / tokens == pytest.approx(float(said.loss), rel=5e-5)
        right = said.logits.argmax(-1)[0, :-1] == ids[0, 1:]
        assert found[name].correct[i] == int(right[torch.from_numpy(example.loss_mask[1:])].sum())


OTHERWISE = {
    "three at a time, apart": dict(batch_size=3, packing=False),
    "eight devices": dict(devices=8, mesh=config.Mesh(data=2, fsdp=4)),
    "one at a time": pytest.param(dict(batch_size=1), marks=pytest.mark.slow),
    "apart on eight devices": pytest.param(
        dict(batch_size=16, packing=False, devices=8, mesh=config.Mesh(data=2, fsdp=2, tensor=2)),
        marks=pytest.mark.slow,
    ),
}


@pytest.mark.parametrize("otherwise", OTHERWISE.values(), ids=OTHERWISE)
def test_results_are_the_same_whatever_the_batch_the_packing_and_the_mesh(whole, otherwise):
    _, evaluator, found, _ = whole
    _, other, others, _ = evaluation(**otherwise)
    assert other.figures(others) == pytest.approx(evaluator.figures(found), rel=SAME)
    for name, of in found.items():
        assert others[name].nll == pytest.approx(of.nll, rel=SAME)
        assert np.array_equal(others[name].correct, of.correct)
        assert all(np.array_equal(others[name].kinds[kind], of.kinds[kind]) for kind in of.kinds)


@pytest.mark.parametrize("packing", [True, False])
def test_a_probe_asks_for_no_shapes_that_validation_has_not(packing):
    data = Data(name="generated:word_problems", limit=400, max_length=256, packing=packing, cache=None)
    job = train.prepare(Config(model=Model("builtin:tiny"), data=data, optim=Optim(batch_size=8), eval=Eval()))
    shapes = {
        name: {batch.tokens.shape for batch in part.loader.evaluation_batches()}
        for name, part in job.data.measured.items()
    }
    longest = job.data.validation.lengths.max() < job.data.measured["probe"].loader.lengths.max()
    assert len(shapes["probe"] - shapes["validation"]) <= int(longest)


def test_a_probe_is_drawn_by_the_seed_and_never_larger_than_what_is_held_out():
    assert sample(5, 100, 0) == sample(5, 100, 0) != sample(5, 100, 1)
    assert sample(0, 100, 0) == [] and sample(3, 3, 7) == [0, 1, 2]
    assert set(sample(5, 100, 0)) < set(sample(50, 100, 0))
    data = Data(name="generated:word_problems", limit=40, max_length=256, cache=None)
    settings = Config(model=Model("builtin:tiny"), data=data, optim=Optim(batch_size=8))
    sizes = {0: None, 3: 3, 256: 4}
    for asked, size in sizes.items():
        job = train.prepare(dataclasses.replace(settings, eval=Eval(probe_rows=asked)))
        assert len(job.data.measured["probe"].rows) == size if size else "probe" not in job.data.measured
    alone = dataclasses.replace(settings, data=dataclasses.replace(data, validation_fraction=0.0))
    assert train.prepare(alone).data.measured == {}


@pytest.mark.parametrize(
    ("value", "said"), [("-1", "outside 0 to inf"), ("some", "eval.probe.rows"), ("1.5", "eval.probe.rows")]
)
def test_a_wrong_number_of_probe_rows_is_refused(value, said):
    with pytest.raises(UserError, match=said):
        config.load("tiny_cpu.py", ["--eval.probe_rows", value])


ANSWER = "She has 48/2=<<48/2=24>>24 apples – 24 “good” ones.\n#### 24"


def marked(row, template, **fit):
    tokenizer = build(CHATML)
    examples = chat.marked(list(chat.encode_rows([row], tokenizer, template)), [row], tokenizer, template)
    (example,), _ = chat.fit(examples, **({"max_length": 1000} | fit))
    return example, tokenizer


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_marks_count_the_bytes_of_the_answer_and_tell_annotations_and_the_final_number(template):
    example, tokenizer = marked(exchange("Wie viele Äpfel? <<1+1=2>> #### 7", ANSWER), template)
    trained, marks = example.loss_mask, example.marks
    extra = {"plain": " ", "chat": "\n"}[template]  # before the answer, or after its end of turn
    assert marks.bytes[trained].sum() == len((ANSWER + extra).encode())
    final = trained & marks.kinds["final answer"]
    assert tokenizer.decode(example.tokens[final]).strip() == "24"
    annotated = trained & ~marks.kinds["no annotations"]
    assert tokenizer.decode(example.tokens[annotated]).strip("= ") == "<<48/2=24>>".strip("= ")
    assert not marks.cut and all(len(kind) == len(example.tokens) for kind in marks.kinds.values())


def test_a_row_that_is_cut_keeps_the_marks_of_what_is_left():
    row = exchange("How many?", ANSWER)
    whole, tokenizer = marked(row, "plain")
    short, _ = marked(row, "plain", max_length=len(whole.tokens) - 9)
    assert short.marks.cut and len(short.marks.bytes) == len(short.tokens)
    left = tokenizer.decode(short.tokens[short.loss_mask])
    assert short.marks.bytes[short.loss_mask].sum() == len(left.encode())
    assert not short.marks.kinds["final answer"].any() and whole.marks.kinds["final answer"].any()


def test_every_answer_of_a_conversation_has_its_own_final_number():
    turns = (Turn("user", "1+1?"), Turn("assistant", "#### 2"), Turn("user", "3+4?"), Turn("assistant", "#### 7"))
    example, tokenizer = marked(Row(turns, "f:1"), "plain")
    final = example.tokens[example.marks.kinds["final answer"]]
    assert [tokenizer.decode([token]).strip() for token in final] == ["2", "7"]


def test_rows_without_annotations_or_final_numbers_have_no_such_figures():
    tokenizer = build(CHATML)
    rows = [exchange(f"What is {i}?", "A number.") for i in range(3)]
    examples = chat.marked(list(chat.encode_rows(rows, tokenizer, "plain")), rows, tokenizer, "plain")
    counted = Rows(Loader(examples, batch_size=2, length=64, shuffle=False))
    assert counted.kinds == {} and counted.bytes.tolist() == [len(" A number.")] * 3
    bare = Rows(Loader([dataclasses.replace(e, marks=None) for e in examples], batch_size=2, length=64))
    assert bare.kinds == {} and bare.bytes.tolist() == [0] * 3 and bare.tokens.tolist() == counted.tokens.tolist()


def some_rows(count=3):
    examples = [Example(np.arange(5, dtype=np.int32), np.arange(5) >= 2, f"f:{i}") for i in range(count)]
    return {"validation": Rows(Loader(examples, batch_size=2, length=8))}


def some_found(value, count=3):
    return {"validation": Found(np.full(count, value), np.arange(count), {})}


TEXTS = {"validation": [Text(f"f:{i}", "q" * 3000, "ä" * 3000) for i in range(3)]}


def test_examples_of_the_base_the_best_and_the_last_step_become_lines(tmp_path):
    kept, rows = Examples(tmp_path), some_rows()
    best = {0: 0, 20: 20, 40: 20, 60: 20, 80: 20}
    for step, at in best.items():
        kept.keep(step, some_found(0.1 * step), at)
    assert {f.name for f in (tmp_path / "examples").iterdir()} == {f"step_{n}.json" for n in (0, 20, 60, 80)}
    assert kept.write(rows, TEXTS, 20, 80)
    lines = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "split": "validation", "row": "f:1", "question": "q" * 2000, "answer": "ä" * 2000, "tokens": 3, "bytes": 0,
        "cut": False, "nll": {"base": 0.0, "best": 2.0, "end": 8.0}, "correct": {"base": 1, "best": 1, "end": 1},
        "kinds": {},
    }  # fmt: skip
    assert len(lines) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"validation": {"nll": [1, NaN, 2], "correct": [1, 1, 1]}}',
                                    '{"validation": {"nll": [1], "correct": [1], "kinds": {}}}', "[" * 100_000])  # fmt: skip
def test_kept_examples_that_are_damaged_or_gone_are_left_out(tmp_path, damage):
    kept = Examples(tmp_path)
    for step in (0, 20):
        kept.keep(step, some_found(1.0), 20)
    file = tmp_path / "examples" / "step_0.json"
    file.write_text(damage) if damage else file.unlink()
    assert not kept.write(some_rows(), TEXTS, 20, 20) and not (tmp_path / "examples.jsonl").exists()


def answers(*texts):
    return [
        {"doc": i, "question": "?", "reference": "#### 1", "text": t, "right": t == "1", "cut": False, "found": t}
        for i, t in enumerate(texts)
    ]


def test_answers_of_both_sides_to_the_same_problems_become_lines(tmp_path):
    kept = Examples(tmp_path)
    kept.keep_answers("final_answer", "base", answers("2", "1"))
    kept.keep_answers("final_answer", "tuned", answers("1"))  # other problems, as with another eval.limit
    assert not (tmp_path / "tasks_final_answer.jsonl").exists()
    kept.keep_answers("final_answer", "tuned", answers("1", "1"))
    lines = [json.loads(line) for line in (tmp_path / "tasks_final_answer.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "doc": 0, "question": "?", "reference": "#### 1",
        "base": {"text": "2", "right": False, "cut": False, "found": "2"},
        "tuned": {"text": "1", "right": True, "cut": False, "found": "1"},
    }  # fmt: skip
    Examples(tmp_path / "b").keep_answers("final_answer", "tuned", answers("1"))
    Examples(tmp_path / "c", writes=False).keep(0, some_found(1.0), 0)
    assert not any((tmp_path / name).exists() for name in "bc")
