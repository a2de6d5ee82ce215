"""config.json of the models of the five published runs, as their repositories had them on 2026-11-21.

A plan needs no more of a model than this, and three of the repositories are gated.
"""

from __future__ import annotations

from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "apple/OpenELM-3B": dict(
        model_type="openelm", activation_fn_name="swish", bos_token_id=1, eos_token_id=2, ffn_dim_divisor=256,
        ffn_multipliers=[tenths / 10 for tenths in range(5, 41)], ffn_with_glu=True, head_dim=128, initializer_range=0.02,
        max_context_length=2048, model_dim=3072, normalization_layer_name="rms_norm", normalize_qk_projections=True,
        num_gqa_groups=4, num_kv_heads=[3] * 4 + [4] * 14 + [5] * 12 + [6] * 6,
        num_query_heads=[12] * 4 + [16] * 14 + [20] * 12 + [24] * 6, num_transformer_layers=36, qkv_multipliers=[0.5, 1.0],
        rope_freq_constant=10000, rope_max_length=4096, share_input_output_layers=True, torch_dtype="float32",
        vocab_size=32000,
    ),
    "meta-llama/Llama-3.2-3B": dict(
        model_type="llama", hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=131072,
        rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=dict(
            factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3",
        ), mlp_bias=False, attention_bias=False, hidden_act="silu", torch_dtype="bfloat16",
    ),
    "Qwen/Qwen2-1.5B": dict(
        model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=131072,
        max_window_layers=28, sliding_window=131072, use_sliding_window=False, rope_theta=1000000.0, rms_norm_eps=1e-6,
        torch_dtype="bfloat16",
    ),
    "google/gemma-2-9b": dict(
        model_type="gemma2", hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, vocab_size=256000, query_pre_attn_scalar=256, sliding_window=4096,
        sliding_window_size=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, cache_implementation="hybrid",
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", rope_theta=10000.0, torch_dtype="float32",
    ),
    "google/gemma-2b": dict(
        model_type="gemma", hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256, vocab_size=256000, hidden_act="gelu", hidden_activation=None, rope_theta=10000.0,
        torch_dtype="bfloat16",
    ),
}  # fmt: skip
