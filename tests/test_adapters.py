"""Adapters of every family and kind are PEFT's: logits, gradients, counts and files, both ways. Llama is in test_peft.py."""

import dataclasses
import json
import zlib
from types import SimpleNamespace

import jax
import numpy as np
import openelm as apple
import optax
import peft
import pytest
import safetensors.numpy
from checkpoints import LOGITS, assert_same, load, logits, peft_model, reload, save, tiny, tokens, torch_logits
from test_lora import hidden
from test_peft import PREFIX, batch, copy, first_step, some_weights, torch_loss

from jaxft import config
from jaxft.config import Lora, Optim
from jaxft.errors import UserError
from jaxft.learn import optim
from jaxft.learn.step import initial_state, make_train_step
from jaxft.models.adaptation import described, plan_of
from jaxft.models.tensors import count_parameters
from jaxft.parallel.mesh import make_mesh
from jaxft.weights.hub import read_arch
from jaxft.weights.model import find
from jaxft.weights.peft import hub_tensors, vllm_verdict
from jaxft.weights.peft import save as save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
IDS = tokens(3, 24, seed=7)  # three times as long as the windows of checkpoints.TELLING
FUSED = ["qkv_proj", "out_proj", "proj_1", "proj_2"]  # OpenELM's; PEFT has no all-linear for a model it does not know
HEAD, EMBED, TIED, UNTIED = "lm_head", "embed_tokens", {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
EVERY, QUERY, DORA = {"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}, {"use_dora": True}
RANKS, ALPHAS = {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, {r".*layers\.0\.self_attn\.q_proj": 20.5}
PATTERNS = {"r": 4, "lora_alpha": 6, "rank_pattern": RANKS, "alpha_pattern": ALPHAS}
KINDS = {
    "gemma": ("gemma", {}, EVERY),
    "gemma2": ("gemma2", {}, EVERY),
    "gemma2, tied head": ("gemma2", {}, QUERY | {"modules_to_save": [HEAD]}),
    "gemma2, tied embedding": ("gemma2", {}, QUERY | {"modules_to_save": [EMBED]}),
    "gemma2, both, norms": ("gemma2", {}, EVERY | {"modules_to_save": [EMBED, HEAD, "pre_feedforward_layernorm"]}),
    "gemma2, both kept tied": ("gemma2", {}, QUERY | {"modules_to_save": [EMBED, HEAD], "ensure_weight_tying": True}),
    "gemma2, untied, DoRA, head": ("gemma2", UNTIED, EVERY | DORA | {"modules_to_save": [HEAD]}),
    "qwen2, DoRA": ("qwen2", {}, EVERY | DORA),
    "qwen2, every bias": ("qwen2", {}, {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "qwen2, both": ("qwen2", {}, QUERY | {"modules_to_save": [EMBED, HEAD]}),
    "qwen2, a biased linear": ("qwen2", {}, QUERY | {"modules_to_save": ["k_proj"], "bias": "lora_only"}),
    "qwen2, tied, every bias, DoRA, both": ("qwen2", TIED, EVERY | DORA | {"bias": "all", "modules_to_save": [EMBED, HEAD]}),
    "qwen2, tied, both kept tied": ("qwen2", TIED, QUERY | {"modules_to_save": [EMBED, HEAD], "ensure_weight_tying": True}),
    "qwen3, patterns, norms": ("qwen3", {}, EVERY | PATTERNS | {"modules_to_save": ["q_norm", "k_norm"]}),
    "mistral, patterns, rank-stabilised DoRA": ("mistral", {}, EVERY | PATTERNS | {"use_rslora": True, "use_dora": True}),
    "openelm": ("openelm", {}, {"target_modules": FUSED}),
    "openelm, DoRA": ("openelm", {}, {"target_modules": FUSED, "use_dora": True}),
    "openelm, embedding that is the head, norms": (
        "openelm", {}, {"target_modules": FUSED, "modules_to_save": ["token_embeddings", "q_norm", "ffn_norm"]}
    ),
    "openelm, untied, head": (
        "openelm", {"share_input_output_layers": False}, {"target_modules": FUSED, "modules_to_save": [HEAD]}
    ),
}  # fmt: skip


def make(family, folder, **changes):
    """The folder of a tiny model of `family`."""
    if family == "openelm":
        return apple.save(apple.openelm(**changes), folder)
    return save(tiny(family, **changes), folder)


def read(folder):
    """The torch model of a folder."""
    return (apple.load if "openelm" in (folder / "config.json").read_text() else reload)(folder)


def by_peft(base, adapter):
    """PEFT's reading of an adapter, to go on training; what it warns of is an error here, such as a key that it misses."""
    return peft.PeftModel.from_pretrained(read(base), adapter, is_trainable=True).eval()


def imported(kind, folder):
    """A PEFT model of a kind, the adapter that it saved, and jaxft's reading of that."""
    family, changes, settings = KINDS[kind]
    base = make(family, folder / "base", **changes)
    oracle = peft_model(read(base), **settings)
    oracle.save_pretrained(folder)
    return SimpleNamespace(base=base, adapter=folder, oracle=oracle, ours=load(base, adapter=str(folder)))


# Between them every family and every kind of thing that is trained; the others with the slow tests.
QUICK = {
    "gemma2, both, norms", "gemma2, untied, DoRA, head", "qwen2, tied, every bias, DoRA, both", "qwen2, a biased linear",
    "qwen2, tied, both kept tied", "mistral, patterns, rank-stabilised DoRA", "openelm, embedding that is the head, norms",
    "gemma2, untied, DoRA, both", "qwen3, norms", "openelm, patterns, embedding that is the head",
    "qwen2, biases of the pairs, DoRA",
}  # fmt: skip


def slow_but_for_a_few(kinds):
    return [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in kinds]


@pytest.fixture(scope="module", params=slow_but_for_a_few(KINDS))
def theirs(request, tmp_path_factory):
    return imported(request.param, tmp_path_factory.mktemp("theirs"))


def test_an_adapter_made_by_peft_gives_the_same_logits(theirs):
    ours = logits(theirs.ours, IDS)
    assert_same(ours, torch_logits(theirs.oracle, IDS))
    plain = torch_logits(read(theirs.base), IDS)
    assert np.abs(ours - plain).max() > 100 * LOGITS * plain.std()  # it does something


def test_parameters_are_counted_as_peft_counts_them(theirs):
    assert count_parameters(theirs.ours.rows) == theirs.oracle.get_nb_trainable_parameters()


def trained_by_peft(model, value=lambda p: p):
    """Whatever a PEFT model trains, as numpy under its name in the adapter's file."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix(PREFIX).replace(".modules_to_save.default", "").replace(".default", "")
            found[name.replace("magnitude_vector.weight", "magnitude_vector")] = value(parameter).detach().numpy()
    return found


def by_saved_name(rows, arrays):
    """jaxft's trainable arrays under their names in the adapter's file."""
    return dict(pair for row in rows if row.trainable for pair in hub_tensors(row, row.saved, arrays[row.path]))


STEPPED = [
    "gemma2", "gemma2, both, norms", "qwen2, DoRA", "qwen2, tied, every bias, DoRA, both", "qwen2, a biased linear",
    "openelm, embedding that is the head, norms",
]  # fmt: skip


@pytest.fixture(scope="module", params=slow_but_for_a_few(STEPPED))
def stepped(request, tmp_path_factory):
    """An adapter that PEFT made, and what one step of plain gradient descent makes of it here."""
    theirs = imported(request.param, tmp_path_factory.mktemp("stepped"))
    theirs.before = by_saved_name(theirs.ours.rows, theirs.ours.trainable)
    descent = optax.chain(optax.trace(decay=0.0), optax.scale(-0.1))  # the trace's state is the gradient
    theirs.state, theirs.metrics = first_step(theirs.ours, descent, IDS, some_weights(IDS))
    return theirs


def test_gradients_of_everything_trained_equal_pefts(stepped):
    loss = torch_loss(stepped.oracle, IDS, some_weights(IDS))
    loss.backward()
    wanted = trained_by_peft(stepped.oracle, lambda p: p.grad)
    found = by_saved_name(stepped.ours.rows, stepped.state.optimizer[0].trace)
    assert abs(float(stepped.metrics["nll"] / stepped.metrics["weight"]) - loss.item()) <= 5e-5
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.std() > 0
        assert np.abs(found[name] - gradient).max() <= 1e-4 * np.abs(gradient).max(), name


def test_an_adapter_made_by_peft_trains_on_and_stays_of_its_kind(stepped, tmp_path):
    tuned = dataclasses.replace(stepped.ours, trainable=stepped.state.trainable)
    after = by_saved_name(tuned.rows, tuned.trainable)
    assert not any(np.array_equal(value, stepped.before[name]) for name, value in after.items())
    source = find(config.Model(name=str(stepped.base), adapter=str(stepped.adapter)), Lora(dropout=0.0))
    save_adapter(tmp_path, tuned.rows, tuned.trainable, source.plan, source.arch, str(stepped.base))
    again = by_peft(stepped.base, tmp_path)
    wanted = trained_by_peft(again)
    assert after.keys() == trained_by_peft(stepped.oracle).keys() == wanted.keys()
    assert all(np.array_equal(value, wanted[name]) for name, value in after.items())
    was, now = stepped.oracle.peft_config["default"], again.peft_config["default"]
    assert all(getattr(was, key) == getattr(now, key) for key in ("r", "lora_alpha", "use_dora", "use_rslora"))


LORAS = {
    "gemma": ("gemma", {}, Lora(rank=3, alpha=2.5)),
    "gemma2, some layers, tied head": ("gemma2", {}, Lora(targets=r"model\.layers\.[02]\..*", train_modules=(HEAD,))),
    "gemma2, tied embedding": ("gemma2", {}, Lora(targets=("q_proj",), train_modules=(EMBED,))),
    "gemma2, untied, DoRA, both": ("gemma2", UNTIED, Lora(rank=4, dora=True, train_modules=(EMBED, HEAD))),
    "qwen2, every bias": ("qwen2", {}, Lora(targets=("q_proj", "o_proj"), bias="all")),
    "qwen2, biases of the pairs, DoRA": ("qwen2", {}, Lora(targets=("q_proj", "o_proj"), bias="lora_only", dora=True)),
    "qwen2, tied, every bias, DoRA, both": ("qwen2", TIED, Lora(bias="all", dora=True, train_modules=(EMBED, HEAD))),
    "qwen2, a biased linear, every bias": ("qwen2", {}, Lora(targets=("q_proj",), bias="all", train_modules=("k_proj",))),
    "qwen3, norms": ("qwen3", TIED, Lora(train_modules=("k_norm", "model.norm", "layers.1.input_layernorm"))),
    "mistral, patterns, rank-stabilised": ("mistral", {}, Lora(rslora=True, rank_pattern=RANKS, alpha_pattern=ALPHAS)),
    "openelm, rank-stabilised DoRA": ("openelm", {}, Lora(rank=4, rslora=True, dora=True)),
    "openelm, patterns, embedding that is the head": (
        "openelm", {}, Lora(rank_pattern={r"layers\.1\.ffn\.proj_1": 6}, train_modules=("token_embeddings", "attn_norm"))
    ),
    "openelm, untied, both": (
        "openelm", {"share_input_output_layers": False}, Lora(targets=("proj_2",), train_modules=("token_embeddings", HEAD))
    ),
}  # fmt: skip


def stirred(loaded):
    """`loaded` with all that it trains drawn at random, so that each tensor does something."""
    for path, value in loaded.trainable.items():
        draw, start = np.random.default_rng(zlib.crc32(path.encode())), np.asarray(value)
        drawn = draw.normal(0, 0.1, value.shape) if path.endswith(".b") else start * draw.uniform(0.7, 1.3, value.shape)
        loaded.trainable[path] = jax.device_put(drawn.astype(np.float32), value.sharding)
    return loaded


@pytest.fixture(scope="module", params=slow_but_for_a_few(LORAS))
def exported(request, tmp_path_factory):
    """An adapter that jaxft made and saved, and PEFT's reading of it."""
    family, changes, lora = LORAS[request.param]
    folder = tmp_path_factory.mktemp("ours")
    base = make(family, folder / "base", **changes)
    ours, source = stirred(load(base, lora)), find(config.Model(name=str(base)), lora)
    save_adapter(folder, ours.rows, ours.trainable, source.plan, source.arch, str(base))
    return SimpleNamespace(base=base, adapter=folder, oracle=by_peft(base, folder), ours=ours)


def test_an_exported_adapter_gives_the_same_logits_in_peft_and_is_read_back_bit_for_bit(exported):
    assert_same(logits(exported.ours, IDS), torch_logits(exported.oracle, IDS))
    again = load(exported.base, adapter=str(exported.adapter))
    assert all(np.array_equal(value, exported.ours.trainable[path]) for path, value in again.trainable.items())


def test_an_exported_adapter_holds_what_peft_trains_and_nothing_else(exported):
    stored = safetensors.numpy.load_file(exported.adapter / "adapter_model.safetensors")
    wanted = trained_by_peft(exported.oracle)
    assert {name.removeprefix(PREFIX) for name in stored} == wanted.keys()
    assert all(np.array_equal(stored[PREFIX + name], value) for name, value in wanted.items())
    written = json.loads((exported.adapter / "adapter_config.json").read_text())
    assert written.keys() <= peft.LoraConfig.__dataclass_fields__.keys()
    assert count_parameters(exported.ours.rows) == exported.oracle.get_nb_trainable_parameters()


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    return make("qwen2", tmp_path_factory.mktemp("qwen2"))


def test_copies_of_a_bias_that_peft_saves_beside_it_are_read_past(biased, tmp_path):
    """PEFT puts k_proj.modules_to_save.bias and k_proj.original_module.bias beside k_proj.bias, and reads only that."""
    oracle = peft_model(read(biased), **QUERY, modules_to_save=["k_proj"], bias="all")
    oracle.save_pretrained(tmp_path)
    assert_same(logits(load(biased, adapter=str(tmp_path)), IDS), torch_logits(oracle, IDS))


def test_a_fresh_dora_adapter_changes_nothing_and_starts_as_pefts(biased):
    plain, fresh = logits(load(biased), IDS), load(biased, Lora(rank=4, dora=True))
    # The length of W is divided by itself, summed in another order: rounding, where a plain pair's start is bit for bit.
    assert np.abs(logits(fresh, IDS) - plain).max() <= 1e-5 * plain.std()
    wanted = trained_by_peft(peft_model(read(biased), use_dora=True, random_b=False, **EVERY))
    found = {name: value for name, value in by_saved_name(fresh.rows, fresh.trainable).items() if "magnitude" in name}
    assert len(found) == 2 * 7
    assert all(np.allclose(value, wanted[name], rtol=1e-6) for name, value in found.items())


def test_doras_dropout_is_on_the_pair_alone(biased):
    keys = [jax.random.key(1), jax.random.key(2)]
    plain, masked = hidden(load(biased, Lora(dora=True, dropout=0.5)), IDS, None, keys[0])
    assert np.array_equal(plain, masked)  # B is zero, so a mask may change nothing
    one, two = hidden(stirred(load(biased, Lora(dora=True, dropout=0.5))), IDS, *keys)
    assert not np.array_equal(one, two)


def test_three_steps_move_every_magnitude(biased):
    loaded, mesh = load(biased, Lora(rank=4, dora=True)), make_mesh(devices=jax.devices()[:1])
    before = by_saved_name(loaded.rows, loaded.trainable)
    optimizer = optim.optimizer(Optim(learning_rate=1e-3), 3, loaded.rows)
    step, state = make_train_step(loaded, optimizer, mesh), initial_state(loaded, optimizer, mesh)
    for _ in range(3):
        state, _ = step(state, loaded.frozen, batch(IDS, some_weights(IDS)), jax.random.key(0))
    after = by_saved_name(loaded.rows, state.trainable)
    assert sum("magnitude" in name for name in after) == 2 * 7
    assert not any(np.array_equal(value, before[name]) for name, value in after.items())


def test_a_magnitude_a_third_of_a_percent_longer_shows_on_a_bfloat16_base(biased):
    """Bfloat16 has nothing between 1 and 1.0078: a factor rounded to it would lose what most runs train."""
    lora = Lora(rank=4, dora=True)
    fresh, longer = load(biased, lora, dtype="bfloat16"), load(biased, lora, dtype="bfloat16")
    longer.trainable.update({p: v * 1.0035 for p, v in longer.trainable.items() if p.endswith("magnitude")})
    assert not np.array_equal(logits(longer, IDS), logits(fresh, IDS))


def refused(base, message, **model):
    """Asserts that an adapter or a Lora section is refused in one line that holds `message`."""
    lora = model.pop("lora", "base")
    with pytest.raises(UserError) as error:
        find(config.Model(name=str(base), **{k: str(v) for k, v in model.items()}), lora)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in message.split(" & ")), str(error.value)


def test_an_adapter_of_another_vocabulary_is_refused_with_both_shapes(biased, tmp_path):
    peft_model(tiny("qwen2", vocab_size=101), **QUERY, modules_to_save=[EMBED, HEAD]).save_pretrained(tmp_path)
    refused(biased, "lm_head.weight: file (101, 32), model (97, 32) & model.embed_tokens.weight", adapter=tmp_path)


LACKING = {
    "layers.1.self_attn.v_proj.lora_magnitude_vector": EVERY | DORA,
    "lm_head.weight": QUERY | {"modules_to_save": [HEAD]},
}


@pytest.mark.parametrize(("missing", "settings"), LACKING.items(), ids=LACKING)
def test_an_adapter_that_lacks_a_tensor_is_refused(missing, settings, biased, tmp_path):
    peft_model(read(biased), **settings).save_pretrained(tmp_path)
    copy(tmp_path, tmp_path, lambda stored: {name: value for name, value in stored.items() if missing not in name})
    refused(biased, missing, adapter=tmp_path)


def test_modules_in_full_that_the_config_does_not_announce_are_refused(biased, tmp_path):
    peft_model(read(biased), **QUERY, modules_to_save=[HEAD]).save_pretrained(tmp_path)
    refused(biased, "no place & lm_head.weight", adapter=copy(tmp_path, tmp_path, modules_to_save=None))


IDLE = [
    (Lora(train_modules=("lm_haed",)), "lora.train_modules & 'lm_haed' & lm_head & embed_tokens"),
    (Lora(train_modules=("q_proj",)), "lora.train_modules & lora.targets & q_proj"),
    (Lora(targets=("q_proj",), rank_pattern={"v_proj": 4}), "lora.rank_pattern & 'v_proj'"),
    (Lora(rank_pattern={"(q_proj": 4}), "lora.rank_pattern & (q_proj & not a regular expression"),
    (Lora(alpha_pattern={"*": 4.0}), "lora.alpha_pattern & * & not a regular expression"),
]


@pytest.mark.parametrize(("lora", "message"), IDLE, ids=[message for _, message in IDLE])
def test_a_lora_section_that_selects_nothing_or_twice_is_refused(lora, message, biased):
    refused(biased, message, lora=lora)


def test_a_tied_openelm_has_no_head_to_train(tmp_path):
    refused(make("openelm", tmp_path), "'lm_head' & token_embeddings", lora=Lora(train_modules=(HEAD,)))


VERDICTS = [
    ("qwen2", Lora(rslora=True), "vLLM-ready: yes"),
    ("qwen2", Lora(rank=32), "no, & --max-lora-rank 32"),
    ("qwen2", Lora(rank=24), "no, & --max-lora-rank 32"),  # it takes 1, 8, 16, 32, 64, 128, 256, 320 and 512
    ("qwen2", Lora(dora=True), "no, & DoRA"),
    ("qwen2", Lora(bias="all"), "no, & biases"),
    ("qwen2", Lora(train_modules=(HEAD,)), "no, & modules_to_save"),
    ("qwen2", Lora(rank_pattern={"q_proj": 4}), "no, & by module"),
    ("qwen2", Lora(rank=64, dora=True, bias="all"), "no, & DoRA & biases & --max-lora-rank 64"),
    ("openelm", Lora(), "no, & openelm"),
]


@pytest.mark.parametrize(("family", "lora", "said"), VERDICTS)
def test_whether_vllm_can_serve_an_adapter_is_said_with_the_reasons(family, lora, said, biased, tmp_path):
    arch = read_arch(biased if family == "qwen2" else make(family, tmp_path))
    verdict = vllm_verdict(plan_of(lora, arch), arch)
    assert all(part in verdict for part in said.split(" & ")), verdict


def test_the_banner_says_ranks_modules_and_biases(biased):
    arch = read_arch(biased)
    lora = Lora(targets=("q_proj", "v_proj"), rank_pattern={"v_proj": 4}, bias="all", train_modules=(HEAD, EMBED))
    said = described(plan_of(lora, arch))
    wanted = ("LoRA r=8 α=16 on q_proj×2", "r=4 α=16 on v_proj×2", "in full lm_head, model.embed_tokens", "6 biases")
    assert all(part in said for part in wanted), said
    assert "DoRA" in described(plan_of(Lora(dora=True), arch))
