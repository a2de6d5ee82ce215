"""LoRA+: B, and vectors beside the pairs, learn faster; the oracle is PEFT's own optimizer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import llama, load, peft_model, reload, save
from marked import slow
from peft.optimizers import create_loraplus_optimizer
from test_train import lines, one_device, start  # noqa: F401

from jaxft.config import Lora, Optim
from jaxft.learn import optim
from jaxft.weights.peft import hub_tensors

SETTINGS = Optim(learning_rate=1e-3, schedule="constant", clip=None, loraplus_lr_ratio=8.0)
STEPS, RATIO = 6, SETTINGS.loraplus_lr_ratio


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(llama(attention_bias=True), tmp_path_factory.mktemp("base"))


def by_saved_name(rows, arrays):
    """PEFT's names and orientation of jaxft's trainable arrays, biases included."""
    return {name: part for row in rows for name, part in hub_tensors(row, row.saved, jnp.asarray(arrays[row.path]))}


def parameters(model):
    """What a PEFT model trains, under the names in its files."""
    found = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    return {n.removeprefix("base_model.model.").replace("vector.weight", "vector"): p for n, p in found.items()}


# PEFT decays DoRA's magnitudes as it does matrices; here no vector is decayed, with LoRA+ or without.
@pytest.mark.parametrize(("dora", "decay"), [(False, 0.1), slow(True, 0.0)], ids=["pairs and biases", "DoRA"])
def test_updates_are_those_of_pefts_optimizer(base, tmp_path, dora, decay):
    about = {"r": 4, "use_dora": dora, "target_modules": ["q_proj", "down_proj"]}
    oracle = peft_model(reload(base), bias="none" if dora else "lora_only", **about)
    oracle.save_pretrained(tmp_path)
    loaded = load(base, Lora(), adapter=str(tmp_path))
    rows = [row for row in loaded.rows if row.trainable]
    theirs = parameters(oracle)
    assert theirs.keys() == by_saved_name(rows, loaded.trainable).keys()
    decayed = {"weight_decay": decay, "loraplus_weight_decay": decay}
    adamw = create_loraplus_optimizer(
        oracle, torch.optim.AdamW, lr=SETTINGS.learning_rate, loraplus_lr_ratio=RATIO, **decayed
    )
    optimizer = optim.optimizer(replace(SETTINGS, weight_decay=decay), STEPS, rows)
    begun = {path: np.asarray(value) for path, value in loaded.trainable.items()}
    ours, state, update = begun, optimizer.init(begun), jax.jit(optimizer.update)
    rng = np.random.default_rng(0)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes an int count with floats, as in the step
        for _ in range(STEPS):
            drawn = {path: rng.standard_normal(v.shape).astype(np.float32) for path, v in ours.items()}
            for name, gradient in by_saved_name(rows, drawn).items():
                theirs[name].grad = torch.from_numpy(np.array(gradient))
            adamw.step()
            updates, state = update(drawn, state, ours)
            ours = {path: ours[path] + np.asarray(updates[path]) for path in ours}
    found, start_ = by_saved_name(rows, ours), by_saved_name(rows, begun)
    for name, wanted in theirs.items():
        moved = wanted.detach().numpy() - start_[name]
        fast = "lora_A" not in name
        # Adam moves by about the rate each step where gradients have no direction: a few times it in all.
        assert (np.abs(moved).max() > 2 * SETTINGS.learning_rate * (RATIO if fast else 1)) and moved.any()
        assert np.abs(moved).max() < 2 * STEPS * SETTINGS.learning_rate * (RATIO if fast else 1)
        assert np.abs(found[name] - start_[name] - moved).max() <= 1e-3 * np.abs(moved).max(), name


def test_a_ratio_of_one_is_plain_adamw(base):
    rows = load(base, Lora(rank=2, targets=("q_proj",))).rows
    rng, made = np.random.default_rng(0), []
    ours = {row.path: rng.standard_normal(row.shape).astype(np.float32) for row in rows if row.trainable}
    for ratio in (1.0, 3.0):
        optimizer = optim.optimizer(replace(SETTINGS, loraplus_lr_ratio=ratio, weight_decay=0.1), STEPS, rows)
        with jax.numpy_dtype_promotion("standard"):
            made.append(optimizer.update(ours, optimizer.init(ours), ours))
    (plain, of_plain), (faster, of_faster) = made
    assert jax.tree.structure(of_plain) == jax.tree.structure(of_faster)  # a run's checkpoints hold the same either way
    for path in ours:
        times = 3.0 if path.endswith(".b") else 1.0
        np.testing.assert_allclose(faster[path], times * plain[path], rtol=1e-6)


@pytest.mark.exhaustive  # two starts
def test_the_learning_rate_logged_is_that_of_a(tmp_path):
    plain, faster = (
        lines(start(tmp_path / name, "--optim.max_steps", "8", "--optim.loraplus_lr_ratio", name)) for name in "14"
    )
    rates = [[r["learning_rate"] for r in run if "learning_rate" in r] for run in (plain, faster)]
    assert rates[0] == rates[1] and len(rates[0]) == 2
    assert plain[-1]["eval_loss"] != faster[-1]["eval_loss"]
