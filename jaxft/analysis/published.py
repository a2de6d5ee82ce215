"""Published scores of models that are fine-tuned here, each with its protocol and source, to cite beside one's own."""

from __future__ import annotations

from dataclasses import dataclass

BENCHMARKS = ("GSM8K", "MMLU", "ARC-C", "ARC-E", "HellaSwag", "TruthfulQA", "DROP", "Winogrande")

TASKS = {
    "gsm8k": "GSM8K", "gsm8k_cot": "GSM8K", "mmlu": "MMLU", "arc_challenge": "ARC-C", "arc_easy": "ARC-E",
    "hellaswag": "HellaSwag", "truthfulqa_mc2": "TruthfulQA", "drop": "DROP", "winogrande": "Winogrande",
}  # fmt: skip
"""The benchmark that a task of lm-evaluation-harness measures."""


@dataclass(frozen=True)
class Score:
    """`value` in percent (DROP: F1). `model` is the Hub id; `base` that of a fine-tuned model's base.

    Scores of one benchmark compare only where `protocol` is the same: shots, prompt, tokens allowed and how answers are
    read move GSM8K by more than fine-tuning does.
    """

    model: str
    benchmark: str
    value: float
    protocol: str
    source: str
    base: str | None = None


_GEMMA2 = "google/gemma-2-9b model card"
_GEMMA = "google/gemma-2b model card"
_LEADERBOARD = "Open LLM Leaderboard, version 1"
_META = "meta-llama/Llama-3.2-3B model card"
_QWEN = "Qwen2 announcement (qwenlm.github.io/blog/qwen2), appendix"
_APPLE = "apple/OpenELM-3B model card: lm-evaluation-harness dc90fec, BOS added, Llama 2 tokenizer, batch 1"
_ISSUE = "github.com/EleutherAI/lm-evaluation-harness/issues/2498"
_SEALION = "aisingapore sea-lionv2 model card"
_PEFT = "PEFT method_comparison/MetaMathQA: 5,000 steps of 4 rows of MetaMathQA"
_COT = "lm-evaluation-harness 0.4.3 gsm8k_cot, 8 shots, 256 new tokens, no BOS, batch 1"
_PEFT_PROTOCOL = "zero-shot, at most 300 new tokens, own parser, numbers compared as decimals, full test set"
_METHODS = {
    "LoRA r=32": 47.8, "LoRA r=64": 47.4, "LoRA r=64, rank-stabilised": 51.3, "LoRA r=10 on the MLP": 49.4, "DoRA": 46.9,
    "all weights": 47.2, "Lily (best of the table)": 52.6,
}  # fmt: skip


def _rows(model: str, source: str, *scores: tuple[str, float, str], base: str | None = None) -> tuple[Score, ...]:
    return tuple(Score(model, benchmark, value, protocol, source, base) for benchmark, value, protocol in scores)


_V1 = {"ARC-C": "25-shot acc_norm", "HellaSwag": "10-shot acc_norm", "MMLU": "5-shot acc", "TruthfulQA": "0-shot mc2",
       "Winogrande": "5-shot acc", "GSM8K": "5-shot exact match"}  # fmt: skip


def _leaderboard(model: str, base: str | None = None, **values: float) -> tuple[Score, ...]:
    named = {name.replace("_", "-"): value for name, value in values.items()}
    return _rows(model, _LEADERBOARD, *((name, value, _V1[name]) for name, value in named.items()), base=base)


SCORES: tuple[Score, ...] = (
    *_rows("google/gemma-2-9b", _GEMMA2,
           ("GSM8K", 68.6, "5-shot maj@1"), ("MMLU", 71.3, "5-shot"), ("ARC-C", 68.4, "25-shot"),
           ("ARC-E", 88.0, "0-shot"), ("HellaSwag", 81.9, "10-shot"), ("DROP", 69.4, "3-shot F1")),
    *_rows("google/gemma-2-9b", "huggingface.co/blog/gemma2, from the first technical report",
           ("GSM8K", 62.3, "5-shot maj@1")),
    *_rows("google/gemma-2-9b", _SEALION,
           ("GSM8K", 63.53, "as Open LLM Leaderboard, version 1"), ("MMLU", 70.26, "as Open LLM Leaderboard, version 1"),
           ("ARC-C", 68.00, "as Open LLM Leaderboard, version 1"), ("HellaSwag", 82.73, "as Open LLM Leaderboard, version 1")),
    *_rows("google/gemma-2b", _GEMMA,
           ("GSM8K", 17.7, "maj@1"), ("MMLU", 42.3, "5-shot"), ("ARC-C", 48.5, "as the card"),
           ("HellaSwag", 71.4, "0-shot"), ("TruthfulQA", 33.1, "as the card")),
    *_leaderboard("google/gemma-2b", GSM8K=16.91, MMLU=41.77, ARC_C=48.38, HellaSwag=71.77, TruthfulQA=33.08,
                  Winogrande=66.77),
    *_leaderboard("google/gemma-2b-it", "google/gemma-2b", GSM8K=5.46, MMLU=37.65, ARC_C=43.94, HellaSwag=62.70,
                  TruthfulQA=45.82),
    *_leaderboard("mlabonne/Gemmalpaca-2B", "google/gemma-2b", GSM8K=10.69, MMLU=36.30, ARC_C=48.72, HellaSwag=71.36,
                  TruthfulQA=41.24, Winogrande=65.59),
    *_rows("meta-llama/Llama-3.2-3B", _META,
           ("MMLU", 58.0, "5-shot, macro average"), ("ARC-C", 69.1, "25-shot, lettered options (not arc_challenge)"),
           ("DROP", 45.2, "3-shot F1")),
    *_rows("meta-llama/Llama-3.2-3B", _ISSUE,
           ("GSM8K", 28.35, f"{_COT}, strict-match"), ("GSM8K", 29.87, f"{_COT}, flexible-extract")),
    *_rows("meta-llama/Llama-3.2-3B-Instruct", _META,
           ("GSM8K", 77.7, "8-shot chain of thought, em_maj1@1, 1,024 new tokens"), ("MMLU", 63.4, "5-shot, macro average"),
           ("ARC-C", 78.6, "0-shot, lettered options (not arc_challenge)"), ("HellaSwag", 69.8, "0-shot"),
           base="meta-llama/Llama-3.2-3B"),
    *_rows("Qwen/Qwen2-1.5B", _QWEN,
           ("GSM8K", 58.5, "4-shot"), ("MMLU", 56.5, "5-shot"), ("ARC-C", 43.9, "25-shot"), ("HellaSwag", 66.6, "10-shot"),
           ("TruthfulQA", 45.9, "0-shot")),
    *_rows("Qwen/Qwen2-1.5B-Instruct", _QWEN, ("GSM8K", 61.6, "as the announcement"), ("MMLU", 52.4, "as the announcement"),
           base="Qwen/Qwen2-1.5B"),
    *_rows("apple/OpenELM-3B", _APPLE,
           ("MMLU", 26.76, "5-shot"), ("ARC-C", 42.24, "25-shot"), ("HellaSwag", 73.28, "10-shot"),
           ("TruthfulQA", 34.98, "mc2")),
    *_rows("apple/OpenELM-3B-Instruct", _APPLE,
           ("MMLU", 24.80, "5-shot"), ("ARC-C", 47.70, "25-shot"), ("HellaSwag", 76.87, "10-shot"),
           ("TruthfulQA", 38.76, "mc2"),
           base="apple/OpenELM-3B"),
    *(row for method, value in _METHODS.items()
      for row in _rows(f"meta-llama/Llama-3.2-3B with {method}", _PEFT, ("GSM8K", value, _PEFT_PROTOCOL),
                       base="meta-llama/Llama-3.2-3B")),
)  # fmt: skip

UNPUBLISHED = {
    ("apple/OpenELM-3B", "GSM8K"): "none published; its MMLU is that of guessing (25), so expect close to 0",
    ("apple/OpenELM-3B-Instruct", "GSM8K"): "none published",
}
"""Scores that were looked for and not found: a report says so instead of leaving a gap."""


def of_model(model: str, benchmark: str | None = None) -> list[Score]:
    """Published scores of a Hub id (case does not count), of one benchmark or of all."""
    return [
        score for score in SCORES if score.model.casefold() == model.casefold() and benchmark in (None, score.benchmark)
    ]


def of_base(base: str, benchmark: str | None = None) -> list[Score]:
    """Published scores of models that were fine-tuned from a Hub id."""
    return [
        score
        for score in SCORES
        if (score.base or "").casefold() == base.casefold() and benchmark in (None, score.benchmark)
    ]


def unpublished(model: str, benchmark: str) -> str | None:
    """What is known of a score that nobody published; None where nobody looked, or where there is one."""
    return next(
        (words for (m, b), words in UNPUBLISHED.items() if (m.casefold(), b) == (model.casefold(), benchmark)), None
    )
