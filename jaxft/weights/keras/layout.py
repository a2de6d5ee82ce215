"""Keras' config.json to the Hub's, and where a preset's file keeps each of the Hub's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.errors import UserError
from jaxft.models.families.fields import Fields
from jaxft.weights.hub import read_json

PREFIX = "keras:"
FLOATS = ("float32", "float16", "bfloat16", "float64", "mixed_bfloat16", "mixed_float16")
# What training in Keras would do besides, and names; none of it changes what the model computes.
NO_PART = ("name", "trainable", "dtype", "dropout")

# Variable in a layer of the file -> the Hub's tensor, the variable's axes, and the Hub's axes out of them, where a space
# parts two dimensions: N heads, K kv heads, H head dim, D model, F ffn, V vocab.
Names = Mapping[str, tuple[str, str, str]]
EMBEDDING: Names = {"reversible_embedding/vars/0": ("model.embed_tokens.weight", "VD", "V D")}
HEAD: Names = {"reversible_embedding/vars/1": ("lm_head.weight", "DV", "V D")}
GEMMA: Names = {
    "pre_attention_norm/vars/0": ("input_layernorm.weight", "D", "D"),
    "attention/query_dense/vars/0": ("self_attn.q_proj.weight", "NDH", "NH D"),
    "attention/key_dense/vars/0": ("self_attn.k_proj.weight", "KDH", "KH D"),
    "attention/value_dense/vars/0": ("self_attn.v_proj.weight", "KDH", "KH D"),
    "attention/output_dense/vars/0": ("self_attn.o_proj.weight", "NHD", "D NH"),
    "gating_ffw/vars/0": ("mlp.gate_proj.weight", "DF", "F D"),
    "gating_ffw_2/vars/0": ("mlp.up_proj.weight", "DF", "F D"),
    "ffw_linear/vars/0": ("mlp.down_proj.weight", "FD", "D F"),
}
GEMMA1_NORMS: Names = {"pre_ffw_norm/vars/0": ("post_attention_layernorm.weight", "D", "D")}
GEMMA2_NORMS: Names = {
    "post_attention_norm/vars/0": ("post_attention_layernorm.weight", "D", "D"),
    "pre_ffw_norm/vars/0": ("pre_feedforward_layernorm.weight", "D", "D"),
    "post_ffw_norm/vars/0": ("post_feedforward_layernorm.weight", "D", "D"),
}
LLAMA: Names = {
    "_self_attention_layernorm/vars/0": ("input_layernorm.weight", "D", "D"),
    "_self_attention_layer/_query_dense/vars/0": ("self_attn.q_proj.weight", "DNH", "NH D"),
    "_self_attention_layer/_key_dense/vars/0": ("self_attn.k_proj.weight", "DKH", "KH D"),
    "_self_attention_layer/_value_dense/vars/0": ("self_attn.v_proj.weight", "DKH", "KH D"),
    "_self_attention_layer/_output_dense/vars/0": ("self_attn.o_proj.weight", "NHD", "D NH"),
    "_feedforward_layernorm/vars/0": ("post_attention_layernorm.weight", "D", "D"),
    "_feedforward_gate_dense/vars/0": ("mlp.gate_proj.weight", "DF", "F D"),
    "_feedforward_intermediate_dense/vars/0": ("mlp.up_proj.weight", "DF", "F D"),
    "_feedforward_output_dense/vars/0": ("mlp.down_proj.weight", "FD", "D F"),
}
QWEN_BIASES: Names = {
    "_self_attention_layer/_query_dense/vars/1": ("self_attn.q_proj.bias", "NH", "NH"),
    "_self_attention_layer/_key_dense/vars/1": ("self_attn.k_proj.bias", "KH", "KH"),
    "_self_attention_layer/_value_dense/vars/1": ("self_attn.v_proj.bias", "KH", "KH"),
}


@dataclass(frozen=True)
class Layout:
    """An architecture: `config` in the Hub's terms, and where the file keeps layers and norms."""

    config: dict[str, Any]
    block: str
    norm: str
    names: Names
    tied: bool | None = None  # None: Keras does not write it down, and the variables tell


def read_layout(file: Path) -> Layout:
    """The architecture in a preset's config.json. Raises UserError for one that cannot be expressed."""
    config = read_json(file, "a Keras preset")
    kind, fields = config.get("class_name"), config.get("config")
    if kind is None or not isinstance(fields, dict):
        raise UserError(
            f"{file}: no class_name and config in it, so not a Keras preset; name other models without {PREFIX}"
        )
    if kind not in ARCHITECTURES:
        raise UserError(f"{file}: class_name {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    policy = fields.get("dtype")
    if isinstance(policy, dict):
        policy = policy.get("config", {}).get("name") or policy.get("class_name")
    if policy is not None and policy not in FLOATS:
        raise UserError(f"{file}: dtype {policy!r}: quantised presets are not supported; use the original one")
    reader = Fields({name: value for name, value in fields.items() if name not in NO_PART})
    try:
        layout = ARCHITECTURES[kind](reader)
        reader.finish()
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return layout


def _shared(fields: Fields) -> dict[str, Any]:
    return {
        "vocab_size": fields.take("vocabulary_size", int),
        "hidden_size": fields.take("hidden_dim", int),
        "num_hidden_layers": fields.take("num_layers", int),
        "num_attention_heads": fields.take("num_query_heads", int),
        "num_key_value_heads": fields.take("num_key_value_heads", int),
    }


def _gemma(fields: Fields) -> Layout:
    """Gemma 1 and 2 are one class in Keras, told apart by the norms after attention and FFN."""
    config, ffn = _shared(fields), fields.take("intermediate_dim", int)
    if ffn % 2:
        raise UserError(f"intermediate_dim: {ffn} is odd; it counts gate and up projection together")
    config |= {
        "intermediate_size": ffn // 2,
        "head_dim": fields.take("head_dim", int),
        # Keras' blocks do not receive this field and compute with 1e-6; only the last norm reads it.
        "rms_norm_eps": fields.require("layer_norm_epsilon", 1e-6, default=1e-6),
        "max_position_embeddings": 8192,  # of every published one; Keras keeps no limit
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
    }
    second = fields.take("use_post_ffw_norm", bool, False)
    fields.require("use_post_attention_norm", second, default=False)
    config |= _gemma2_only(fields, config) if second else _gemma1_only(fields)
    names = GEMMA | (GEMMA2_NORMS if second else GEMMA1_NORMS)
    return Layout(config, "gemma_decoder_block", "rms_normalization", names, tied=True)


def _gemma1_only(fields: Fields) -> dict[str, Any]:
    fields.require("query_head_dim_normalize", True, default=True)
    fields.require("attention_logit_soft_cap", None, default=None)
    fields.require("final_logit_soft_cap", None, default=None)
    fields.require("use_sliding_window_attention", False, default=False)
    fields.take("sliding_window_size", int, 4096)
    return {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}


def _gemma2_only(fields: Fields, config: dict[str, Any]) -> dict[str, Any]:
    # 27B scales by D / N instead of H. Keras says so in this field and then computes with H all the same, because its block
    # does not pass it on; the released model is the field's.
    by_head_dim = fields.take("query_head_dim_normalize", bool, True)
    per_head = config["hidden_size"] // config["num_attention_heads"]
    local = fields.take("use_sliding_window_attention", bool, False)
    kinds = [
        "sliding_attention" if local and i % 2 == 0 else "full_attention" for i in range(config["num_hidden_layers"])
    ]
    return {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["head_dim"] if by_head_dim else per_head,
        "attn_logit_softcapping": fields.optional("attention_logit_soft_cap", float, None),
        "final_logit_softcapping": fields.optional("final_logit_soft_cap", float, None),
        "sliding_window": fields.take("sliding_window_size", int, 4096),
        "layer_types": kinds,
    }


def _llama3(fields: Fields) -> Layout:
    config = _shared(fields)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    # Keras takes this field and divides no position by it: neither reading would be sure to be meant.
    fields.require("rope_position_scaling_factor", 1.0, default=1.0)
    rope = _llama3_rope(fields)
    config |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": fields.take("intermediate_dim", int),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": fields.take("layer_norm_epsilon", float, 1e-6),
        # As published: 8 Ki positions for Llama 3, 128 Ki once its frequencies are adjusted. Keras keeps no limit.
        "max_position_embeddings": 8192 if rope["rope_type"] == "default" else 131072,
        "rope_parameters": rope,
        "attention_bias": False,
        "mlp_bias": False,
    }
    tied = fields.take("tie_word_embeddings", bool, None)
    return Layout(config, "llama_transformer_decoder", "llama_layer_norm", LLAMA, tied)


def _llama3_rope(fields: Fields) -> dict[str, Any]:
    keys = {
        "factor": ("rope_frequency_adjustment_factor", float),
        "low_freq_factor": ("rope_low_freq_factor", float),
        "high_freq_factor": ("rope_high_freq_factor", float),
        "original_max_position_embeddings": ("rope_pretraining_sequence_length", int),
    }
    found = {key: fields.take(name, kind, None) for key, (name, kind) in keys.items()}
    given = {key: value for key, value in found.items() if value is not None}
    if given and len(given) < len(keys):
        lost = ", ".join(name for key, (name, _) in keys.items() if key not in given)
        raise UserError(f"{lost}: missing, while others of Llama 3.1's rotary scaling are given")
    kind = {"rope_type": "llama3" if given else "default"}
    return kind | {"rope_theta": fields.take("rope_max_wavelength", float, 10000.0)} | given


def _qwen2(fields: Fields) -> Layout:
    config, factor = _shared(fields), fields.take("rope_scaling_factor", float, 1.0)
    rope = {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    config |= {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "intermediate_size": fields.take("intermediate_dim", int),
        "hidden_act": "silu",
        "rms_norm_eps": fields.take("layer_norm_epsilon", float, 1e-6),
        "max_position_embeddings": 32768,  # the least of the published ones; Keras keeps no limit
        "rope_parameters": rope | {"rope_theta": fields.take("rope_max_wavelength", float, 10000.0)},
        "use_sliding_window": fields.take("use_sliding_window_attention", bool, False),
        "sliding_window": fields.take("sliding_window_size", int, 32768),
    }
    if config["use_sliding_window"]:
        config["max_window_layers"] = 0  # the window is every layer's
    tied = fields.take("tie_word_embeddings", bool, True)
    return Layout(config, "qwen_transformer_decoder", "qwen_layer_norm", LLAMA | QWEN_BIASES, tied)


ARCHITECTURES: dict[str, Callable[[Fields], Layout]] = {
    "GemmaBackbone": _gemma,
    "Llama3Backbone": _llama3,
    "QwenBackbone": _qwen2,
}
