"""Gemma 2: Gemma with soft-caps, four norms a layer, a query scale of its own, and a window on every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.models.arch import Arch, LayerSpec, Names
from jaxft.models.families.fields import Fields

NAMES = Names(
    attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)


def arch(config: Mapping[str, Any]) -> Arch:
    """`config` with transformers' defaults of Gemma2Config where a field is absent."""
    fields = Fields(config)
    fields.require("use_bidirectional_attention", None, False, default=None)
    bias, layers = fields.take("attention_bias", bool, False), fields.take("num_hidden_layers", int)
    heads, ffn = fields.heads(kv_heads=4, head_dim=256), fields.take("intermediate_size", int)
    spec = LayerSpec(**heads, ffn=ffn, qkv_bias=bias, out_bias=bias)
    window = fields.optional("sliding_window", int, 4096)
    fields.require("sliding_window_size", None, window, default=None)  # the published files say it twice
    windows = fields.windows(layers, window, lambda i: i % 2 == 0)
    activation = fields.activation("hidden_activation", "gelu_pytorch_tanh")
    fields.activation("hidden_act", activation)  # a leftover that transformers does not read
    result = Arch(
        **fields.shared(family="gemma2", max_positions=8192, tied_head=True),
        layers=tuple(replace(spec, window=w) for w in windows),
        activation=activation,
        norm_plus_one=True,
        embed_scale=fields.take("hidden_size", int) ** 0.5,
        query_scale=fields.take("query_pre_attn_scalar", float, 256.0) ** -0.5,
        attention_cap=fields.optional("attn_logit_softcapping", float, 50.0),
        logit_cap=fields.optional("final_logit_softcapping", float, 30.0),
        names=NAMES,
    )
    fields.finish()
    return result
