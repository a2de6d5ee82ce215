"""The decoder computes what transformers computes on torch, for every shape of Llama checkpoint, in fp32.

Tolerances: both sides round in fp32 and sum in another order, about 4e-6 of the logits' standard deviation here; 1e-4 is
far from that and far from any real difference (the smallest one planted below is 1e-2).
"""

import json

import numpy as np
import pytest
import torch
from checkpoints import (
    LOGITS,
    assert_equals_torch,
    assert_same,
    edit_config,
    llama,
    outputs,
    reload,
    save,
    tokens,
    torch_logits,
)

from jaxft.errors import UserError
from jaxft.models.attention import MIN_BLOCK
from jaxft.models.families import arch_from_config
from jaxft.weights.hub import read_arch
from jaxft.weights.model import load_decoder

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
CASES = {
    "grouped queries": {},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads as heads": {"num_key_value_heads": 4},
    "llama3 rope past the original positions": {"rope_parameters": LLAMA3, "head_dim": 16},
    "linear rope": {"rope_parameters": LINEAR},
    "tied head": {"tie_word_embeddings": True},
    "head_dim is not D / N": {"head_dim": 20, "num_key_value_heads": 1},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "one layer, another epsilon": {"num_hidden_layers": 1, "rms_norm_eps": 0.1},
}


def old_dialect(folder):
    """Rewrites config.json as the Hub's published Llama files have it."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope["rope_type"]
    scaling = None if kind == "default" else rope
    if kind == "linear":  # as it was before 2024
        rope["type"] = rope.pop("rope_type")
    return edit_config(
        folder, "rope_parameters", "dtype", rope_theta=theta, rope_scaling=scaling, torch_dtype="float32"
    )


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_and_loss_equal_transformers(changes, tmp_path):
    model = llama(**changes)
    assert_equals_torch(save(model, tmp_path), model, tokens(2, 2 * MIN_BLOCK + 2))  # three blocks of queries


@pytest.mark.parametrize("rope", [None, LLAMA3, LINEAR], ids=["default", "llama3", "linear"])
def test_both_dialects_of_config_mean_the_same(rope, tmp_path):
    folder = save(llama(rope_parameters=rope), tmp_path)
    new = read_arch(folder)
    assert read_arch(old_dialect(folder)) == new
    assert (new.rope.llama3 is not None) == (rope is LLAMA3) and (new.rope.linear == 3.0) == (rope is LINEAR)


def test_a_config_with_rope_in_both_dialects_is_read_like_transformers(tmp_path):
    folder = save(llama(rope_parameters=LLAMA3), tmp_path)
    new = read_arch(folder)
    assert read_arch(edit_config(folder, rope_theta=10000.0)) == new


def test_an_old_config_with_few_fields_gets_transformers_defaults(tmp_path):
    model = llama(rms_norm_eps=1e-6, num_key_value_heads=4)
    folder = old_dialect(save(model, tmp_path))
    removed = (
        "num_key_value_heads head_dim rope_theta rope_scaling attention_bias mlp_bias tie_word_embeddings rms_norm_eps"
    )
    edit_config(folder, *removed.split())
    assert_equals_torch(folder, model, tokens(1, 16))


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR], ids=["llama3", "linear"])
def test_the_tolerance_would_notice_a_missing_rope_scaling(rope, tmp_path):
    model, ids = llama(rope_parameters=rope, head_dim=16), tokens(1, 64)
    folder = save(model, tmp_path)
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": rope["rope_theta"]})
    assert np.abs(outputs(folder, ids)[0] - torch_logits(model, ids)).max() > 100 * LOGITS


def test_sharded_files_equal_one_file(tmp_path):
    model, ids = llama(), tokens(1, 16)
    folder = save(model, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert_equals_torch(folder, model, ids)


def test_bfloat16_files_compute_in_float32_when_asked(tmp_path):
    folder, ids = save(llama().bfloat16(), tmp_path), tokens(1, 32)
    assert_equals_torch(folder, reload(folder, torch.float32), ids)  # widening bfloat16 is exact


def test_bfloat16_computes_like_transformers_in_bfloat16(tmp_path):
    folder, ids = save(llama().bfloat16(), tmp_path), tokens(1, 32)
    ours = np.asarray(load_decoder(str(folder), "auto")[0](ids))
    theirs, exact = (torch_logits(reload(folder, dtype), ids) for dtype in (torch.bfloat16, torch.float32))
    # bfloat16 has 8 bits; both sides must be about as far from fp32, so that neither has lost anything more.
    assert np.std(ours - exact) <= 1.5 * np.std(theirs - exact)


def test_packed_rows_equal_separate_rows(tmp_path):
    folder = save(llama(rope_parameters=LLAMA3), tmp_path)
    model, _ = load_decoder(str(folder))
    first, second, third = tokens(1, 11, 1), tokens(1, 6, 2), tokens(1, 9, 3)
    packed = np.concatenate([first, second, third, np.zeros((1, 6), np.int32)], axis=1)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in (11, 6, 9, 6)])[None]
    segments = np.repeat(np.array([1, 2, 3, 0], np.int32), (11, 6, 9, 6))[None]
    together = np.asarray(model(packed, positions, segments))
    for row, start in ((first, 0), (second, 11), (third, 17)):
        assert_same(
            together[:, start : start + row.shape[1]], np.asarray(model(row)), 1e-5
        )  # the same kernels, other shapes


def test_right_padding_changes_nothing(tmp_path):
    model, _ = load_decoder(str(save(llama(), tmp_path)))
    row = tokens(1, 20)
    padded = np.pad(row, ((0, 0), (0, 12)))
    segments = (np.arange(32, dtype=np.int32) < 20).astype(np.int32)[None]
    assert_same(np.asarray(model(padded, None, segments))[:, :20], np.asarray(model(row)), 1e-5)
    assert_same(np.asarray(model(padded))[:, :20], np.asarray(model(row)), 1e-5)  # causal: no mask is needed


def test_left_padding_changes_nothing(tmp_path):
    model, _ = load_decoder(str(save(llama(), tmp_path)))
    row = tokens(1, 20)
    positions = np.maximum(np.arange(26, dtype=np.int32) - 6, 0)[None]
    segments = (np.arange(26, dtype=np.int32) >= 6).astype(np.int32)[None]
    padded = np.pad(row, ((0, 0), (6, 0)))
    assert_same(np.asarray(model(padded, positions, segments))[:, 6:], np.asarray(model(row)), 1e-5)


def test_stories260k_tells_its_story(shared):
    from transformers import AutoTokenizer

    from jaxft.evals.decode import Generator

    folder = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    story = ", there was a little girl named Lily. She loved to play outside in the park."
    ids = tokenizer("Once upon a time" + story + " One day, she saw a big, red ball.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    _, loss = outputs(folder, np.array([ids], np.int32))
    assert abs(loss - 0.3241) <= 0.0002
    prompt = tokenizer("Once upon a time")["input_ids"]
    generator = Generator(load_decoder(str(folder))[0], [tokenizer.eos_token_id])
    answer = generator([prompt], max_new_tokens=40)[0]
    assert tokenizer.decode(prompt + answer, skip_special_tokens=True).startswith("Once upon a time" + story)


SMALL = dict(
    model_type="llama", hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=11, num_hidden_layers=1
)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"hidden_act": "relu6"}, ["hidden_act", "'relu6'", "'silu'"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type", "'yarn'", "'llama3'"]),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["rope_type", "'longrope'"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor", "None"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, ["beta_fast"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "much"}}, ["rope_theta", "'much'"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"logit_scale": 0.25}, ["logit_scale", "0.25"]),
        ({"model_type": "mamba"}, ["model_type", "'mamba'", "llama"]),
        ({"model_type": None}, ["model_type", "None"]),
        ({"model_type": ["llama"]}, ["model_type", "['llama']"]),
        ({"hidden_size": "8"}, ["hidden_size", "'8'"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, ["num_key_value_heads", "2", "3"]),
        ({"num_attention_heads": 3}, ["hidden_size", "8", "num_attention_heads", "3"]),
        ({"head_dim": 3}, ["head_dim", "3"]),
        ({"vocab_size": True}, ["vocab_size", "True"]),
        ({"initializer_range": "wide"}, ["initializer_range", "'wide'"]),
        ({"hidden_act": ["silu"]}, ["hidden_act", "['silu']"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_understood_is_refused_by_field_and_value(change, shown):
    with pytest.raises(UserError) as error:
        arch_from_config({**SMALL, **change}, "there/config.json")
    assert str(error.value).startswith("there/config.json")
    assert all(part in str(error.value) for part in shown), str(error.value)


def test_a_quantised_checkpoint_is_refused(tmp_path):
    folder = edit_config(save(llama(), tmp_path), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"config.json: quantization_config: .*use the original"):
        load_decoder(str(folder))


def test_extra_fields_that_change_nothing_are_accepted():
    plain = arch_from_config(SMALL)
    extra = {
        "_name_or_path": "x",
        "use_cache": False,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "quantization_config": None,
    }
    assert arch_from_config({**SMALL, **extra}) == plain
