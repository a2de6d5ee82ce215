"""OpenELM, 270M to 3B: heads and FFN width of each layer its own, fused projections, norms on queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxft.errors import UserError
from jaxft.models.arch import Arch, LayerSpec, Names, Rope
from jaxft.models.families.fields import Fields, even

EPSILON = 1e-6  # of its norms; no field of config.json
NAMES = dict(
    embed="transformer.token_embeddings",
    layer="transformer.layers.{}",
    norm="transformer.norm",
    input_norm="attn_norm",
    mlp_norm="ffn_norm",
    qkv_proj="attn.qkv_proj",
    o_proj="attn.out_proj",
    gate_up_proj="ffn.proj_1",
    down_proj="ffn.proj_2",
)


def arch(config: Mapping[str, Any]) -> Arch:
    """`config` as Apple's files have it, with the defaults of Apple's OpenELMConfig (not those of any published size)."""
    fields = Fields(config)
    fields.require("ffn_with_glu", True, default=True)
    fields.require("normalization_layer_name", "rms_norm", default="rms_norm")
    tied = fields.take("share_input_output_layers", bool, False)
    names = dict(NAMES, head=None if tied else "lm_head")
    if fields.take("normalize_qk_projections", bool, False):
        names |= {"q_norm": "attn.q_norm", "k_norm": "attn.k_norm"}
    result = Arch(
        family="openelm",
        vocab_size=fields.take("vocab_size", int),
        dim=fields.take("model_dim", int),
        layers=_layers(fields),
        rope=Rope(fields.take("rope_freq_constant", float, 10000.0)),
        norm_eps=EPSILON,
        tied_head=tied,
        max_positions=fields.take("max_context_length", int, 2048),
        activation=fields.activation("activation_fn_name", "swish"),
        init_std=fields.take("initializer_range", float, 0.02),
        eos_ids=fields.eos_ids(),
        names=Names(**names),
    )
    fields.take("rope_max_length", int, 0)  # the length of a table that is computed here as needed
    fields.finish()
    return result


def _layers(fields: Fields) -> tuple[LayerSpec, ...]:
    dim, layers = fields.take("model_dim", int), fields.take("num_transformer_layers", int)
    head_dim, groups = even("head_dim", fields.take("head_dim", int, 128)), fields.take("num_gqa_groups", int, 1)
    queries = _multiples(fields, "qkv_multipliers", 1.0, layers, dim, head_dim * groups)
    heads = _counts(fields, "num_query_heads", [width // head_dim for width in queries])
    kv_heads = _counts(fields, "num_kv_heads", [n // groups for n in heads])
    for n, k in zip(heads, kv_heads):
        if n % k:
            raise UserError(f"num_kv_heads: {k} does not divide num_query_heads {n} of the same layer")
    widths = _multiples(fields, "ffn_multipliers", 4.0, layers, dim, fields.take("ffn_dim_divisor", int, 256))
    return tuple(LayerSpec(n, k, head_dim, ffn) for n, k, ffn in zip(heads, kv_heads, widths))


def _counts(fields: Fields, name: str, default: list[int]) -> list[int]:
    """A list of positive counts, one per layer."""
    found = fields.take(name, list, default)
    if len(found) != len(default) or not all(type(n) is int and n > 0 for n in found):
        raise UserError(f"{name}: expected {len(default)} positive counts, one per layer, found {found}")
    return found


def _multiples(fields: Fields, name: str, default: float, layers: int, dim: int, divisor: int) -> list[int]:
    """Widths per layer: multipliers of D (one, two to go between, or one per layer) rounded to a multiple of `divisor`."""
    found = fields.take(name, object, default)
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(m, (int, float)) and not isinstance(m, bool) and m > 0 for m in found):
        raise UserError(f"{name}: expected positive numbers, found {found}")
    if len(found) == 2 and layers != 2:
        step = (found[1] - found[0]) / (layers - 1) if layers > 1 else 0.0
        found = [round(found[0] + i * step, 2) for i in range(layers)]
    found = found * layers if len(found) == 1 else found
    if len(found) != layers:
        raise UserError(f"{name}: {len(found)} multipliers for num_transformer_layers {layers}")
    return [_rounded(m * dim, divisor) for m in found]


def _rounded(width: float, divisor: int) -> int:
    """The nearest multiple of `divisor`, or the next where that would take away more than a tenth (as CoreNet)."""
    nearest = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * width else nearest
