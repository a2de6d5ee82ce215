"""Gemma (1): norms scale by 1 + w, embeddings by sqrt(D), GELU by its tanh form, a wide head_dim, one kv head in 2B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxft.models.arch import Arch, LayerSpec
from jaxft.models.families.fields import Fields


def arch(config: Mapping[str, Any]) -> Arch:
    """`config` with transformers' defaults of GemmaConfig where a field is absent."""
    fields = Fields(config)
    fields.require("use_bidirectional_attention", None, False, default=None)
    bias = fields.take("attention_bias", bool, False)
    heads, ffn = fields.heads(kv_heads=16, head_dim=256), fields.take("intermediate_size", int)
    layer = LayerSpec(**heads, ffn=ffn, qkv_bias=bias, out_bias=bias)
    # The first files say "gelu" and mean its tanh form; later ones say so in a second field, which transformers 5 ignores.
    named = fields.activation("hidden_act", "gelu_pytorch_tanh")
    fields.require("hidden_activation", None, "gelu_pytorch_tanh", default=None)
    result = Arch(
        **fields.shared(family="gemma", max_positions=8192, tied_head=True),
        layers=(layer,) * fields.take("num_hidden_layers", int),
        activation="gelu_pytorch_tanh" if named == "gelu" else named,
        norm_plus_one=True,
        embed_scale=fields.take("hidden_size", int) ** 0.5,
    )
    fields.finish()
    return result
