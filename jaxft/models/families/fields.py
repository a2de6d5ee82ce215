"""Reading `config.json` without guessing: each field is taken once, and what is left over must be harmless."""

from __future__ import annotations

from collections.abc import Mapping
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
    base_model_pp_plan attn_implementation""".split()
)
HARMLESS_PREFIXES = ("_", "unsloth")


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
        if kind is int and value <= 0:
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

    def rope(self, default_theta: float) -> Rope:
        """Both dialects: `rope_theta` + `rope_scaling` (Hub files), or `rope_parameters` (transformers 5)."""
        parameters = dict(self.take("rope_parameters", dict, {}))
        # As transformers where both are there: the older dialect first, and a theta inside the record before one beside it.
        parameters = dict(self.take("rope_scaling", dict, {})) or parameters
        parameters.setdefault("rope_theta", self.take("rope_theta", float, default_theta))
        theta = _positive(parameters, "rope_theta")
        kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
        parameters.pop("type", None)
        rope = _scaled(theta, kind, parameters)
        if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
            raise UserError("partial_rotary_factor other than 1 is not supported")
        if parameters:
            raise UserError(f"rope_parameters: {', '.join(parameters)} not understood for rope_type {kind!r}")
        return rope

    def finish(self) -> None:
        """Raises UserError for a field that no reader knows: computing without it could be quietly wrong."""
        for name, value in self._config.items():
            known = name in self._taken or name in HARMLESS or name.startswith(HARMLESS_PREFIXES)
            if not known and value is not None:
                raise UserError(f"{name}: {str(value)[:80]!r} is a field that this family's reader does not understand")


def _positive(parameters: dict[str, Any], name: str) -> float:
    value = parameters.pop(name, None)
    if not isinstance(value, (int, float)) or value <= 0:
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
