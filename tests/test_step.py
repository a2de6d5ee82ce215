"""The training step: how a batch is cut, spread, recomputed and chunked changes nothing that it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from checkpoints import llama, load, reload, save, tokens, with_random_b

from jaxft import config
from jaxft.config import Lora, Optim
from jaxft.errors import UserError
from jaxft.learn import loss, optim
from jaxft.learn.step import initial_state, make_eval_step, make_train_step
from jaxft.parallel.mesh import make_mesh
from jaxft.parallel.sharding import place
from jaxft.weights.peft import hub_tensors

# Sums in another order, in fp32: about 1e-6 of the largest element here.
ROUNDING = 1e-5
SETTINGS = Optim(learning_rate=1e-2, schedule="constant", weight_decay=0.01, clip=1.0, epsilon=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(llama(vocab_size=96), tmp_path_factory.mktemp("llama"))


def batch(rows=8, length=16, seed=0):
    """Rows whose supervised tokens number 1, 2, 3, …, so that a mean of means would be another number."""
    ids = tokens(rows, length + 1, seed, vocab=96)
    weights = np.zeros((rows, length), np.float32)
    for row in range(rows):
        weights[row, length - 1 - row % (length - 1) :] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    inputs = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights, "positions": positions}
    return inputs | {"segments": np.ones((rows, length), np.int32)}


class Trained:
    """A fresh model after some steps: its state by Hub name, its metrics, and what it was."""

    def __init__(self, folder, batches, lora=Lora(rank=4, dropout=0.0), mesh=None, parts=1, optimizer=None, **options):
        self.mesh = mesh or make_mesh(devices=jax.devices()[:1])
        self.loaded = load(folder, lora, mesh=self.mesh, **options)
        self.loaded = self.loaded if lora is None else with_random_b(self.loaded)
        self.before = jax.tree.map(np.asarray, (self.loaded.trainable, self.loaded.frozen))
        optimizer = optimizer or optim.optimizer(SETTINGS, 10, self.loaded.rows)
        step = make_train_step(self.loaded, optimizer, self.mesh, accumulation_steps=parts)
        self.state, self.metrics = initial_state(self.loaded, optimizer, self.mesh), []
        for one in batches:
            placed = place(self.mesh, one, ("batch", None))
            self.state, metrics = step(self.state, self.loaded.frozen, placed, jax.random.key(0))
            self.metrics.append({name: float(value) for name, value in metrics.items()})

    def parameters(self):
        return by_name(self.loaded.rows, self.state.trainable)

    def gradient(self):
        """Of the last step, where the optimizer was `keeps_gradient`."""
        return by_name(self.loaded.rows, self.state.optimizer.trace)


def keeps_gradient():
    return optax.trace(decay=0.0)


def by_name(rows, arrays):
    """Hub name -> array in the Hub's orientation, of the trainable tensors."""
    return {name: part for row in rows if row.trainable for name, part in hub_tensors(row, arrays[row.path])}


def assert_close(found, wanted, tolerance=ROUNDING):
    assert found.keys() == wanted.keys()
    for name in wanted:
        error = np.abs(found[name] - wanted[name]).max()
        assert error <= tolerance * np.abs(wanted[name]).max(), (name, error)


def assert_same_metrics(found, wanted, tolerance=ROUNDING):
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=tolerance)


@pytest.fixture(scope="module")
def plain(folder):
    """Three steps on one device, whole batches."""
    return Trained(folder, [batch(seed=i) for i in range(3)])


@pytest.fixture(scope="module")
def plain_gradient(folder):
    return Trained(folder, [batch()], optimizer=keeps_gradient())


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_micro_batches_equal_one_batch(parts, folder, plain):
    accumulated = Trained(folder, [batch(seed=i) for i in range(3)], parts=parts)
    assert_same_metrics(accumulated.metrics, plain.metrics)
    assert_close(accumulated.parameters(), plain.parameters())


def test_micro_batches_without_a_supervised_token_weigh_nothing(folder, plain_gradient):
    padded = {name: np.concatenate([value, np.ones_like(value)]) for name, value in batch().items()}
    padded["weights"][8:] = 0
    accumulated = Trained(folder, [padded], parts=4, optimizer=keeps_gradient())
    assert_same_metrics(accumulated.metrics, plain_gradient.metrics)
    assert_close(accumulated.gradient(), plain_gradient.gradient())


MESHES = {
    "fsdp=8": config.Mesh(),
    "data=8": config.Mesh(data=8, fsdp=1),
    "data=2, fsdp=2, tensor=2": config.Mesh(data=2, tensor=2),
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_one_device_equals_eight(mesh, folder, plain):
    spread = Trained(folder, [batch(seed=i) for i in range(3)], mesh=make_mesh(mesh))
    assert_same_metrics(spread.metrics, plain.metrics)
    assert_close(spread.parameters(), plain.parameters())
    for path, value in spread.state.trainable.items():  # nothing moved to another layout on the way
        row = next(row for row in spread.loaded.rows if row.path == path)
        assert value.sharding.is_equivalent_to(row.sharding(spread.mesh), value.ndim)


def test_one_device_equals_eight_when_every_weight_is_trained_and_micro_batches_are_cut(folder):
    one = Trained(folder, [batch(16)], None, optimizer=keeps_gradient())
    mesh = make_mesh(config.Mesh(fsdp=4, tensor=2))
    eight = Trained(folder, [batch(16)], None, mesh=mesh, parts=2, optimizer=keeps_gradient())
    assert_same_metrics(eight.metrics, one.metrics)
    assert_close(eight.gradient(), one.gradient())


def test_evaluation_sums_what_training_sums(folder, plain):
    fresh = Trained(folder, [])
    sums = make_eval_step(fresh.loaded, fresh.mesh)(fresh.loaded.trainable, fresh.loaded.frozen, batch())
    assert {name: float(v) for name, v in sums._asdict().items()} == pytest.approx(
        {name: plain.metrics[0][name] for name in ("nll", "correct", "weight")}, rel=ROUNDING
    )
    assert float(sums.weight) == batch()["weights"].sum() and 0 <= float(sums.correct) <= float(sums.weight)


def test_accuracy_counts_the_supervised_tokens_that_are_the_most_likely(folder):
    fresh, rows = Trained(folder, []), batch()
    guesses = np.asarray(fresh.loaded.decoder()(rows["tokens"])).argmax(-1).astype(np.int32)
    rows["targets"] = np.where(np.arange(16)[None] % 2 == 0, guesses, (guesses + 1) % 96).astype(np.int32)
    sums = make_eval_step(fresh.loaded, fresh.mesh)(fresh.loaded.trainable, fresh.loaded.frozen, rows)
    assert float(sums.correct) == rows["weights"][:, ::2].sum()


def test_frozen_weights_get_no_gradient_and_no_optimizer_state(plain):
    trainable, frozen = plain.before
    moments = [leaf for leaf in jax.tree.leaves(plain.state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(value.size for value in trainable.values())
    assert all(np.array_equal(plain.loaded.frozen[path], value) for path, value in frozen.items())
    assert all(not np.array_equal(plain.state.trainable[path], value) for path, value in trainable.items())
    assert int(plain.state.step) == 3


def test_rows_without_a_supervised_token_give_no_nan(folder):
    empty = batch() | {"weights": np.zeros((8, 16), np.float32)}
    trained = Trained(folder, [empty], optimizer=optim.optimizer(Optim(schedule="constant"), 10, load(folder, Lora()).rows))
    assert trained.metrics == [{"nll": 0.0, "correct": 0.0, "weight": 0.0, "grad_norm": 0.0}]
    for path, value in trained.state.trainable.items():
        assert np.array_equal(value, trained.before[0][path])


def test_padding_rows_of_segment_zero_give_no_nan(folder):
    padded = batch() | {"segments": np.zeros((8, 16), np.int32)}
    trained = Trained(folder, [padded])
    assert all(np.isfinite(list(trained.metrics[0].values())))
    assert all(np.isfinite(value).all() for value in trained.parameters().values())


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied head"])
def test_a_chunked_loss_equals_the_whole_one(tied, tmp_path, monkeypatch):
    folder = save(llama(vocab_size=96, tie_word_embeddings=tied), tmp_path)
    whole = Trained(folder, [batch()], None, optimizer=keeps_gradient())
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 8 * 96 * 5)  # 16 positions in 4 chunks of 4
    assert loss._chunks(16, 5) == 4
    chunked = Trained(folder, [batch()], None, optimizer=keeps_gradient())
    assert_same_metrics(chunked.metrics, whole.metrics)
    assert_close(chunked.gradient(), whole.gradient())


@pytest.mark.parametrize("remat", ["dots", "qkv", "full"])
def test_recomputing_activations_changes_nothing(remat, folder, plain_gradient):
    recomputed = Trained(folder, [batch()], remat=remat, optimizer=keeps_gradient())
    assert_same_metrics(recomputed.metrics, plain_gradient.metrics)
    assert_close(recomputed.gradient(), plain_gradient.gradient())


def test_dropout_draws_anew_each_step_and_the_same_again(folder):
    lora = Lora(rank=4, dropout=0.5)
    still = optax.sgd(0.0)
    one, again = (Trained(folder, [batch(), batch()], lora, optimizer=still) for _ in range(2))
    assert one.metrics == again.metrics
    assert one.metrics[0]["nll"] != one.metrics[1]["nll"]
    recomputed = Trained(folder, [batch(), batch()], lora, optimizer=still, remat="full")
    assert_same_metrics(recomputed.metrics, one.metrics)


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied head"])
def test_without_lora_every_weight_moves_by_torchs_gradient(tied, tmp_path):
    folder = save(llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True), tmp_path)
    trained = Trained(folder, [batch()], None, optimizer=keeps_gradient())
    model, rows = reload(folder), batch()
    labels = torch.from_numpy(np.where(rows["weights"] > 0, rows["targets"], -100)).long()
    logits = model(torch.from_numpy(rows["tokens"]).long()).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    wanted = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert ("lm_head.weight" in wanted) != tied
    # Two engines; a bias of k has no gradient at all in theory, so measure it against the largest of its kind.
    largest = max(np.abs(value).max() for value in wanted.values())
    found = trained.gradient()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= 1e-4 * np.abs(value).max() + 1e-7 * largest, name
    stepped = Trained(folder, [batch()], None)
    for path, value in stepped.state.trainable.items():
        if not path.endswith("k_proj.bias"):
            assert (np.asarray(value) != stepped.before[0][path]).any(axis=-1).any(), path


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ({"fsdp": 3}, "mesh.data=1, mesh.fsdp=3, mesh.tensor=1 does not multiply to 8 device(s); set one of them to -1"),
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
        ({}, {"tensor": 4}, "layers.0.self_attn.k_proj: kv_heads of 2 does not split over tensor=4; set mesh.tensor to at most 2"),
        ({"num_key_value_heads": 1}, {"tensor": 2}, "k_proj: kv_heads of 1 does not split over tensor=2; set mesh.tensor to at most 1"),
        ({"num_key_value_heads": 4}, {"tensor": 8}, "q_proj: heads of 4 does not split over tensor=8; set mesh.tensor to at most 4"),
        ({"vocab_size": 97}, {"tensor": 2}, "model.embed_tokens.weight: vocab of 97 does not split over tensor=2"),
        ({"intermediate_size": 49}, {"tensor": 2}, "gate_proj.weight: ffn of 49 does not split over tensor=2"),
        ({"hidden_size": 36}, {"fsdp": 8}, "embed of 36 does not split over fsdp=8; set mesh.fsdp to at most 4"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_axis_that_does_not_split_is_refused_with_the_remedy(changes, mesh, shown, tmp_path):
    folder = save(llama(**{"vocab_size": 96, **changes}), tmp_path)
    with pytest.raises(UserError) as error:
        load(folder, Lora(), mesh=make_mesh(config.Mesh(**mesh)))
    assert shown in str(error.value)


def test_the_step_donates_its_state_and_keeps_the_frozen_weights(folder):
    mesh = make_mesh(devices=jax.devices()[:1])
    loaded = load(folder, Lora(rank=4))
    optimizer = optim.optimizer(SETTINGS, 10, loaded.rows)
    state = initial_state(loaded, optimizer, mesh)
    make_train_step(loaded, optimizer, mesh)(state, loaded.frozen, batch(), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in loaded.frozen.values())
    assert jnp.isfinite(loaded.frozen["embed"]).all()
