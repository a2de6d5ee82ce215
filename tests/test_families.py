"""Every family besides Llama computes what transformers computes on torch, in fp32, and OpenELM what its oracle does.

Tolerances as in test_llama.py. The checkpoints (`checkpoints.tiny`) are such that a family's own facts show: half of Gemma
2's attention scores and a third of its logits lie beyond their caps, and windows are 8 tokens wide in rows of 130.
"""

import json

import numpy as np
import openelm as apple
import pytest
import torch
import transformers
from checkpoints import (
    GLOBAL,
    LOCAL,
    LOGITS,
    SIZES,
    assert_equals_torch,
    assert_same,
    edit_config,
    load,
    reload,
    save,
    tiny,
    tokens,
    torch_logits,
)
from test_generation import PROMPTS, torch_answers

from jaxft.errors import UserError
from jaxft.evals.decode import Generator
from jaxft.models.attention import MIN_BLOCK
from jaxft.models.families import FAMILIES, arch_from_config
from jaxft.weights.hub import read_arch
from jaxft.weights.model import load_decoder

LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
UPPER = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
CASES = {
    "gemma with one kv head": ("gemma", {}),
    "gemma untied, as many kv heads as heads, biases": (
        "gemma", {"num_key_value_heads": 4, "tie_word_embeddings": False, "attention_bias": True}
    ),
    "gemma2 with caps, and a window on layers 0 and 2 of 3": ("gemma2", {}),
    "gemma2 of five layers, untied": ("gemma2", {"num_hidden_layers": 5, "tie_word_embeddings": False}),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2 with only the cap on scores": ("gemma2", {"final_logit_softcapping": None}),
    "gemma2 by exact GELU": ("gemma2", {"hidden_activation": "gelu"}),
    "gemma2 with windows on the layers that it names": ("gemma2", {"layer_types": [GLOBAL, LOCAL, LOCAL]}),
    "qwen2 with biases on q, k, v": ("qwen2", {}),
    "qwen2 tied, linear rope": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "qwen2 with windows on the upper layers": ("qwen2", UPPER),
    "qwen2 with windows on every layer": ("qwen2", UPPER | {"max_window_layers": 0}),
    "qwen2 with a window that it does not use": ("qwen2", UPPER | {"use_sliding_window": False}),
    "qwen2 with windows on the layers that it names": ("qwen2", UPPER | {"layer_types": [LOCAL, GLOBAL, GLOBAL, LOCAL]}),
    "qwen3 with norms on q and k": ("qwen3", {}),
    "qwen3 with biases on q, k, v, o, tied, one kv head": (
        "qwen3", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1}
    ),
    "qwen3 with windows on the upper layers": ("qwen3", UPPER),
    "mistral with a window": ("mistral", {}),
    "mistral without a window, head_dim D / N": ("mistral", {"sliding_window": None, "head_dim": None}),
    "openelm with layers of different widths": ("openelm", {}),
    "openelm untied, without norms on q and k": (
        "openelm", {"share_input_output_layers": False, "normalize_qk_projections": False}
    ),
}  # fmt: skip


def make(family, folder, **changes):
    """A tiny model of `family`, and the folder where it is saved."""
    if family == "openelm":
        model = apple.openelm(**changes)
        return model, apple.save(model, folder)
    model = tiny(family, **changes)
    return model, save(model, folder)


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES.keys())
def test_logits_and_loss_equal_transformers(family, changes, tmp_path):
    model, folder = make(family, tmp_path, **changes)
    assert_equals_torch(folder, model, tokens(2, 2 * MIN_BLOCK + 2))  # three blocks of queries


def test_every_family_has_cases():
    assert {family for family, _ in CASES.values()} | {"llama"} == set(FAMILIES)


def test_half_of_the_scores_and_a_third_of_the_logits_lie_beyond_their_caps(monkeypatch):
    from transformers.models.gemma2 import modeling_gemma2

    shares = []

    def eager(module, query, key, value, mask, scaling, softcap, **ignored):
        scores = query @ modeling_gemma2.repeat_kv(key, module.num_key_value_groups).mT * scaling
        shares.append(float((scores.abs() > softcap)[(mask == 0).expand_as(scores)].float().mean()))
        return plain(module, query, key, value, mask, scaling=scaling, softcap=softcap, **ignored)

    plain = modeling_gemma2.eager_attention_forward
    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", eager)
    uncapped = torch_logits(tiny("gemma2", final_logit_softcapping=None), tokens(1, 64))
    assert len(shares) == 3 and min(shares) > 0.4 and (np.abs(uncapped) > 1.0).mean() > 0.25


def _each(end, change):
    """Changes every parameter whose name ends so."""
    return lambda model: [change(tensor) for name, tensor in model.named_parameters() if name.endswith(end)]


def _layers(change):
    return lambda model: [change(layer) for layer in model.model.layers]


def _exact(layer):
    layer.mlp.act_fn = torch.nn.GELU()


def _bare(layer):
    layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()


def _swapped(layer):
    layer.post_attention_layernorm, layer.pre_feedforward_layernorm = (
        layer.pre_feedforward_layernorm, layer.post_attention_layernorm,
    )  # fmt: skip


PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
MISTAKES = {
    "gemma2 with no cap on scores": ("gemma2", {}, {"attn_logit_softcapping": None}),
    "gemma2 with no cap on logits": ("gemma2", {}, {"final_logit_softcapping": None}),
    "gemma2 with no window": ("gemma2", {}, {"sliding_window": 256}),
    "gemma2 with a window one too narrow": ("gemma2", {}, {"sliding_window": 7}),
    "gemma2 with a global layer first": ("gemma2", {}, {"layer_types": [GLOBAL, LOCAL, GLOBAL]}),
    "gemma2 with queries scaled by head_dim": ("gemma2", {}, {"query_pre_attn_scalar": 12}),
    "gemma2 with exact GELU": ("gemma2", {}, {"hidden_activation": "gelu"}),
    "gemma2 with norms after and before swapped": ("gemma2", {}, _layers(_swapped)),
    "gemma2 with w for 1 + w": ("gemma2", {}, _each("norm.weight", lambda w: w.sub_(1.0))),
    "gemma2 with unscaled embeddings": ("gemma2", {}, lambda model: model.model.embed_tokens.embed_scale.fill_(1.0)),
    "gemma with w for 1 + w": ("gemma", {}, _each("norm.weight", lambda w: w.sub_(1.0))),
    "gemma with unscaled embeddings": ("gemma", {}, lambda model: model.model.embed_tokens.embed_scale.fill_(1.0)),
    "gemma with exact GELU": ("gemma", {}, _layers(_exact)),
    "qwen2 with no bias on q": ("qwen2", {}, _each("q_proj.bias", torch.Tensor.zero_)),
    "qwen2 with no bias on k": ("qwen2", {}, _each("k_proj.bias", torch.Tensor.zero_)),
    "qwen2 with no bias on v": ("qwen2", {}, _each("v_proj.bias", torch.Tensor.zero_)),
    "qwen2 with another theta": ("qwen2", {}, PLAIN_ROPE),
    "qwen2 with windows from the wrong layer on": ("qwen2", UPPER, {"max_window_layers": 3}),
    "qwen2 with windows below": ("qwen2", UPPER, {"layer_types": [LOCAL, LOCAL, GLOBAL, GLOBAL]}),
    "qwen3 with no norms on q and k": ("qwen3", {}, _layers(_bare)),
    "qwen3 with no bias on o": ("qwen3", {"attention_bias": True}, _each("o_proj.bias", torch.Tensor.zero_)),
    "mistral with no window": ("mistral", {}, {"sliding_window": None}),
}


@pytest.mark.parametrize(("family", "changes", "mistake"), MISTAKES.values(), ids=MISTAKES.keys())
def test_the_tolerance_would_notice(family, changes, mistake):
    ids = tokens(1, 48)
    right = torch_logits(tiny(family, **changes), ids)
    wrong = tiny(family, **changes | (mistake if isinstance(mistake, dict) else {}))
    if callable(mistake):
        with torch.no_grad():
            mistake(wrong)
    assert np.abs(torch_logits(wrong, ids) - right).max() > 20 * LOGITS * right.std()


HUB = dict(
    attention_dropout=0.0, initializer_range=0.02, use_cache=True, torch_dtype="bfloat16", transformers_version="4.44.0"
)
GEMMA = HUB | dict(
    attention_bias=False, bos_token_id=2, eos_token_id=1, pad_token_id=0, head_dim=256, max_position_embeddings=8192,
    rms_norm_eps=1e-06, rope_theta=10000.0, vocab_size=256000,
)  # fmt: skip
GEMMA2B = GEMMA | dict(
    model_type="gemma", hidden_act="gelu", hidden_size=2048, intermediate_size=16384, num_attention_heads=8,
    num_hidden_layers=18, num_key_value_heads=1, rope_scaling=None,
)  # fmt: skip
GEMMA2 = GEMMA | dict(
    model_type="gemma2", attn_logit_softcapping=50.0, cache_implementation="hybrid", final_logit_softcapping=30.0,
    hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, sliding_window=4096,
    sliding_window_size=4096, hidden_size=3584, intermediate_size=14336, num_attention_heads=16, num_hidden_layers=42,
    num_key_value_heads=8,
)  # fmt: skip
QWEN2 = HUB | dict(
    model_type="qwen2", bos_token_id=151643, eos_token_id=151643, hidden_act="silu", hidden_size=1536, vocab_size=151936,
    intermediate_size=8960, max_position_embeddings=131072, max_window_layers=28, num_attention_heads=12, rms_norm_eps=1e-06,
    num_hidden_layers=28, num_key_value_heads=2, rope_theta=1000000.0, sliding_window=131072, tie_word_embeddings=True,
    use_sliding_window=False,
)  # fmt: skip
QWEN3 = HUB | dict(
    model_type="qwen3", attention_bias=False, bos_token_id=151643, eos_token_id=151645, head_dim=128, hidden_act="silu",
    hidden_size=1024, intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16,
    num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000,
    sliding_window=None, tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
MISTRAL = dict(
    model_type="mistral", bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=4096, initializer_range=0.02,
    intermediate_size=14336, max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32, use_cache=True,
    num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False,
    torch_dtype="bfloat16", transformers_version="4.34.0.dev0", vocab_size=32000,
)  # fmt: skip
PUBLISHED = {
    "google/gemma-2b": GEMMA2B,
    "google/gemma-2b as saved by transformers 4.40": GEMMA2B | {"hidden_activation": None},
    "google/gemma-2b as saved by transformers 4.45": GEMMA2B | {"hidden_activation": "gelu_pytorch_tanh"},
    "google/gemma-2b by its later name": GEMMA2B
    | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    "google/gemma-2-9b": GEMMA2,
    "google/gemma-2-27b": GEMMA2
    | dict(query_pre_attn_scalar=144, head_dim=128, num_attention_heads=32, num_key_value_heads=16),
    "Qwen/Qwen2-1.5B": QWEN2,
    "Qwen/Qwen2.5-1.5B": QWEN2 | {"use_mrope": False},
    "Qwen2 with a window": QWEN2 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21},
    "Qwen2 with a window of null": QWEN2
    | {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 21},
    "Qwen/Qwen3-0.6B": QWEN3,
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "mistralai/Mistral-7B-v0.3": MISTRAL | {"sliding_window": None, "rope_theta": 1000000.0, "vocab_size": 32768},
}


def write(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_means_what_transformers_5_writes_of_it(name, tmp_path):
    old, new, between = write(tmp_path / "old", PUBLISHED[name]), tmp_path / "new", tmp_path / "between"
    config = transformers.AutoConfig.from_pretrained(old)
    config.save_pretrained(new)
    rewritten = json.loads((new / "config.json").read_text())
    assert rewritten["rope_parameters"]["rope_theta"] == PUBLISHED[name]["rope_theta"] and "dtype" in rewritten
    assert read_arch(old) == read_arch(new)
    kinds = getattr(config, "layer_types", None) or [LOCAL] * config.num_hidden_layers
    windows = [getattr(config, "sliding_window", None) if kind == LOCAL else None for kind in kinds]
    assert [layer.window for layer in read_arch(old).layers] == windows
    edit_config(write(between, rewritten), "rope_parameters", "dtype", rope_theta=PUBLISHED[name]["rope_theta"])
    assert read_arch(between) == read_arch(new)  # transformers 4.56: layer_types already, rope as before


@pytest.mark.parametrize("family", ["gemma", "gemma2", "qwen2", "qwen3", "mistral"])
def test_absent_fields_get_transformers_defaults(family, tmp_path):
    required = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    required |= {"num_attention_heads": 32, "hidden_size": 256, "num_hidden_layers": 30, "model_type": family}
    required |= {"use_sliding_window": True} if family.startswith("qwen") else {}
    transformers.AutoConfig.for_model(**required).save_pretrained(tmp_path / "full")
    assert read_arch(write(tmp_path / "few", required)) == read_arch(tmp_path / "full")


def test_gemmas_old_name_of_its_activation_means_the_tanh_form(tmp_path):
    model, folder = make("gemma", tmp_path)
    edit_config(folder, hidden_act="gelu")
    assert_equals_torch(folder, model, tokens(1, 32))
    assert_same(torch_logits(reload(folder), tokens(1, 32)), torch_logits(model, tokens(1, 32)), 0)


@pytest.fixture(scope="module", params=["gemma2", "qwen2", "mistral", "openelm"])
def both(request, tmp_path_factory):
    """A model, with windows of 8 where its family has them, in torch and in jaxft."""
    changes = UPPER if request.param == "qwen2" else {}
    model, folder = make(request.param, tmp_path_factory.mktemp(request.param), **changes)
    return model, load_decoder(str(folder))[0]


def rows(*lengths):
    return [tokens(1, length, seed) for seed, length in enumerate(lengths)]


def test_packed_rows_equal_separate_rows(both):
    model, decoder = both
    lengths = (50, 5, 60, 13)
    ends = np.cumsum(lengths)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    segments = np.repeat(np.array([1, 2, 3, 0], np.int32), lengths)[None]
    packed = np.asarray(decoder(np.concatenate(rows(*lengths), axis=1), positions, segments))
    for row, end in zip(rows(*lengths)[:3], ends):
        assert_same(packed[:, end - row.shape[1] : end], torch_logits(model, row))


def test_padding_on_the_right_changes_nothing(both):
    model, decoder = both
    (row,) = rows(90)
    padded, segments = np.pad(row, ((0, 0), (0, 38))), (np.arange(128, dtype=np.int32) < 90).astype(np.int32)[None]
    assert_same(np.asarray(decoder(padded, None, segments))[:, :90], torch_logits(model, row))
    assert_same(np.asarray(decoder(padded))[:, :90], torch_logits(model, row))


def test_padding_on_the_left_changes_nothing(both):
    model, decoder = both
    (row,) = rows(90)
    positions = np.maximum(np.arange(128, dtype=np.int32) - 38, 0)[None]
    segments = (np.arange(128, dtype=np.int32) >= 38).astype(np.int32)[None]
    found = decoder(np.pad(row, ((0, 0), (38, 0))), positions, segments)
    assert_same(np.asarray(found)[:, 38:], torch_logits(model, row))


@pytest.mark.parametrize("family", ["gemma2", "qwen2", "qwen3"])
def test_bfloat16_shards_compute_in_float32_when_asked_and_like_transformers_when_not(family, tmp_path):
    folder, ids = save(tiny(family).bfloat16(), tmp_path, max_shard_size="10KB"), tokens(1, 64)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert_equals_torch(folder, reload(folder), ids)
    ours = np.asarray(load_decoder(str(folder), "auto")[0](ids))
    theirs, exact = (torch_logits(reload(folder, dtype), ids) for dtype in (torch.bfloat16, torch.float32))
    assert np.std(ours - exact) <= 1.5 * np.std(theirs - exact)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_the_scale_of_embeddings_is_rounded_to_the_weights_dtype(family, tmp_path):
    # sqrt(40) is 0.2 % from bfloat16's nearest; an epsilon this large makes the logits proportional to the scale.
    model = tiny(family, hidden_size=40, rms_norm_eps=1e4, final_logit_softcapping=None).bfloat16()
    folder, ids = save(model, tmp_path), tokens(2, 64)
    ours, theirs = np.asarray(load_decoder(str(folder), "auto")[0](ids)), torch_logits(model, ids)
    assert abs((ours * theirs).sum() / (theirs * theirs).sum() - 1) < 2e-4


UNTIED = {"tie_word_embeddings": False}  # tied ones repeat themselves
GENERATING = {
    "gemma": UNTIED, "gemma2": UNTIED, "qwen2": UPPER | {"seed": 1}, "qwen3": {}, "mistral": {}, "openelm": {}
}  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), GENERATING.items(), ids=GENERATING.keys())
def test_greedy_answers_equal_transformers_beyond_the_window(family, changes, tmp_path):
    model, folder = make(family, tmp_path, **changes)
    prompts, new = [PROMPTS[i] for i in (0, 1, 2, 5, 6)], 12
    if family == "openelm":
        wanted = [apple.greedy(model, [prompt], new)[0].tolist() for prompt in prompts]
    else:
        wanted = torch_answers(model, prompts, new)
    assert Generator(load(folder).decoder(), [])(prompts, max_new_tokens=new) == wanted
    assert len({token for answer in wanted for token in answer}) > 15  # a model that repeats itself proves little


SMALL = dict(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, vocab_size=11)
REFUSED = [
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma2", {"layer_types": [LOCAL, "chunked_attention"]}, "layer_types 'chunked_attention'"),
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("gemma2", {"layer_types": [LOCAL]}, "layer_types 1 num_hidden_layers 2"),
    ("gemma2", {"layer_types": LOCAL}, "layer_types 'sliding_attention'"),
    ("gemma2", {"layer_types": [[], LOCAL]}, "layer_types []"),
    ("gemma2", {"attn_logit_softcapping": -50.0}, "attn_logit_softcapping -50.0"),
    ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping 0"),
    ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping '30'"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0"),
    ("gemma2", {"sliding_window": -8}, "sliding_window -8"),
    ("gemma2", {"sliding_window_size": 8}, "sliding_window_size 8"),
    ("gemma2", {"hidden_activation": "relu6"}, "hidden_activation 'relu6'"),
    ("gemma", {"hidden_activation": "relu6"}, "hidden_activation 'relu6'"),
    ("gemma", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
    ("gemma", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    ("gemma2", {"head_dim": 3}, "head_dim 3"),
    ("qwen2", {"layer_types": [GLOBAL, "linear_attention"]}, "layer_types 'linear_attention'"),
    ("qwen2", {"layer_types": [GLOBAL] * 3}, "layer_types 3 num_hidden_layers 2"),
    ("qwen2", {"layer_types": [LOCAL, GLOBAL]}, "layer_types"),
    ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window 'yes'"),
    ("qwen2", {"max_window_layers": -1}, "max_window_layers -1"),
    ("qwen2", {"use_mrope": True}, "use_mrope True"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    ("qwen3", {"num_experts": 4}, "num_experts 4"),
    ("qwen3", {"attention_bias": "all"}, "attention_bias 'all'"),
    ("mistral", {"sliding_window": 0}, "sliding_window 0"),
    ("mistral", {"attention_bias": True}, "attention_bias True"),
    ("mistral", {"layer_types": [LOCAL, GLOBAL]}, "layer_types"),
    ("mistral", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
]


@pytest.mark.parametrize(("family", "change", "shown"), REFUSED, ids=[f"{f} {s}" for f, _, s in REFUSED])
def test_a_value_that_is_not_understood_is_refused_by_field_and_value(family, change, shown):
    with pytest.raises(UserError) as error:
        arch_from_config({"model_type": family, "num_hidden_layers": 2, **SMALL, **change}, "there/config.json")
    assert str(error.value).startswith("there/config.json")
    assert all(part in str(error.value) for part in shown.split()), str(error.value)
