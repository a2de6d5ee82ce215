"""Whole checkpoints in Hugging Face's layout: safetensors shards with an index, config.json, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.models.tensors import Tensor
from jaxft.weights.hub import read_json
from jaxft.weights.peft import hub_tensors
from jaxft.weights.shards import write_file

SHARD_BYTES = 4 << 30
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
)  # fmt: skip


def save(folder: Path, rows: Iterable[Tensor], arrays: Mapping[str, jax.Array], source: Path, dtype: Any) -> None:
    """Writes every base tensor in `dtype`, with the configuration and tokenizer of the folder `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards([row for row in rows if not row.adapter], np.dtype(dtype).itemsize))
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {name: value.astype(dtype) for row in shard for name, value in hub_tensors(row, arrays[row.path])}
        write_file(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(row.size for shard in shards for row in shard) * np.dtype(dtype).itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = {k: v for k, v in read_json(source / "config.json", "every model").items() if k != "torch_dtype"}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": np.dtype(dtype).name}, indent=2) + "\n")
    copy_files(source, folder, (*TOKENIZER_FILES, "generation_config.json"))


def _shards(rows: list[Tensor], itemsize: int) -> Iterator[list[Tensor]]:
    """Consecutive rows of at most SHARD_BYTES together; a larger row has a shard of its own."""
    shard: list[Tensor] = []
    for row in rows:
        if shard and (sum(r.size for r in shard) + row.size) * itemsize > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(row)
    yield shard


def copy_files(source: Path, folder: Path, names: Iterable[str] = TOKENIZER_FILES) -> None:
    """Copies those of `names` that `source` has, so that tokenizer and chat template travel with the weights."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
