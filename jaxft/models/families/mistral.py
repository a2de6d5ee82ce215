"""Mistral: Llama with a sliding window on every layer (none since 0.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxft.models.arch import Arch, LayerSpec
from jaxft.models.families.fields import Fields


def arch(config: Mapping[str, Any]) -> Arch:
    """`config` with transformers' defaults of MistralConfig where a field is absent."""
    fields = Fields(config)
    window = fields.optional("sliding_window", int, 4096)
    layer = LayerSpec(**fields.heads(kv_heads=8), ffn=fields.take("intermediate_size", int), window=window)
    result = Arch(
        **fields.shared(family="mistral", max_positions=4096 * 32),
        layers=(layer,) * fields.take("num_hidden_layers", int),
        activation=fields.activation("hidden_act", "silu"),
    )
    fields.finish()
    return result
