"""Qwen2 and Qwen2.5: biases on q, k and v; an optional sliding window on the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.models.arch import Arch, LayerSpec
from jaxft.models.families.fields import Fields


def arch(config: Mapping[str, Any]) -> Arch:
    """`config` with transformers' defaults of Qwen2Config where a field is absent."""
    fields = Fields(config)
    fields.require("use_mrope", None, False, default=None)
    spec = LayerSpec(**fields.heads(kv_heads=32), ffn=fields.take("intermediate_size", int), qkv_bias=True)
    result = Arch(
        **fields.shared(family="qwen2", max_positions=32768),
        layers=windowed(spec, fields),
        activation=fields.activation("hidden_act", "silu"),
    )
    fields.finish()
    return result


def windowed(spec: LayerSpec, fields: Fields) -> tuple[LayerSpec, ...]:
    """A spec per layer: with `use_sliding_window`, layers from `max_window_layers` on see `sliding_window` keys."""
    layers, used = fields.take("num_hidden_layers", int), fields.take("use_sliding_window", bool, False)
    window, first = fields.optional("sliding_window", int, 4096), fields.count("max_window_layers", 28)
    window = window if used else None
    windows = fields.windows(layers, window, lambda i: window is not None and i >= first)
    return tuple(replace(spec, window=w) for w in windows)
