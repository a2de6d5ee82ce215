"""Llama 2, 3, 3.1, 3.2 and everything of model_type `llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxft.errors import UserError
from jaxft.models.arch import Arch, LayerSpec
from jaxft.models.families.fields import Fields


def arch(config: Mapping[str, Any]) -> Arch:
    """`config` with transformers' defaults of LlamaConfig where a field is absent."""
    fields = Fields(config)
    dim, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    kv_heads = fields.take("num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise UserError(f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")
    head_dim = fields.take("head_dim", int, dim // heads)
    if config.get("head_dim") is None and dim % heads:
        raise UserError(
            f"hidden_size: {dim} is not a multiple of num_attention_heads {heads}, and there is no head_dim"
        )
    if head_dim % 2:
        raise UserError(f"head_dim: {head_dim} is odd; rotary embeddings turn pairs")
    fields.require("hidden_act", "silu", default="silu")
    attention_bias = fields.take("attention_bias", bool, False)
    layer = LayerSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=fields.take("intermediate_size", int),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=fields.take("mlp_bias", bool, False),
    )
    result = Arch(
        family="llama",
        vocab_size=fields.take("vocab_size", int),
        dim=dim,
        layers=(layer,) * fields.take("num_hidden_layers", int),
        rope=fields.rope(default_theta=10000.0),
        norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        tied_head=fields.take("tie_word_embeddings", bool, False),
        max_positions=fields.take("max_position_embeddings", int, 2048),
        init_std=fields.take("initializer_range", float, 0.02),
        eos_ids=fields.eos_ids(),
    )
    fields.finish()
    return result
