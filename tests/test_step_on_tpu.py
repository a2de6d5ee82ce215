"""The training step as TPU slices run it: compiled by the TPU's own compiler, or traced at real shapes. No TPU is needed."""

import json
import math
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marked import exhaustive, slow

from jaxft import config, plan
from jaxft.errors import OutOfResources
from jaxft.learn import recompute
from jaxft.parallel import topology
from jaxft.parallel.compilation import keep_compiled, kept_only_for
from jaxft.parallel.mesh import make_mesh
from jaxft.parallel.sharding import replicated
from jaxft.plans import work as flops
from jaxft.weights import model
from tests.benchmarks.step import moved

# Gemma 2's structure, small: caps, four norms, windows that S outgrows, a vocabulary much larger than the rest.
SMALL = dict(
    model_type="gemma2", hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, vocab_size=65536, query_pre_attn_scalar=64, sliding_window=192,
    hidden_activation="gelu_pytorch_tanh", torch_dtype="bfloat16",
)  # fmt: skip
ROWS, LENGTH = 8, 384


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma2")
    (folder / "config.json").write_text(json.dumps(SMALL))
    return config.Config(
        model=config.Model(name=str(folder), remat="dots"),
        lora=config.Lora(rank=4),
        data=config.Data(name="rows", max_length=LENGTH),
        optim=config.Optim(batch_size=ROWS),
    )


@pytest.fixture(scope="module")
def compiled(settings):
    """The step for eight chips, under dots."""
    return plan.compiled(settings, "v5e-8")


def traced(name, policy, where="v5e-8", rows=8, *overrides):
    settings = config.load(name, list(overrides))
    source = model.sketch(settings.model, settings.lora)
    mesh = make_mesh(devices=topology.devices(where))
    return source.arch, recompute.traceable(settings, source, mesh, 1000, (rows, 1024), policy)


@pytest.mark.parametrize(("policy", "limit"), [("dots", 1.02), ("qkv", 1.40), ("full", 1.50), ("nested", 2.00)])
@pytest.mark.parametrize("name", ["gemma2_9b.py", "qwen2_1_5b.py"])
def test_matmuls_are_those_of_a_frozen_base_and_what_the_policy_repeats(name, policy, limit):
    arch, found = traced(name, policy)
    work, needed = flops.of_step(found), flops.ideal(arch, 8 * 1024)
    assert 1.0 < sum(work.values()) / needed < limit
    weights = {shape[::-1] for shape in arch.linear_shapes().values()} | {(arch.vocab_size, arch.dim)}
    transposed = {shape[::-1] for shape in weights}
    assert not (weights | transposed) & set(work), "a matmul yields the gradient of a frozen weight"


def test_every_weight_trained_costs_a_gradient_of_every_weight(settings):
    whole = replace(settings, lora=None)
    source = model.sketch(whole.model, None)
    mesh = make_mesh(devices=topology.devices("v5e-8"))
    work = flops.of_step(recompute.traceable(whole, source, mesh, 10, (ROWS, LENGTH), "dots"))
    assert (512, 256) in work and (65536 // 8, 256) in work


def test_a_chip_holds_its_share_of_weights_and_state_and_never_the_logits(compiled):
    assert (compiled.policy, compiled.outlined.attention) == ("dots", "splash")
    found = compiled.executable.memory_analysis()
    frozen = sum(math.prod(x.shape) * x.dtype.itemsize for x in compiled.outlined.frozen.values())
    trained = sum(math.prod(x.shape) * 4 for x in compiled.outlined.trainable.values())
    assert {x.dtype.name for x in compiled.outlined.frozen.values()} == {"bfloat16"}
    assert {x.dtype.name for x in compiled.outlined.trainable.values()} == {"float32"}
    batch = 5 * ROWS * LENGTH * 4
    # Norms lie whole on every chip; tiles of (8, 128) make small arrays larger.
    assert found.argument_size_in_bytes < 1.1 * (frozen + 3 * trained + batch) / 8 + 2**20
    assert found.alias_size_in_bytes > 0.95 * 3 * trained / 8  # parameters and moments take the old ones' place
    logits = ROWS * LENGTH * SMALL["vocab_size"] * 4 / 8  # a chip's share of them
    assert found.temp_size_in_bytes < logits / 2


def test_neither_embedding_nor_head_travels_whole(compiled):
    table = SMALL["vocab_size"] * SMALL["hidden_size"] * 2 / 1e6  # MB in bfloat16
    largest = moved(compiled.executable.as_text())
    assert set(largest) >= {"all-to-all", "reduce-scatter"}
    assert largest.pop("all-to-all") < table / 8 + 1  # a chip's rows of the table for its columns
    assert max(largest.values()) < table / 8


# All layers and next to no vocabulary, so that what is kept for the backward pass is most of what is needed.
DEEP = dict(
    model_type="llama", hidden_size=128, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=2, head_dim=64,
    vocab_size=256, tie_word_embeddings=True, torch_dtype="bfloat16",
)  # fmt: skip


@pytest.mark.slow
def test_the_policy_is_the_cheapest_that_fits(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEP))
    wanted = config.Lora(rank=4, dropout=0.0, targets=("v_proj",))  # a small program, quickly compiled
    mesh = make_mesh(devices=topology.devices("v5e-1"))
    source = model.sketch(config.Model(name=str(tmp_path)), wanted)

    def chosen(limit, policy="auto"):
        return recompute.compile_step(
            config.Config(config.Model(remat=policy), wanted), source, mesh, 10, (8, 256), limit
        )

    cheapest = chosen(None)
    assert (cheapest.policy, cheapest.too_large) == ("dots", ())
    found = chosen(cheapest.bytes - 1)
    assert (found.policy, [name for name, _ in found.too_large]) == ("qkv", ["dots"])
    assert found.bytes < 0.8 * cheapest.bytes
    assert f"remat qkv, {found.bytes / 2**30:.2f} GiB per device; dots" in found.said()
    with pytest.raises(
        OutOfResources, match=r"does not fit the 0\.0 GiB of a device .*full \(0\.\d GiB\)\); lower optim"
    ):
        chosen(2**20, "full")


@pytest.mark.parametrize(
    ("rows", "policy", "gib"), [(8, "dots", 6.96), (16, "dots", 11.25), (32, "qkv", 10.73), (32, "full", 4.82)]
)
def test_what_a_step_must_hold_is_known_before_it_is_compiled(rows, policy, gib):
    """Beside what the compiler said of Gemma 2 9B on v5e-8 (tests/benchmarks/step.py, 2026-11-21)."""
    settings = config.load("gemma2_9b.py")
    source = model.sketch(settings.model, settings.lora)
    mesh = make_mesh(devices=topology.devices("v5e-8"))
    found = recompute.traceable(settings, source, mesh, 1000, (rows, 1024), policy)
    assert 0.65 < recompute.least_bytes(found, source, mesh) / 2**30 / gib < 1


def test_a_plan_leaves_the_cache_of_programs_alone(tmp_path):
    """What is compiled for a slice that is not here cannot be read back from it."""
    keep_compiled(str(tmp_path))
    for _ in range(2):
        with kept_only_for(topology.devices("v5e-1")):
            jax.jit(jnp.sin).lower(abstract_on("v5e-1")).compile()
    assert not list(tmp_path.rglob("*-cache"))
    jax.jit(jnp.cos)(jnp.ones(3))
    assert list(tmp_path.rglob("*-cache"))


def abstract_on(where):
    mesh = make_mesh(devices=topology.devices(where))
    return jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=replicated(mesh))


def test_the_plan_lowers_the_step_that_train_compiles(settings, compiled):
    lowered = plan.lowered(settings, "v5e-8")
    assert isinstance(lowered, jax.stages.Lowered)
    state, frozen, batch, _ = lowered.args_info[0]
    assert batch["tokens"].shape == (ROWS, LENGTH)
    assert {path: info.shape for path, info in frozen.items()} == {
        path: x.shape for path, x in compiled.outlined.frozen.items()
    }
    assert sum(np.prod(info.shape) for info in jax.tree.leaves(state.trainable)) == sum(
        np.prod(x.shape) for x in compiled.outlined.trainable.values()
    )


@pytest.mark.parametrize(
    ("rows", "gib"),
    [exhaustive(8, 8.0), exhaustive(16, 13.4)],
)
def test_gemma_2_9b_takes_no_more_of_a_v5e_chip_than_this(rows, gib):
    """Other slices take minutes to compile for: `python -m tests.benchmarks.step`."""
    _, found = traced("gemma2_9b.py", "dots", "v5e-8", rows)
    executable = found.step.lower(*found.inputs).compile()
    assert recompute.device_memory(executable) / 2**30 <= gib


@pytest.mark.parametrize(
    ("base", "policy", "gib"),
    [slow("nf4", "full", 7.2), exhaustive("int4", "full", 7.2), exhaustive("int8", "nested", 10.2)],
)
def test_gemma_2_9b_trains_on_one_v5e_chip_with_a_quantised_base(base, policy, gib):
    """In bfloat16 its weights alone are more than the chip has."""
    arch, found = traced("gemma2_9b.py", policy, "v5e-1", 1, "--model.quantize", base)
    tokens = math.prod(found.inputs[2]["tokens"].shape)
    most = 1.5 if policy == "full" else 2.0
    assert sum(flops.of_step(found).values()) <= most * flops.ideal(arch, tokens)
    executable = found.step.lower(*found.inputs).compile()
    assert recompute.device_memory(executable) / 2**30 <= gib


@pytest.mark.exhaustive
def test_a_quantised_base_compiles_in_at_most_one_and_a_half_times_bfloat16s_seconds():
    """User's CPU seconds, the least of two: `python -m tests.benchmarks.quantized --compile v5e-8`."""

    def least(base):
        spent = []
        for _ in range(2):
            _, found = traced("gemma2_9b.py", "dots", "v5e-8", 8, "--model.quantize", base)
            began = os.times().user
            found.step.lower(*found.inputs).compile()
            spent.append(os.times().user - began)
        return min(spent)

    stored = least("none")
    for base in ("int8", "int4", "nf4"):
        assert least(base) <= 1.5 * stored, base
