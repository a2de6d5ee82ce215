"""Llama 2, 3, 3.1, 3.2 and everything of model_type `llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxft.models.arch import Arch, LayerSpec
from jaxft.models.families.fields import Fields


def arch(config: Mapping[str, Any]) -> Arch:
    """`config` with transformers' defaults of LlamaConfig where a field is absent."""
    fields = Fields(config)
    attention_bias = fields.take("attention_bias", bool, False)
    layer = LayerSpec(
        **fields.heads(),
        ffn=fields.take("intermediate_size", int),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=fields.take("mlp_bias", bool, False),
    )
    result = Arch(
        **fields.shared(family="llama", max_positions=2048),
        layers=(layer,) * fields.take("num_hidden_layers", int),
        activation=fields.activation("hidden_act", "silu"),
    )
    fields.finish()
    return result
