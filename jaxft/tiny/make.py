"""Writes the embedded model's folder: `python -m jaxft.tiny.make FOLDER [TRAINED]`.

Without TRAINED it writes all but the weights, which is what `python -m jaxft.train --config tiny_base.py` starts from;
TRAINED is the `model` folder of that run, whose weights are then copied in bfloat16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, run_verb
from jaxft.tiny import corpus, problems

VOCABULARY = 640
MAX_LENGTH = 512
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL = (PAD, BOS, EOS)
"""In the order of their ids 0, 1, 2."""

ARCHITECTURE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.06,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

CARD = """---
license: apache-2.0
library_name: transformers
tags: [generated-data, tiny]
---
# jaxft's embedded model

A Llama-shaped decoder of {parameters:,} parameters ({layers} layers of width {width}, a vocabulary of {vocabulary})
that jaxft ships so that its first run needs no download, no account and no accelerator.

**Everything about it is generated.** The weights were trained from a random start on text that `jaxft/tiny/corpus.py`
makes up: sums, products, and little stories about sixteen people and their apples. The tokenizer was trained on that
text, on the word problems of `jaxft/tiny/problems.py` and on a list of common words. No human-written data set and no
other model went into it.

It knows arithmetic within 100 and a few sentence patterns. It is no language model in any useful sense, and a score on
the generated word problems says that a training pipeline works, not that a model reasons.

To make it again:

```
python -m jaxft.tiny.make jaxft/tiny/base                         # everything but the weights
python -m jaxft.train --config tiny_base.py                       # about ten minutes on two CPU cores
python -m jaxft.tiny.make jaxft/tiny/base runs/tiny_base/model    # the weights, in bfloat16
```
"""

COMMON = """
the of to and a in is you that it he was for on are as with his they I at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people
"""
"""Words of which neither text has many, so that other prompts take fewer tokens."""


def make(folder: Path) -> None:
    """Writes config.json, generation_config.json, the tokenizer's files and the model card into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"pad_token_id": SPECIAL.index(PAD), "bos_token_id": SPECIAL.index(BOS), "eos_token_id": SPECIAL.index(EOS)}
    _write_json(folder / "config.json", ARCHITECTURE | ids)
    _write_json(folder / "generation_config.json", {"do_sample": False, "max_new_tokens": 128} | ids)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": MAX_LENGTH,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        },
    )
    card = CARD.format(
        parameters=parameters(), layers=ARCHITECTURE["num_hidden_layers"], width=ARCHITECTURE["hidden_size"],
        vocabulary=VOCABULARY,
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")


def copy_weights(trained: Path, folder: Path) -> None:
    """Copies `trained`/model.safetensors into `folder` in bfloat16. Raises UserError where there is none."""
    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    source = trained / "model.safetensors"
    if not source.is_file():
        raise UserError(f"{source}: no such file; train with `python -m jaxft.train --config tiny_base.py` first")
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(source).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def parameters() -> int:
    """Number of weights, the tied embedding once."""
    a = ARCHITECTURE
    attention = 2 * a["hidden_size"] * (a["num_attention_heads"] + a["num_key_value_heads"]) * a["head_dim"]
    mlp, norms = 3 * a["hidden_size"] * a["intermediate_size"], 2 * a["hidden_size"]
    return a["num_hidden_layers"] * (attention + mlp + norms) + (a["vocab_size"] + 1) * a["hidden_size"]


def train_tokenizer() -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` that encodes any text, each digit alone, and puts `<s>` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def _texts() -> list[str]:
    asked = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in problems.rows("train")]
    return asked * 4 + [row["text"] for row in corpus.rows("train", 20_000)] + [" " + " ".join(COMMON.split())] * 40


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
    """Makes the folder; with a second one, the weights trained there are copied into it in bfloat16."""
    if len(argv) not in (1, 2) or any(a.startswith("-") for a in argv):
        raise UserError("expected one or two folders: python -m jaxft.tiny.make FOLDER [TRAINED]")
    make(Path(argv[0]))
    if argv[1:]:
        copy_weights(Path(argv[1]), Path(argv[0]))


if __name__ == "__main__":
    run_verb(main)
