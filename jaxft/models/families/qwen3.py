"""Qwen3 (dense): Qwen2 with norms on queries and keys in place of their biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxft.models.arch import Arch, LayerSpec, Names
from jaxft.models.families.fields import Fields
from jaxft.models.families.qwen2 import windowed


def arch(config: Mapping[str, Any]) -> Arch:
    """`config` with transformers' defaults of Qwen3Config where a field is absent."""
    fields = Fields(config)
    bias = fields.take("attention_bias", bool, False)
    heads, ffn = fields.heads(kv_heads=32, head_dim=128), fields.take("intermediate_size", int)
    result = Arch(
        **fields.shared(family="qwen3", max_positions=32768),
        layers=windowed(LayerSpec(**heads, ffn=ffn, qkv_bias=bias, out_bias=bias), fields),
        activation=fields.activation("hidden_act", "silu"),
        names=Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    )
    fields.finish()
    return result
