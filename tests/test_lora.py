"""The adapter layer: what it adapts, what it trains, and that it starts as nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import SIZES, llama, load, logits, peft_model, save, tokens, with_random_b

from jaxft.config import Lora
from jaxft.errors import UserError
from jaxft.models import decoder, ops, tensors
from jaxft.models.adaptation import plan_of, targets
from jaxft.models.families import arch_from_config
from jaxft.models.lora import Linear, read

ARCH = arch_from_config({"model_type": "llama", **SIZES, "num_hidden_layers": 3})
PATHS = list(ARCH.linear_shapes())
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME_LAYERS = r"model\.layers\.[12]\.(self_attn\.[qv]_proj|mlp\.up_proj)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(llama(num_hidden_layers=3, attention_bias=True), tmp_path_factory.mktemp("llama"))


def hidden(loaded, ids, *keys):
    """The last hidden layer under each dropout key; None is outside training."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)

    @jax.jit
    def run(trainable, key):
        model = decoder.join(loaded.graphdef, trainable, loaded.frozen)
        return model.hidden(ids, positions, jnp.ones_like(ids), key=key)[0]

    found = [np.asarray(run(loaded.trainable, key)) for key in keys]
    return found if len(keys) > 1 else found[0]


@pytest.mark.parametrize("wanted", ["all-linear", SOME_LAYERS], ids=["all-linear", "some layers"])
def test_a_fresh_adapter_changes_nothing(folder, wanted):
    ids = tokens(2, 16)
    plain = logits(load(folder), ids)
    adapted = load(folder, Lora(targets=wanted))
    assert np.array_equal(logits(adapted, ids), plain)  # bit for bit
    assert not np.array_equal(logits(with_random_b(adapted), ids), plain)


def test_a_fresh_adapter_is_seeded_by_module_and_by_seed(folder):
    every, some = load(folder, Lora()), load(folder, Lora(targets=SOME_LAYERS))
    again, other = load(folder, Lora()), load(folder, Lora(), seed=1)

    def by_name(loaded):
        rows = [row for row in loaded.rows if row.adapter]
        return {name: np.asarray(part) for row in rows for name, part in zip(row.names, loaded.trainable[row.path])}

    drawn, few = by_name(every), by_name(some)
    assert all(np.array_equal(drawn[name], value) for name, value in by_name(again).items())
    assert all(np.array_equal(drawn[name], value) for name, value in few.items()) and 0 < len(few) < len(drawn)
    a = {name: value for name, value in drawn.items() if "lora_A" in name}
    assert all(not np.array_equal(value, by_name(other)[name]) for name, value in a.items())
    assert len({value.tobytes() for value in a.values()}) == len(a)


def test_a_starts_uniform_as_in_peft_and_b_zero(folder):
    for row in load(folder, Lora(rank=64)).rows:
        if row.adapter:
            value, bound = np.asarray(tensors.initial_adapter(row, 0)), row.shape[1] ** -0.5
            if row.path.endswith(".b"):
                assert not value.any()
            else:
                assert 0.98 * bound < np.abs(value).max() <= bound
                assert abs(value.std() - bound / 3**0.5) < 0.03 * bound


def test_all_linear_is_every_linear_module_but_the_head():
    assert targets("all-linear", ARCH) == PATHS
    assert len(PATHS) == 21 and not any("lm_head" in path for path in PATHS)


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (("q_proj", "v_proj"), 6),
        (("self_attn.q_proj",), 3),
        (("model.layers.1.mlp.up_proj", "o_proj"), 4),
        (r".*\.(gate|up)_proj", 6),
        (SOME_LAYERS, 6),
    ],
    ids=str,
)
def test_targets_select_what_peft_selects(wanted, count):
    model = llama(num_hidden_layers=3)
    adapted = peft_model(model, target_modules=wanted if isinstance(wanted, str) else list(wanted))
    assert targets(wanted, ARCH) == sorted(adapted.targeted_module_names, key=PATHS.index)
    assert len(targets(wanted, ARCH)) == count


def test_a_single_name_is_a_name_too():
    assert targets("down_proj", ARCH) == targets(("down_proj",), ARCH) and len(targets("down_proj", ARCH)) == 3


@pytest.mark.parametrize(
    "wanted", ["qkv_proj", ("q_proj", "qkv_proj"), r".*\.layers\.9\..*", "proj", ("_proj",), ()], ids=str
)
def test_a_target_that_matches_nothing_is_refused_with_what_exists(wanted):
    with pytest.raises(UserError) as error:
        targets(wanted, ARCH)
    assert all(leaf in str(error.value) for leaf in LEAVES)
    assert "model.layers.0.self_attn.q_proj" in str(error.value)
    if "qkv_proj" in wanted:
        assert "'qkv_proj'" in str(error.value) and "'q_proj'" not in str(error.value)


def test_a_target_that_is_no_regular_expression_is_refused():
    with pytest.raises(UserError, match=r"lora.targets: '\(q_proj' is not a regular expression"):
        targets("(q_proj", ARCH)


def test_dropout_keeps_the_mean_and_the_rate():
    x = jnp.full((4, 100, 1000), 3.0)
    for rate in (0.1, 0.5):
        out = np.asarray(ops.dropout(x, rate, jnp.array([1, 2], jnp.uint32))).reshape(400, 1000)
        kept = out != 0
        assert np.allclose(out[kept], 3 / (1 - rate))
        # Four standard deviations of a mean of 400,000 draws.
        assert abs(kept.mean() - (1 - rate)) < 4 * (rate * (1 - rate) / x.size) ** 0.5
        assert abs(kept.mean(axis=0) - (1 - rate)).max() < 6 * (rate * (1 - rate) / 400) ** 0.5


def test_dropout_is_on_in_training_alone_and_on_the_adapter_alone(folder):
    ids, keys = tokens(2, 16), [jax.random.key(seed) for seed in (1, 1, 2)]
    fresh = load(folder, Lora(dropout=0.5))
    plain, masked = hidden(fresh, ids, None, keys[0])
    assert np.array_equal(plain, masked)  # B is zero, so a mask may change nothing
    off, still = hidden(with_random_b(load(folder, Lora(dropout=0.0))), ids, None, keys[0])
    assert np.array_equal(off, still)
    outside, one, again, two = hidden(with_random_b(fresh), ids, None, *keys)
    assert np.array_equal(outside, off)
    assert np.array_equal(one, again) and not np.array_equal(one, two) and not np.array_equal(one, outside)


def test_layers_and_places_draw_their_own_dropout_masks(folder, monkeypatch):
    drawn = []

    def recorded(x, rate, key, **settings):
        jax.debug.callback(lambda data: drawn.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return x

    monkeypatch.setattr(ops, "dropout", recorded)
    hidden(load(folder, Lora(dropout=0.5)), tokens(1, 4), jax.random.key(0))
    jax.effects_barrier()
    assert len(drawn) == len(set(drawn)) == 3 * 4  # 3 layers, 4 places of each: q|k|v, o, gate|up, down


def test_only_the_pairs_are_trained_and_none_trains_every_weight(folder):
    pairs, every = load(folder, Lora()), load(folder, None)
    assert all(path.endswith((".a", ".b")) for path in pairs.trainable)
    assert not any(path.endswith((".a", ".b")) for path in pairs.frozen)
    assert every.frozen == {} and set(every.trainable) == set(pairs.frozen)
    assert all(value.dtype == jnp.float32 for value in (*pairs.trainable.values(), *every.trainable.values()))


def test_trained_parameters_are_float32_on_a_bfloat16_base(folder):
    pairs, every = load(folder, Lora(), dtype="bfloat16"), load(folder, None, dtype="bfloat16")
    assert (
        {v.dtype for v in pairs.trainable.values()}
        == {v.dtype for v in every.trainable.values()}
        == {jnp.dtype("float32")}
    )
    assert {v.dtype for v in pairs.frozen.values()} == {jnp.dtype("bfloat16")}
    for loaded in (pairs, every):
        found = logits(loaded, tokens(1, 8))
        assert found.dtype == np.float32 and np.isfinite(found).all()
        assert hidden(loaded, tokens(1, 8), None).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("rank", "wanted"),
    [(8, "all-linear"), (3, ("q_proj", "down_proj")), (4, SOME_LAYERS)],
    ids=["all", "names", "regex"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied head"])
def test_parameter_counts_equal_pefts(rank, wanted, tied, tmp_path):
    model = llama(num_hidden_layers=3, tie_word_embeddings=tied)
    ours = load(save(model, tmp_path), Lora(rank=rank, targets=wanted))
    theirs = peft_model(model, r=rank, target_modules=wanted if isinstance(wanted, str) else list(wanted))
    assert tensors.count_parameters(ours.rows) == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("masks", ["shared", "separate"])
def test_modules_of_one_input_share_a_mask_unless_they_are_to_have_their_own(masks):
    """Two pairs with A the identity and B ones over one input: a row's sum tells how much of it their mask kept."""
    plan = plan_of(Lora(rank=64, alpha=64, dropout=0.5, dropout_masks=masks), ARCH)
    paths = [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj")]
    made = [Linear((path,), (64, 3), ("embed", "ffn"), plan, bias=False, dtype=jnp.float32) for path in paths]
    for layer in made:
        layer.kernel.set_value(jnp.zeros((3, 64)))
        layer.a.set_value(jnp.eye(64))
        layer.b.set_value(jnp.ones((64, 3)))
    gate, up = (np.asarray(y)[..., 0] for y in read(made, jnp.ones((2, 200, 64)), jnp.array([3, 4], jnp.uint32)))
    assert np.array_equal(gate, up) == (masks == "shared")
    for kept in (gate, up):
        assert abs(kept.mean() / 64 - 1) < 4 / (2 * 200 * 64) ** 0.5
    if masks == "separate":
        assert abs(np.corrcoef(gate.ravel(), up.ravel())[0, 1]) < 4 / 400**0.5
