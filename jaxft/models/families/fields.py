"""Reading `config.json` without guessing: each field is taken once, and what is left over must be harmless."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.errors import UserError
from jaxft.models.arch import Llama3Scaling, Rope

# Fields that change neither the weights' shapes nor what the decoder computes at inference or in training here.
HARMLESS = frozenset(
    """architectures model_type transformers_version torch_dtype dtype use_cache bos_token_id pad_token_id
    unk_token_id sep_token_id decoder_start_token_id initializer_range attention_dropout pretraining_tp auto_map name_or_path
    output_attentions output_hidden_states return_dict return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss
    pruned_heads chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder finetuning_task id2label label2id num_labels task_specific_params problem_type tokenizer_class prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens use_mxfp4 base_model_tp_plan
    base_model_pp_plan attn_implementation cache_implementation""".split()
)
HARMLESS_PREFIXES = ("_", "unsloth")
# transformers' names of what ops.ACTIVATIONS computes.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}


class Fields:
    """The fields of one `config.json`; `take` reads one, `finish` refuses what nobody took."""

    def __init__(self, config: Mapping[str, Any]):
        self._config, self._taken = config, set()

    def take(self, name: str, kind: type, default: Any = ...) -> Any:
        """The field's value as `kind`; `default` where absent or null, else UserError."""
        self._taken.add(name)
        value = self._config.get(name)
        if value is None:
            if default is ...:
                raise UserError(f"{name} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{name}: expected {kind.__name__}, found {value!r}")
        if kind in (int, float) and not value > 0:
            raise UserError(f"{name}: expected a positive number, found {value}")
        return value

    def require(self, name: str, *supported: Any, default: Any) -> Any:
        """The field's value, which must be one of `supported`."""
        self._taken.add(name)
        value = self._config.get(name, default)
        if value not in supported:
            raise UserError(f"{name}: {value!r} is not supported; supported: {', '.join(map(repr, supported))}")
        return value

    def eos_ids(self) -> tuple[int, ...]:
        """`eos_token_id`, one or several; chat models name their end of turn here, which the tokenizer's EOS is not."""
        self._taken.add("eos_token_id")
        named = self._config.get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise UserError(f"eos_token_id: expected a token id or a list of them, found {named!r}")
        return tuple(ids)

    def rope(self) -> Rope:
        """Both dialects: `rope_theta` + `rope_scaling` (Hub files), or `rope_parameters` (transformers 5)."""
        parameters = dict(self.take("rope_parameters", dict, {}))
        # As transformers where both are there: the older dialect first, and a theta inside the record before one beside it.
        parameters = dict(self.take("rope_scaling", dict, {})) or parameters
        parameters.setdefault("rope_theta", self.take("rope_theta", float, 10000.0))
        theta = _positive(parameters, "rope_theta")
        kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
        parameters.pop("type", None)
        rope = _scaled(theta, kind, parameters)
        if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
            raise UserError("partial_rotary_factor other than 1 is not supported")
        if parameters:
            raise UserError(f"rope_parameters: {', '.join(parameters)} not understood for rope_type {kind!r}")
        return rope

    def optional(self, name: str, kind: type, default: Any) -> Any:
        """As `take`, but a null in the file is None, which turns the thing off, and only an absent field is `default`."""
        return self.take(name, kind, None) if name in self._config else default

    def count(self, name: str, default: int) -> int:
        """A number that may be 0."""
        self._taken.add(name)
        return 0 if self._config.get(name) == 0 else self.take(name, int, default)

    def shared(self, *, family: str, max_positions: int, tied_head: bool = False) -> dict[str, Any]:
        """What every family but OpenELM writes alike, as fields of an Arch."""
        return {
            "family": family,
            "vocab_size": self.take("vocab_size", int),
            "dim": self.take("hidden_size", int),
            "rope": self.rope(),
            "norm_eps": self.take("rms_norm_eps", float, 1e-6),
            "tied_head": self.take("tie_word_embeddings", bool, tied_head),
            "max_positions": self.take("max_position_embeddings", int, max_positions),
            "init_std": self.take("initializer_range", float, 0.02),
            "eos_ids": self.eos_ids(),
        }

    def heads(self, **defaults: int) -> dict[str, int]:
        """`heads`, `kv_heads` and `head_dim` of a LayerSpec; kv_heads default to heads and head_dim to D / N."""
        dim, heads = self.take("hidden_size", int), self.take("num_attention_heads", int)
        kv_heads = self.take("num_key_value_heads", int, defaults.get("kv_heads", heads))
        if heads % kv_heads:
            raise UserError(f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")
        head_dim = self.take("head_dim", int, defaults.get("head_dim", 0))
        if not head_dim and dim % heads:
            raise UserError(
                f"hidden_size: {dim} is not a multiple of num_attention_heads {heads}, and there is no head_dim"
            )
        return {"heads": heads, "kv_heads": kv_heads, "head_dim": even("head_dim", head_dim or dim // heads)}

    def activation(self, name: str, default: str) -> str:
        """One of ops.ACTIVATIONS, by transformers' name."""
        return ACTIVATIONS[self.require(name, *ACTIVATIONS, default=default)]

    def windows(self, layers: int, window: int | None, default: Callable[[int], bool]) -> list[int | None]:
        """Per layer the `window` or None: as `layer_types` says, or where there is none, as `default` says of its index."""
        kinds = self.take("layer_types", list, None)
        if kinds is None:
            kinds = ["sliding_attention" if default(i) else "full_attention" for i in range(layers)]
        if len(kinds) != layers:
            raise UserError(f"layer_types: {len(kinds)} entries for num_hidden_layers {layers}")
        known = {"sliding_attention": window, "full_attention": None}
        for kind in kinds:
            if kind not in list(known):  # a list, because what stands there need not be hashable
                raise UserError(f"layer_types: {kind!r} is not supported; supported: {', '.join(map(repr, known))}")
        if window is None and "sliding_attention" in kinds:
            raise UserError("layer_types: 'sliding_attention' without a sliding_window")
        return [known[kind] for kind in kinds]

    def finish(self) -> None:
        """Raises UserError for a field that no reader knows: computing without it could be quietly wrong."""
        for name, value in self._config.items():
            known = name in self._taken or name in HARMLESS or name.startswith(HARMLESS_PREFIXES)
            if not known and value is not None:
                raise UserError(f"{name}: {str(value)[:80]!r} is a field that this family's reader does not understand")


def even(name: str, head_dim: int) -> int:
    """`head_dim`, or UserError where it is odd."""
    if head_dim % 2:
        raise UserError(f"{name}: {head_dim} is odd; rotary embeddings turn pairs")
    return head_dim


def _positive(parameters: dict[str, Any], name: str) -> float:
    value = parameters.pop(name, None)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"rope_parameters: {name} must be a positive number, found {value!r}")
    return float(value)


def _scaled(theta: float, kind: str, parameters: dict[str, Any]) -> Rope:
    def number(name: str) -> float:
        return _positive(parameters, name)

    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, linear=number("factor"))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=number("factor"),
            low_frequency=number("low_freq_factor"),
            high_frequency=number("high_freq_factor"),
            original_positions=int(number("original_max_position_embeddings")),
        )
        return Rope(theta, llama3=scaling)
    raise UserError(f"rope_type: {kind!r} is not supported; supported: 'default', 'linear', 'llama3'")
