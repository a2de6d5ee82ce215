"""Every weight trained (lora None), in float32 and in bfloat16: stochastic rounding, meshes, resume, export."""

import functools
import math
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import llama, save
from safetensors.numpy import load_file
from test_exact_resume import states  # noqa: F401
from test_step import SETTINGS, Run, batch
from test_train import lines, start

from jaxft import config, train
from jaxft.errors import Stopped, UserError
from jaxft.learn import rounding
from jaxft.learn.loop import Loop
from jaxft.models.ops import random_bits
from jaxft.parallel import preemption
from jaxft.parallel.mesh import make_mesh

BFLOAT16 = ("--lora", "none", "--model.param_dtype", "bfloat16", "--optim.learning_rate", "1e-3")
LARGEST = float(jnp.finfo(jnp.bfloat16).max)
DRAWS = 1 << 16


@jax.jit
def drawn(values, seed):
    """Each of `values` `[N]` rounded DRAWS times, `[N,DRAWS]`."""
    x = jnp.broadcast_to(values[:, None], (len(values), DRAWS))
    return rounding.stochastic(x, random_bits(x.shape, seed))


def float32(*values):
    return jnp.asarray(np.array(values, np.float32))


def neighbours(value):
    """The two values of bfloat16 about a float32, as float64: its own bits without the lower half, and the next after."""
    bits = np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)
    return sorted(float(np.uint32(b).view(np.float32)) for b in (bits, bits + np.uint32(0x10000)))


def test_rounding_is_to_a_neighbour_and_right_on_average():
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(24) * 10.0 ** rng.integers(-37, 37, 24)
    values = float32(*spread, 1 + 1e-5, -1 - 1e-5, 3.0e-41, -7.7e-40, 1.17e-38, 2 - 2**-22, -255.999)
    found = np.asarray(drawn(values, jnp.asarray([1, 2], jnp.uint32)).astype(jnp.float32), np.float64)
    for value, rounded in zip(np.asarray(values), found):
        low, high = neighbours(value)
        assert set(rounded) <= {low, high}
        chance = (float(value) - low) / (high - low)  # of the upper one
        error = math.sqrt(chance * (1 - chance) / DRAWS)
        assert abs((rounded == high).mean() - chance) <= 5 * error, value


def test_a_single_place_is_right_on_average_over_steps_and_no_two_draws_hang_together():
    keys = jax.vmap(lambda step: jax.random.fold_in(jax.random.key(0), step))(jnp.arange(2048))
    start = {"w": jnp.ones((4, 8), jnp.bfloat16), "v": jnp.ones((4, 8), jnp.bfloat16)}
    up = {name: jnp.full((4, 8), 2.0**-9) for name in start}  # a quarter of the way to the next one
    found = jax.jit(jax.vmap(lambda key: rounding.updated(start, up, key)))(keys)
    raised = (
        np.stack([np.asarray(found[name], np.float32) > 1 for name in "wv"], axis=1).reshape(2048, -1).astype(float)
    )
    assert abs(raised.mean(axis=0) - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 2048)  # each place, over the steps
    together = np.corrcoef(raised.T) - np.eye(64)
    assert abs(together).max() < 5 / math.sqrt(2048)
    assert abs(np.corrcoef(raised[1:].ravel(), raised[:-1].ravel())[0, 1]) < 5 / math.sqrt(raised.size)


def test_what_bfloat16_holds_stays_and_nothing_finite_becomes_infinite():
    every = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16)
    stochastic = jax.jit(rounding.stochastic)
    for bits in (0, 0xFFFFFFFF):  # the least and the most that can be added
        kept = stochastic(jnp.asarray(every.astype(np.float32)), jnp.full(every.shape, bits, jnp.uint32))
        same = np.asarray(kept).view(np.uint16) == every.view(np.uint16)
        assert (same | np.isnan(every.astype(np.float32))).all()
        assert np.isnan(np.asarray(kept, np.float32)).sum() == np.isnan(every.astype(np.float32)).sum()
        beyond = float32(LARGEST * 1.003, -LARGEST * 1.003, float(np.finfo(np.float32).max))
        ends = np.asarray(stochastic(beyond, jnp.full((3,), bits, jnp.uint32)), np.float32)
        assert ends.tolist() == [LARGEST, -LARGEST, LARGEST]
        lost = float32(np.uint32(0x7F800001).view(np.float32), -np.inf)  # a NaN that would be cut to infinity
        ends = np.asarray(stochastic(lost, jnp.full((2,), bits, jnp.uint32)), np.float32)
        assert np.isnan(ends[0]) and ends[1] == -np.inf


def test_a_small_update_is_lost_by_rounding_to_the_nearest_and_kept_on_average_at_random():
    steps, size, shape = 500, 1e-4, (64, 64)

    def moved(weights, key):
        return rounding.updated(weights, {"w": jnp.full(shape, size)}, key)

    start = {"w": jnp.ones(shape, jnp.bfloat16)}
    nearest = start["w"]
    for _ in range(3):
        nearest = (nearest.astype(jnp.float32) + size).astype(jnp.bfloat16)
    assert (np.asarray(nearest, np.float32) == 1).all()
    keys = jax.random.split(jax.random.key(1), steps)
    found = jax.lax.scan(lambda w, key: (moved(w, key), None), start, keys)[0]["w"]
    found = np.asarray(found, np.float64)
    # A walk of steps of 2⁻⁷, each with a chance of size · 2⁷.
    error = 2**-7 * math.sqrt(steps * size * 2**7 * (1 - size * 2**7) / found.size)
    assert abs(found.mean() - (1 + steps * size)) < 5 * error
    assert found.std() > 2**-7  # places go their own ways


def test_float32_weights_are_not_rounded():
    weights, updates = {"w": float32(1.0, -2.0)}, {"w": float32(1e-7, 3e-7)}
    found = rounding.updated(weights, updates, jax.random.key(0))["w"]
    assert np.array_equal(found, weights["w"] + updates["w"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # No bias of k: it has no gradient in theory, and Adam makes of its rounding whole steps.
    model = llama(vocab_size=96, mlp_bias=True, num_key_value_heads=4)
    return save(model, tmp_path_factory.mktemp("llama"))


@pytest.mark.slow
def test_a_step_in_bfloat16_moves_every_weight_and_one_that_is_not_finite_none(folder):
    """In two micro-batches, whose gradients are summed in float32."""
    run = Run(folder, None, parts=2, param_dtype="bfloat16")
    poisoned = batch(3)
    poisoned["weights"] = np.where(poisoned["weights"] > 0, np.float32(np.inf), np.float32(0))
    before, _ = run(batch())
    after, metrics = run(batch(), poisoned)
    assert [m["applied"] for m in metrics] == [1.0, 0.0] and int(after.step) == 2
    same = jax.tree.map(np.array_equal, (before.trainable, before.optimizer), (after.trainable, after.optimizer))
    assert all(jax.tree.leaves(same))
    assert not run.loaded.frozen
    for path, start_ in run.loaded.trainable.items():
        assert start_.dtype == before.trainable[path].dtype == jnp.bfloat16
        assert not np.array_equal(start_, before.trainable[path]), path
    moments = [leaf for leaf in jax.tree.leaves(before.optimizer) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}
    assert sum(leaf.size for leaf in moments) == 2 * sum(value.size for value in before.trainable.values())


BATCHES = [batch(seed, rows=16) for seed in range(4)]
MESHES = {"2 data x 4 fsdp": {"data": 2, "fsdp": 4}, "2 data x 2 fsdp x 2 tensor": {"data": 2, "tensor": 2}}


@pytest.fixture(scope="module")
def on_one_device(folder):
    """By dtype: the run, and its state and metrics after BATCHES."""

    @functools.cache
    def run(dtype):
        made = Run(folder, None, parts=2, param_dtype=dtype)
        return made, *made(*BATCHES)

    return run


@pytest.mark.slow  # each compiles a step for eight devices
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MESHES)
def test_one_device_equals_eight(folder, on_one_device, name, dtype):
    plain, wanted, metrics = on_one_device(dtype)
    spread = Run(folder, None, make_mesh(config.Mesh(**MESHES[name])), parts=2, param_dtype=dtype)
    found, of_mesh = spread(*BATCHES)
    for one, other in zip(of_mesh, metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-5 if dtype == "float32" else 1e-4)
    apart, values = [], []
    for row in spread.loaded.rows:
        at, value = found.trainable[row.path], np.asarray(wanted.trainable[row.path], np.float32)
        moments = [m[row.path] for m in (found.optimizer[1].mu, found.optimizer[1].nu)]
        assert all(x.sharding.is_equivalent_to(row.sharding(spread.mesh), x.ndim) for x in (at, *moments))
        assert (value != np.asarray(plain.loaded.trainable[row.path], np.float32)).mean() > 0.5, row.path
        apart.append(np.abs(np.asarray(at, np.float32) - value).ravel())
        values.append(np.abs(value).ravel())
    apart, values = np.concatenate(apart), np.concatenate(values)
    # Adam makes whole steps of a gradient that is all rounding, which a few of 24,000 may be. In bfloat16 an element is an
    # ulp off where a sum in another order falls on the other side of what was drawn; the next steps see that (1 % by then).
    rounding_of_sums = 1e-3 * SETTINGS.learning_rate
    ulp = 0 if dtype == "float32" else 2.0**-7 * values
    assert (apart > rounding_of_sums).mean() < (1e-3 if dtype == "float32" else 0.05)
    assert (apart > rounding_of_sums + ulp).mean() < 1e-3
    assert (apart <= len(BATCHES) * SETTINGS.learning_rate + ulp).all()


@pytest.fixture
def one_device():
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        yield


@pytest.mark.exhaustive  # three starts
def test_a_run_in_bfloat16_resumes_bit_for_bit_and_leaves_what_it_measured(states, one_device, tmp_path, monkeypatch):  # noqa: F811
    """What is exported is what was trained: the shipped base is in bfloat16."""
    more = (
        *BFLOAT16,
        "--optim.max_steps",
        "6",
        "--eval.every_steps",
        "3",
        "--run.log_every",
        "2",
        "--optim.accumulation_steps",
        "2",
    )
    whole = start(tmp_path / "whole", *more)
    wanted = {at: found[0] for at, found in states.items()}
    states.clear()
    once = Loop._train_once
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="step 4 is saved"):
        patch.setattr(preemption, "GRACE_SECONDS", 600.0)
        patch.setattr(Loop, "_train_once", lambda self: (once(self), self.step == 4 and os.kill(os.getpid(), 15)))
        start(tmp_path / "parts", *more)
    start(tmp_path / "parts", *more)
    assert {at: set(found) for at, found in states.items()} == {at: {found} for at, found in wanted.items()}
    assert lines(tmp_path / "parts") == lines(whole)
    ours, theirs = (load_file(part / "model" / "model.safetensors") for part in (whole, tmp_path / "parts"))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert {str(value.dtype) for value in ours.values()} == {"bfloat16"}
    told = [r["eval_loss"] for r in lines(whole) if "eval_loss" in r]
    again = start(
        tmp_path / "again",
        "--model.name",
        str(whole / "model"),
        "--model.init",
        "weights",
        *BFLOAT16,
        "--optim.max_steps",
        "1",
    )
    assert min(told) == pytest.approx(next(r["eval_loss"] for r in lines(again) if "eval_loss" in r), rel=1e-6)


@pytest.mark.exhaustive  # three runs
def test_training_in_bfloat16_ends_as_in_float32_where_rounding_to_the_nearest_stands_still(
    one_device, tmp_path, monkeypatch
):
    """The shipped base at a learning rate of 1e-4, by which most of its weights have to move less than half an ulp."""
    run = [
        "--config", "tiny_cpu.py", "--lora", "none", "--optim.learning_rate", "1e-4", "--optim.max_steps", "30",
        "--eval.every_steps", "30", "--eval.samples", "0", "--eval.tasks", "--eval.probe_rows", "0", "--data.limit", "400",
        "--data.max_length", "128",
    ]  # fmt: skip

    def ends(name, *more):
        train.main([*run, "--run.dir", str(tmp_path / name), *more])
        return [r["eval_loss"] for r in lines(tmp_path / name) if "eval_loss" in r]

    begun, wanted = ends("float32")
    same, found = ends("bfloat16", "--model.param_dtype", "bfloat16")
    monkeypatch.setattr(rounding, "stochastic", lambda x, bits: x.astype(jnp.bfloat16))
    _, nearest = ends("nearest", "--model.param_dtype", "bfloat16")
    assert same == begun  # the shipped weights are in bfloat16
    assert found == pytest.approx(wanted, rel=0.02) and begun - wanted > 2
    assert begun - nearest < 0.7 * (begun - wanted)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"model": {"param_dtype": "bfloat16"}}, "model.param_dtype: bfloat16 is for lora None"),
        (
            {"model": {"param_dtype": "float16"}},
            "model.param_dtype: expected one of float32, bfloat16, found 'float16'",
        ),
        ({"optim": {"loraplus_lr_ratio": 4.0}, "lora": None}, "optim.loraplus_lr_ratio: is B's of a pair"),
        ({"optim": {"loraplus_lr_ratio": 0.0}}, "optim.loraplus_lr_ratio: 0.0 is outside 1e-09 to 1e+09"),
        ({"optim": {"loraplus_lr_ratio": -2.0}}, "optim.loraplus_lr_ratio: -2.0 is outside 1e-09 to 1e+09"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_a_line(changes, shown):
    made = config.Config(model=config.Model(name="m"), data=config.Data(name="d"))
    for section, values in changes.items():
        made = replace(made, **{section: None if values is None else replace(getattr(made, section), **values)})
    with pytest.raises(UserError) as error:
        config.validate(made)
    assert shown in str(error.value) and "\n" not in str(error.value)
