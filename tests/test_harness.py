"""lm-evaluation-harness gets from jaxft what it gets from its own transformers backend, on the same checkpoint."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import llama, load, save, tokens
from evaluated import TINY, adapted, of_harness, written

from jaxft.config import Mesh
from jaxft.errors import UserError
from jaxft.evals.score import Request, Scorer
from jaxft.parallel.mesh import make_mesh
from jaxft.tiny import problems

lm_eval = pytest.importorskip("lm_eval")

TINY = str(TINY)
pytestmark = of_harness


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """GSM8K's own protocol with two examples, a multiple choice by text and by letter, and perplexity, of local rows."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = tmp_path_factory.mktemp("tasks")
    drawn = problems.rows("test", 24)
    solved = [{"question": row["question"], "answer": row["answer"]} for row in drawn]
    files = {"train": written(folder / "train.jsonl", solved[:12]), "test": written(folder / "test.jsonl", solved[12:])}
    rows = [
        {"text": row["question"], "choices": ["four apples", "ten", "It is seven pens and more.", "no"], "gold": i % 4}
        for i, row in enumerate(solved[:10])
    ]
    choices = {"test": written(folder / "choices.jsonl", rows)}

    def task(name, data, **settings):
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data}}
        return {"task": name, "test_split": "test", **data, **settings}

    gsm8k = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml", resolve_func=True)
    kept = {"tag", "dataset_path", "dataset_name", "dataset_kwargs", "task", "num_fewshot"}
    gsm8k = {name: value for name, value in gsm8k.items() if name not in kept}
    chosen = {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "gold"}
    metrics = {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    return TaskManager(include_defaults=False), [
        task("solved", files, **gsm8k | {"num_fewshot": 2}),
        task("texts", choices, doc_to_choice="choices", **chosen, **metrics),
        task("letters", choices, doc_to_choice=["A", "B", "C", "D"], **chosen, **metrics),
        task("told", choices, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
             metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]),
    ]  # fmt: skip


def measured(model, tasks, **options):
    manager, chosen = tasks
    return lm_eval.simple_evaluate(
        model=model, tasks=chosen, task_manager=manager, log_samples=True, bootstrap_iters=0, **options
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return adapted(tmp_path_factory.mktemp("adapter"), "q_proj", "down_proj")


@pytest.mark.slow
def test_every_kind_of_task_gives_the_results_of_the_transformers_backend(tasks, adapter):
    from lm_eval.models.huggingface import HFLM

    from jaxft.evals.harness import JaxftLM

    theirs = measured(HFLM(pretrained=TINY, peft=adapter, dtype="float32", batch_size=4, device="cpu"), tasks)
    ours = measured(JaxftLM(pretrained=TINY, adapter=adapter, dtype="float32", batch_size=8), tasks)
    for task, results in theirs["results"].items():
        for name, value in results.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (task, name)
    assert theirs["results"]["texts"]["acc,none"] not in (0.0, 1.0)
    for task, samples in theirs["samples"].items():
        for one, other in zip(ours["samples"][task], samples, strict=True):
            assert one["prompt_hash"] == other["prompt_hash"]
            if task == "solved":
                assert one["resps"] == other["resps"]
            else:
                found, wanted = (np.array(json.loads(json.dumps(s["resps"])), float).ravel() for s in (one, other))
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert ours["config"]["adapter_sha256"]


def test_the_model_is_known_to_the_harness_by_name(tasks):
    import jaxft.evals.harness  # noqa: F401

    manager, chosen = tasks
    arguments = {"model_args": f"pretrained={TINY},dtype=float32", "limit": 2, "bootstrap_iters": 0}
    found = lm_eval.simple_evaluate(model="jaxft", tasks=chosen[1:2], task_manager=manager, **arguments)
    assert found["results"]["texts"]["sample_len"] == 2


@pytest.mark.exhaustive  # test_generation holds the same of the Generator
def test_sampled_answers_do_not_depend_on_the_batch_and_repeats_differ():
    from lm_eval.api.instance import Instance

    from jaxft.evals.harness import JaxftLM

    sampled = {"do_sample": True, "temperature": 1.0, "until": ["\n\n"], "max_gen_toks": 12}
    asked = [
        Instance("generate_until", {}, (f"Tom has {i} apples.", sampled), 0, ("solved", i, 3))
        for i in range(3)
        for _ in range(1)
    ]
    requests = [request for request in asked for _ in range(3)]
    answers = [JaxftLM(TINY, dtype="float32", batch_size=size).generate_until(requests) for size in (1, 16)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 6
    greedy = Instance("generate_until", {}, ("Tom has", {"until": [], "max_gen_toks": 4}), 0, ("solved", 0, 2))
    model = JaxftLM(TINY, dtype="float32")
    assert len(set(model.generate_until([greedy, greedy]))) == 1
    strange = Instance("generate_until", {}, ("Tom", {"num_beams": 4}), 0, ("solved", 0, 1))
    with pytest.raises(UserError, match="num_beams: not among do_sample, temperature, top_k, top_p"):
        model.generate_until([strange])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(llama(vocab_size=96), tmp_path_factory.mktemp("llama"))


REQUESTS = [
    *[Request(tokens(1, 9, 1, vocab=96)[0].tolist(), [choice]) for choice in (3, 4, 5, 6)],
    *[Request(*(tokens(1, n, n, vocab=96)[0].tolist() for n in (size, 5 * size))) for size in (1, 17, 30)],
    Request(tokens(1, 300, 5, vocab=96)[0].tolist(), [7, 8]),  # longer than the model's 256 positions
]  # fmt: skip


@pytest.fixture(scope="module")
def model(folder):
    return load(folder).decoder()


def scored(model, request):
    """As `lm_eval.models.huggingface` does it: log-softmax of all logits of the last 256 tokens."""
    whole = [*request.context, *request.continuation][-257:]
    logits = np.asarray(jax.jit(lambda m, t: m(t))(model, np.array([whole[:-1]])))[0].astype(np.float64)
    logits = logits[-len(request.continuation) :]
    log = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    targets = np.array(request.continuation)
    return log[np.arange(len(targets)), targets].sum(), bool((log.argmax(1) == targets).all())


def test_a_continuation_scores_the_sum_of_its_tokens_whatever_the_batch(model):
    wanted = [scored(model, request) for request in REQUESTS]
    for size in (1, 16):
        scorer = Scorer(model, size)
        for one, (log_probability, greedy) in zip(scorer(REQUESTS), wanted, strict=True):
            assert one.log_probability == pytest.approx(log_probability, rel=1e-5)
            assert one.greedy == greedy
        best = int(np.argmax(np.asarray(model(np.array([REQUESTS[0].context])))[0, -1]))
        first = [Request(REQUESTS[0].context, [token]) for token in (best, (best + 1) % 96)]
        assert [one.greedy for one in scorer(first)] == [True, False]


def test_eight_devices_score_what_one_scores(folder, model):
    spread = Scorer(load(folder, mesh=make_mesh(Mesh(data=2, fsdp=2, tensor=2))).decoder(), 4)(REQUESTS)
    one = Scorer(model, 4)(REQUESTS)
    assert [s.log_probability for s in spread] == pytest.approx([s.log_probability for s in one], rel=1e-5)
    assert [s.greedy for s in spread] == [s.greedy for s in one]


@pytest.mark.parametrize(
    ("request_", "shown"),
    [
        (Request([], [1]), "request 0: context and continuation need a token each"),
        (Request([1], [96]), "request 0: token 96 is not in the model's vocabulary, which ends at 95"),
        (Request([1], [5] * 257), "request 0: a continuation of 257 tokens; the model reads at most 256"),
    ],
)
def test_what_cannot_be_scored_is_refused(request_, shown, model):
    with pytest.raises(UserError, match=shown):
        Scorer(model)([request_])
