"""The five published runs: their settings, their models' sizes, and each rehearsed on a tiny random model of its family."""

import json
import math
import random

import jax
import numpy as np
import openelm
import peft
import pytest
from checkpoints import reload, save, tiny, tokens, torch_logits
from marked import exhaustive, slow
from transformers import AutoTokenizer

import jaxft
from jaxft import config, train
from jaxft.models.decoder import abstract
from jaxft.models.families import arch_from_config
from jaxft.models.tensors import count_parameters, table
from jaxft.weights.hub import BUILTIN

RUNS = {
    "openelm_3b.py": ("apple/OpenELM-3B", "openelm", "openai/gsm8k"),
    "llama32_3b.py": ("meta-llama/Llama-3.2-3B", "llama", "openai/gsm8k"),
    "qwen2_1_5b.py": ("Qwen/Qwen2-1.5B", "qwen2", "openai/gsm8k"),
    "gemma2_9b.py": ("google/gemma-2-9b", "gemma2", "openai/gsm8k"),
    "gemma_2b.py": ("google/gemma-2b", "gemma", "vicgalle/alpaca-gpt4"),
}
# What the repositories' config.json say, and the parameters that their pages give.
MODELS = {
    "llama": (dict(
        model_type="llama", hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=131072,
        rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=dict(
            factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3",
        ), mlp_bias=False, attention_bias=False, hidden_act="silu", torch_dtype="bfloat16",
    ), 3_212_749_824),
    "qwen2": (dict(
        model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=131072,
        max_window_layers=28, sliding_window=131072, use_sliding_window=False, rope_theta=1000000.0, rms_norm_eps=1e-6,
    ), 1_543_714_304),
    "gemma2": (dict(
        model_type="gemma2", hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, vocab_size=256000, query_pre_attn_scalar=256, sliding_window=4096,
        sliding_window_size=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, cache_implementation="hybrid",
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", rope_theta=10000.0,
    ), 9_241_705_984),
    "gemma": (dict(
        model_type="gemma", hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256, vocab_size=256000, hidden_act="gelu", hidden_activation=None, rope_theta=10000.0,
    ), 2_506_172_416),
    "openelm": openelm.PUBLISHED["3B"],
}  # fmt: skip
VOCABULARY = 640  # of the embedded tokenizer, which all rehearsals use


@pytest.mark.parametrize("name", RUNS)
def test_a_config_is_that_of_its_published_run(name):
    made, (model, _, data) = config.load(name), RUNS[name]
    assert (made.model.name, made.data.name) == (model, data)
    assert (made.lora.rank, made.lora.alpha, made.lora.dropout, made.lora.bias) == (8, 16, 0.1, "none")
    assert (made.optim.learning_rate, made.optim.epochs, made.eval.patience) == (2e-4, 3, 5)
    assert (made.data.validation_fraction, made.optim.accumulation_steps) == (0.1, 1)


@pytest.mark.parametrize("family", MODELS)
def test_the_real_model_has_its_published_number_of_parameters(family):
    written, parameters = MODELS[family]
    arch = arch_from_config(written)
    assert arch.family == family
    assert count_parameters(table(abstract(arch))) == (0, parameters)


# GFLOP per token: the layers' linear modules (4 per weight), LoRA of rank 8 on all of them, the head where supervised.
GFLOP = {
    "gemma2": (33.3, 0.16, 3.7), "llama": (11.3, 0.07, 1.6), "qwen2": (5.2, 0.06, 0.9), "openelm": (11.8, 0.07, 0.4),
    "gemma": (7.9, 0.06, 2.1),
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
def test_a_tokens_flops_are_those_of_its_weights(family):
    arch = arch_from_config(MODELS[family][0])
    ranks = dict.fromkeys(arch.linear_shapes(), 8)
    found = arch.flops_per_token(frozen=True), arch.lora_flops_per_token(ranks), arch.head_flops_per_token(frozen=True)
    assert [round(flops / 1e9, digits) for flops, digits in zip(found, (1, 2, 1))] == list(GFLOP[family])
    assert arch.flops_per_token(frozen=False) == 1.5 * found[0]
    assert arch.head_flops_per_token(frozen=False) == 1.5 * found[2]
    in_layers = [row.shape for row in table(abstract(arch)) if row.path.startswith("stages.") and ".kernel" in row.path]
    assert found[0] == 4 * sum(map(math.prod, in_layers))


@pytest.mark.parametrize("size", openelm.PUBLISHED)
def test_every_size_of_openelm_has_its_number_of_parameters(size):
    written, parameters = openelm.PUBLISHED[size]
    assert count_parameters(table(abstract(arch_from_config(written))))[1] == parameters
    lists = ("num_query_heads", "num_kv_heads", "ffn_multipliers")
    formula = {k: v for k, v in written.items() if k not in lists} | {"ffn_multipliers": [0.5, 4.0]}
    assert arch_from_config(formula).layers == arch_from_config(written).layers


def tiny_model(family, folder):
    """A random checkpoint of `family` with the embedded tokenizer's vocabulary; the torch model that it holds."""
    if family == "openelm":
        model = openelm.openelm(vocab_size=VOCABULARY)
        openelm.save(model, folder)
        return lambda: openelm.load(folder)
    save(tiny(family, vocab_size=VOCABULARY), folder)
    return lambda: reload(folder)


def rows(data, file):
    """Rows in the published dataset's format."""
    draw = random.Random(0)
    pairs = [(draw.randint(2, 9), draw.randint(2, 9)) for _ in range(60)]
    if data == "openai/gsm8k":
        made = [{"question": f"What is {a} + {b}?", "answer": f"{a} and {b}.\n#### {a + b}"} for a, b in pairs]
    else:
        made = [{"instruction": "Add.", "input": f"{a}, {b}" if a > 4 else "", "output": str(a + b)} for a, b in pairs]
    file.write_text("\n".join(map(json.dumps, made)))
    return file


@pytest.mark.parametrize("name", [slow(name) if name == "gemma_2b.py" else exhaustive(name) for name in RUNS])
def test_a_run_is_rehearsed_from_checkpoint_to_adapter(name, tmp_path, monkeypatch, capsys):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    _, family, data = RUNS[name]
    oracle = tiny_model(family, tmp_path / "model")
    changes = {
        "model.name": tmp_path / "model", "model.tokenizer": BUILTIN["builtin:tiny"], "model.dtype": "float32",
        "data.files": rows(data, tmp_path / "rows.jsonl"), "data.max_length": 96, "optim.max_steps": 6, "eval.every_steps": 3,
        "eval.samples": 0, "run.dir": tmp_path / "run", "optim.learning_rate": 1e-2,
    }  # fmt: skip
    train.main(["--config", name, *(str(word) for key, value in changes.items() for word in (f"--{key}", value))])
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"trainable params: {results['model']['trainable']:,} || all params:" in said
    assert ("vLLM-ready: yes" in said) == (family != "openelm")
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    falling = [line["eval_loss"] for line in losses if "eval_loss" in line]
    assert falling[-1] < falling[0] and all(map(np.isfinite, falling))
    assert (tmp_path / "run" / "report.html").is_file()
    assert_peft_agrees(tmp_path / "model", tmp_path / "run" / "adapter", oracle)


def assert_peft_agrees(folder, adapter, oracle):
    ids = tokens(2, 40, vocab=VOCABULARY)
    model, tokenizer = jaxft.load(str(folder), adapter=str(adapter))
    wanted, plain = torch_logits(peft.PeftModel.from_pretrained(oracle(), adapter), ids), torch_logits(oracle(), ids)
    assert np.abs(np.asarray(model(ids)) - wanted).max() <= 1e-4 * wanted.std()
    assert np.abs(wanted - plain).max() > 1e-2 * wanted.std()
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(BUILTIN["builtin:tiny"]).get_vocab()
