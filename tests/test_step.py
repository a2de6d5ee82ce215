"""The training step: how a batch is cut, spread, recomputed and chunked changes nothing that it computes."""

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from checkpoints import llama, load, reload, save, tokens, with_random_b
from marked import slow

from jaxft import config
from jaxft.config import Lora, Optim
from jaxft.data.chat import Example
from jaxft.data.loader import Loader
from jaxft.errors import UserError
from jaxft.learn import loss, optim
from jaxft.learn.step import initial_state, make_eval_step, make_train_step
from jaxft.parallel.mesh import make_mesh
from jaxft.parallel.sharding import place
from jaxft.weights.peft import hub_tensors

ROUNDING = 1e-5  # of the largest element: sums in another order, in fp32, make about 1e-6 here
SETTINGS = Optim(learning_rate=1e-2, schedule="constant", weight_decay=0.01, clip=1.0)
LORA = Lora(rank=4, dropout=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = llama(vocab_size=96, attention_bias=True, mlp_bias=True)
    return save(model, tmp_path_factory.mktemp("llama"))


def batch(seed=0, rows=8, length=16):
    """Rows whose supervised tokens number 0, 1, 2, …, so that a mean of means would be another number."""
    ids = tokens(rows, length + 1, seed, vocab=96)
    weights = (np.arange(length)[None] >= length - np.arange(rows)[:, None]).astype(np.float32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    inputs = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights, "positions": positions}
    return inputs | {"segments": np.ones((rows, length), np.int32)}


class Run:
    """A model and its compiled step; each call trains it anew, from the same start."""

    def __init__(self, folder, lora=LORA, mesh=None, parts=1, optimizer=None, **options):
        self.mesh = mesh or make_mesh(devices=jax.devices()[:1])
        loaded = load(folder, lora, mesh=self.mesh, **options)
        self.loaded = loaded if lora is None else with_random_b(loaded)
        self.optimizer = optimizer or optim.optimizer(SETTINGS, 10, loaded.rows)
        self.step = make_train_step(self.loaded, self.optimizer, self.mesh, accumulation_steps=parts)

    def __call__(self, *batches, seed=0):
        """The state after these batches, and each step's metrics."""
        fresh = replace(self.loaded, trainable=jax.tree.map(jnp.copy, self.loaded.trainable))  # steps donate it
        state, metrics = initial_state(fresh, self.optimizer, self.mesh), []
        for one in batches:
            placed = place(self.mesh, one, ("batch", None))
            state, sums = self.step(state, self.loaded.frozen, placed, jax.random.key(seed))
            metrics.append({name: float(value) for name, value in sums.items()})
        return state, metrics

    def gradient(self, one):
        """Hub name -> gradient, and the metrics, where the optimizer keeps the gradient."""
        state, metrics = self(one)
        return by_name(self.loaded.rows, state.optimizer.trace), metrics


def keeps_gradient():
    return optax.trace(decay=0.0)


def by_name(rows, arrays):
    """Hub name -> array in the Hub's orientation, of the trainable tensors."""
    return {name: part for row in rows if row.trainable for name, part in hub_tensors(row, row.names, arrays[row.path])}


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        error = np.abs(found[name] - wanted[name]).max()
        assert error <= ROUNDING * np.abs(wanted[name]).max(), (name, error)


def assert_same_metrics(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=ROUNDING)


def assert_same_run(run, plain):
    """Three steps of `run` equal those of `plain`."""
    batches = [batch(seed) for seed in range(3)]
    (found, metrics), (wanted, plain_metrics) = run(*batches), plain(*batches)
    assert_same_metrics(metrics, plain_metrics)
    for path, value in wanted.trainable.items():
        # Adam divides a gradient by its own size, so rounding shows where a gradient is small; a step moves by 1e-2.
        assert np.abs(np.asarray(found.trainable[path]) - np.asarray(value)).max() <= 1e-3 * SETTINGS.learning_rate, (
            path
        )
        assert np.abs(np.asarray(value) - np.asarray(plain.loaded.trainable[path])).max() > SETTINGS.learning_rate
    return found


@pytest.fixture(scope="module")
def plain(folder):
    """One device, whole batches, AdamW."""
    return Run(folder)


@pytest.fixture(scope="module")
def lora_gradient(folder):
    return Run(folder, optimizer=keeps_gradient()).gradient(batch())


@pytest.fixture(scope="module")
def full_gradient(folder):
    return Run(folder, None, optimizer=keeps_gradient()).gradient(batch())


def test_packed_rows_give_the_loss_and_gradients_of_separate_rows(folder):
    lengths = (12, 5, 9, 17, 3, 8, 6, 11)
    ids = [tokens(1, n, seed, vocab=96)[0] for seed, n in enumerate(lengths)]
    examples = [Example(row, np.arange(len(row)) >= len(row) // 2, f"rows:{i}") for i, row in enumerate(ids)]
    run = Run(folder, optimizer=keeps_gradient())
    packed, apart = (
        dataclasses.asdict(Loader(examples, batch_size=size, length=length, packing=packing).batch_at(0))
        for size, length, packing in ((4, 20, True), (8, 16, False))
    )
    assert (packed["segments"].max(axis=1) > 1).any() and (apart["segments"].max(axis=1) == 1).all()
    (found, metrics), (wanted, plain_metrics) = run.gradient(packed), run.gradient(apart)
    assert_same_metrics(metrics, plain_metrics)
    assert_close(found, wanted)


def test_eight_micro_batches_of_one_row_equal_one_batch_of_eight(folder, plain):
    assert_same_run(Run(folder, parts=8), plain)


@pytest.mark.parametrize(
    "mesh", [slow({}, id="fsdp=8"), pytest.param({"data": 2, "tensor": 2}, id="data=2, fsdp=2, tensor=2")]
)
def test_one_device_equals_eight(mesh, folder, plain):
    spread = Run(folder, mesh=make_mesh(config.Mesh(**mesh)))
    state = assert_same_run(spread, plain)
    for row in spread.loaded.rows:  # nothing moved to another layout on the way
        if row.trainable:
            value = state.trainable[row.path]
            assert value.sharding.is_equivalent_to(row.sharding(spread.mesh), value.ndim)


def test_one_device_equals_eight_when_every_weight_is_trained_and_the_batch_is_cut(folder, full_gradient):
    mesh = make_mesh(config.Mesh(tensor=2))
    found, metrics = Run(folder, None, mesh, parts=2, optimizer=keeps_gradient()).gradient(batch())
    assert_same_metrics(metrics, full_gradient[1])
    assert_close(found, full_gradient[0])


def test_evaluation_gives_of_each_position_what_training_sums_and_counts_what_is_the_most_likely(plain):
    evaluate = make_eval_step(plain.loaded, plain.mesh)
    _, (metrics,) = plain(batch())
    scores = evaluate(plain.loaded.trainable, plain.loaded.frozen, batch())
    assert {name: float(v.sum()) for name, v in scores._asdict().items()} == pytest.approx(
        {name: metrics[name] for name in ("nll", "correct")}, rel=ROUNDING
    )
    assert metrics["weight"] == batch()["weights"].sum() == 28 == (np.asarray(scores.nll) > 0).sum()
    logits = np.asarray(plain.loaded.decoder()(batch()["tokens"]), np.float64)
    likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(likely, batch()["targets"][..., None], -1)[..., 0] * batch()["weights"]
    assert np.abs(np.asarray(scores.nll) - nll).max() < ROUNDING * nll.max()
    rows = batch()
    guesses = np.asarray(plain.loaded.decoder()(rows["tokens"])).argmax(-1).astype(np.int32)
    rows["targets"] = np.where(np.arange(16)[None] % 2 == 0, guesses, (guesses + 1) % 96).astype(np.int32)
    scores = evaluate(plain.loaded.trainable, plain.loaded.frozen, rows)
    assert np.array_equal(scores.correct, (rows["weights"] > 0) & (np.arange(16)[None] % 2 == 0))


def test_neither_training_nor_evaluation_holds_all_logits(tmp_path):
    """Whatever a chunk takes; `[B,S,V]` in float32 would be 67 MB."""
    run = Run(save(llama(vocab_size=65536, tie_word_embeddings=True), tmp_path))
    rows = batch(rows=8, length=32)
    evaluate = make_eval_step(run.loaded, run.mesh).lower(run.loaded.trainable, run.loaded.frozen, rows).compile()
    train = run.step.lower(
        initial_state(run.loaded, run.optimizer, run.mesh), run.loaded.frozen, rows, jax.random.key(0)
    ).compile()
    for executable in (evaluate, train):
        assert executable.memory_analysis().temp_size_in_bytes < 8 * 32 * 65536 * 4 / 2


def test_frozen_weights_get_no_gradient_and_no_optimizer_state(plain):
    frozen = jax.tree.map(np.asarray, plain.loaded.frozen)
    state, _ = plain(batch())
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(value.size for value in plain.loaded.trainable.values())
    assert all(np.array_equal(plain.loaded.frozen[path], value) for path, value in frozen.items())
    assert not any(value.is_deleted() for value in plain.loaded.frozen.values())
    assert int(state.step) == 1


def test_the_step_donates_its_state(plain):
    state, _ = plain()
    plain.step(state, plain.loaded.frozen, batch(), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))


def test_a_batch_without_a_supervised_token_gives_no_nan(plain):
    state, metrics = plain(batch() | {"weights": np.zeros((8, 16), np.float32)})
    assert metrics == [{"nll": 0.0, "correct": 0.0, "weight": 0.0, "grad_norm": 0.0, "applied": 1.0}]
    decayed = 1 - SETTINGS.learning_rate * SETTINGS.weight_decay
    for path, value in state.trainable.items():
        assert np.allclose(value, decayed * plain.loaded.trainable[path], rtol=1e-6, atol=0)


def test_rows_of_padding_give_no_nan(plain):
    state, metrics = plain(batch() | {"segments": np.zeros((8, 16), np.int32)})
    assert all(np.isfinite(list(metrics[0].values())))
    assert all(np.isfinite(value).all() for value in state.trainable.values())


def test_a_chunked_loss_equals_the_whole_one(folder, full_gradient, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 96 * 10)  # 28 supervised tokens of 128, in chunks of 10
    monkeypatch.setattr(loss, "MIN_CHUNK", 1)
    found, metrics = Run(folder, None, optimizer=keeps_gradient()).gradient(batch())
    assert_same_metrics(metrics, full_gradient[1])
    assert_close(found, full_gradient[0])


@pytest.mark.parametrize("remat", ["dots", "qkv", "full"])
def test_recomputing_activations_changes_nothing(remat, folder, lora_gradient):
    found, metrics = Run(folder, remat=remat, optimizer=keeps_gradient()).gradient(batch())
    assert_same_metrics(metrics, lora_gradient[1])
    assert_close(found, lora_gradient[0])


def test_dropout_draws_anew_each_step_and_by_seed(folder):
    run = Run(folder, Lora(rank=4, dropout=0.5), optimizer=optax.sgd(0.0), parts=2)
    same = {name: np.concatenate([value[4:], value[4:]]) for name, value in batch().items()}
    (_, one), (_, again), (_, other) = run(same, same), run(same, same), run(same, same, seed=1)
    assert one == again and one[0]["nll"] != one[1]["nll"] and one[0]["nll"] != other[0]["nll"]


def torch_gradient(folder, rows):
    """Hub name -> gradient of the mean loss over supervised tokens."""
    model = reload(folder)
    labels = torch.from_numpy(np.where(rows["weights"] > 0, rows["targets"], -100)).long()
    logits = model(torch.from_numpy(rows["tokens"]).long()).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def assert_equals_torch(found, wanted):
    # Two engines' rounding; the bias of k has no gradient in theory, so each is also measured against the largest of all.
    largest = max(np.abs(value).max() for value in wanted.values())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= 1e-4 * np.abs(value).max() + 1e-7 * largest, name


def test_without_lora_every_weight_gets_torchs_gradient(folder, full_gradient):
    wanted = torch_gradient(folder, batch())
    assert "lm_head.weight" in wanted
    assert_equals_torch(full_gradient[0], wanted)


def test_a_tied_embedding_gets_both_gradients_and_moves(tmp_path):
    folder = save(llama(vocab_size=96, tie_word_embeddings=True), tmp_path)
    rate = 1e-3
    run = Run(folder, None, optimizer=optax.chain(keeps_gradient(), optax.sgd(rate)))
    state, _ = run(batch())
    found, wanted = by_name(run.loaded.rows, state.optimizer[0].trace), torch_gradient(folder, batch())
    assert "lm_head.weight" not in wanted
    assert_equals_torch(found, wanted)
    moved, start = by_name(run.loaded.rows, state.trainable), by_name(run.loaded.rows, run.loaded.trainable)
    for name, gradient in wanted.items():
        assert np.abs(gradient).max() > 0
        assert np.allclose(moved[name], start[name] - rate * gradient, atol=1e-6)  # the rounding of weights near 1


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        (
            {"fsdp": 3},
            "mesh.data=1, mesh.fsdp=3, mesh.tensor=1 does not multiply to 8 device(s); set one of them to -1",
        ),
        ({"data": 3}, "mesh.data=3, mesh.fsdp=-1, mesh.tensor=1 does not multiply to 8"),
        ({"data": 16}, "mesh.data=16, mesh.fsdp=-1, mesh.tensor=1 does not multiply to 8"),
        ({"data": 0}, "mesh.data=0, mesh.fsdp=-1, mesh.tensor=1: sizes are positive"),
        ({"data": -1, "fsdp": -1}, "at most one is -1"),
    ],
    ids=str,
)
def test_mesh_sizes_that_do_not_multiply_are_refused(sizes, shown):
    with pytest.raises(UserError) as error:
        make_mesh(config.Mesh(**sizes))
    assert shown in str(error.value)


@pytest.mark.parametrize(
    ("changes", "mesh", "shown"),
    [
        ({}, {"tensor": 4}, "k_proj: kv_heads of 2 does not split over tensor=4; set mesh.tensor to at most 2"),
        ({"num_key_value_heads": 1}, {"tensor": 2}, "k_proj: kv_heads of 1 does not split over tensor=2"),
        ({"num_key_value_heads": 4}, {"tensor": 8}, "layers.0.self_attn.q_proj: heads of 4 does not split over tensor=8"),
        ({"vocab_size": 97}, {"tensor": 2}, "model.embed_tokens.weight: vocab of 97 does not split over tensor=2"),
        ({"intermediate_size": 49}, {"tensor": 2}, ": ffn of 49 does not split over tensor=2"),
        ({"hidden_size": 36, "head_dim": 8}, {"fsdp": 8}, "embed of 36 does not split over fsdp=8; set mesh.fsdp to at most 4"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_axis_that_does_not_split_is_refused_with_the_remedy(changes, mesh, shown, tmp_path):
    folder = save(llama(**{"vocab_size": 96, **changes}), tmp_path)
    with pytest.raises(UserError) as error:
        load(folder, Lora(), mesh=make_mesh(config.Mesh(**mesh)))
    assert shown in str(error.value)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(folder, what, parts):
    """Bad rows in one micro-batch; the steps before and after it are those of a run that never saw it, at their number."""
    run = Run(folder, dataclasses.replace(LORA, dropout=0.2), parts=parts)
    good, other = batch(1), batch(2)
    poisoned = batch(3)
    size = np.float32(np.inf if what == "loss" else 1e38)
    poisoned["weights"] = np.where(poisoned["weights"] > 0, size, np.float32(0))
    before, _ = run(good)
    after, metrics = run(good, poisoned)
    assert [m["applied"] for m in metrics] == [1.0, 0.0]
    assert not np.isfinite(metrics[1]["nll"] if what == "loss" else metrics[1]["grad_norm"])
    assert (int(before.step), int(after.step)) == (1, 2)
    same = jax.tree.map(np.array_equal, (before.trainable, before.optimizer), (after.trainable, after.optimizer))
    assert all(jax.tree.leaves(same))
    on, shown = run(good, poisoned, other)
    assert shown[2]["applied"] and np.isfinite(shown[2]["nll"])
    _, repeated = run(good, other)  # whose second step draws other dropout than that third one
    assert repeated[1]["nll"] != shown[2]["nll"] and repeated[1]["weight"] == shown[2]["weight"]
    assert int(optax.tree.get(on.optimizer, "count", filtering=lambda path, leaf: "ScaleByAdam" in str(path))) == 2
