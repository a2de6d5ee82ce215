"""Whole checkpoints in Hugging Face's layout: safetensors shards with an index, config.json, tokenizer."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.models.adaptation import Adaptation, Adapter
from jaxft.models.arch import Arch
from jaxft.models.tensors import Tensor
from jaxft.parallel.sharding import on_host
from jaxft.weights.hub import read_json
from jaxft.weights.peft import AdapterFiles
from jaxft.weights.shards import Slice, write_file

SHARD_BYTES = 4 << 30
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: its name and size are known before `read` gives its values, in the Hub's orientation."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def trained(rows: Iterable[Tensor], arrays: Mapping[str, jax.Array], dtype: Any) -> list[Pending]:
    """Every base tensor of a table, from arrays on the devices, one layer at a time."""
    found = []
    for row in rows:
        for i, name in enumerate(row.names if row.of_checkpoint else ()):
            piece = (lambda row=row, i=i: arrays[row.path][i]) if row.stacked else (lambda row=row: arrays[row.path])
            found.append(Pending(name, row.hub_shape, np.dtype(dtype), _in_hub_layout(piece, row.transposed)))
    return found


def _in_hub_layout(piece: Callable[[], jax.Array], transposed: bool) -> Callable[[], np.ndarray]:
    return lambda: on_host(piece()).T if transposed else on_host(piece())


def merged(files: Mapping[str, Slice], adapter: AdapterFiles, arch: Arch, dtype: Any | None = None) -> list[Pending]:
    """Every tensor of the checkpoint `files` with `adapter` worked in, in fp32, each then in `dtype` or its own.

    Read tensor by tensor when asked: no model need fit anywhere.
    """
    plan, names = adapter.adaptation, arch.names
    sources = {name: name for name in files if not name.endswith("rotary_emb.inv_freq")}
    if names.head is not None and arch.tied_head:
        sources.pop(f"{names.head}.weight", None)
        if plan.parts(arch):
            sources[f"{names.head}.weight"] = f"{names.embed}.weight"
    return [
        Pending(
            name, files[source].shape, np.dtype(dtype or files[source].dtype), _reader(files, source, name, adapter)
        )
        for name, source in sources.items()
    ]


def _reader(files: Mapping[str, Slice], source: str, name: str, adapter: AdapterFiles) -> Callable[[], np.ndarray]:
    path, _, leaf = name.rpartition(".")
    own = f"{path}.base_layer.{leaf}" if path in adapter.adaptation.adapters else name
    if own in adapter.tensors:
        return lambda: adapter.tensors[own][...]
    pair = adapter.adaptation.adapters.get(path) if leaf == "weight" else None
    if pair is None:
        return lambda: files[source][...]
    return lambda: with_pair(files[source][...], pair, lambda part: adapter.tensors[f"{path}.{part}"][...])


def with_pair(weight: np.ndarray, pair: Adapter, part: Callable[[str], np.ndarray]) -> np.ndarray:
    """W + scale · B A in fp32, `[out,in]`; with DoRA each row scaled to its magnitude. `part` gives lora_A.weight and so on."""
    a, b = (part(f"lora_{side}.weight").astype(np.float32) for side in "AB")
    weight = weight.astype(np.float32)
    weight += np.float32(pair.scale) * (b @ a)
    if pair.dora:
        length = np.maximum(np.linalg.norm(weight, axis=1), np.finfo(np.float32).tiny)  # a row of zeros stays one
        weight *= (part("lora_magnitude_vector").astype(np.float32) / length)[:, None]
    return weight


def gather(tensors: Iterable[Pending]) -> None:
    """The part in `save` of the processes that write nothing: each holds a share of every array."""
    for tensor in tensors:
        tensor.read()


def save(folder: Path, tensors: list[Pending], config: Mapping[str, Any], source: Path, tokenizer: Path) -> None:
    """Writes `tensors` as shards with their index, `config` as config.json, and the tokenizer and generation settings."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, weight_map = list(_shards(tensors)), {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, {t.name: np.ascontiguousarray(t.read().astype(t.dtype, copy=False)) for t in shard})
        weight_map |= dict.fromkeys((t.name for t in shard), file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_files(source, folder, ("generation_config.json", *(code.name for code in source.glob("*.py"))))
    copy_files(tokenizer, folder)


def config_for(source: Path, model_name: str, arch: Arch, plan: Adaptation, dtype: Any | None) -> dict[str, Any]:
    """The config.json of `source` as it holds for what is written: dtype, tied head, and where its own code lies."""
    config = dict(read_json(source / "config.json", "every model"))
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = np.dtype(dtype).name
    if plan.parts(arch):
        config["tie_word_embeddings"] = False
    hub_id = model_name.count("/") == 1 and not Path(model_name).expanduser().is_dir()
    if "auto_map" in config and hub_id:
        # Code of the model's repository, which is not copied: named by its repository, as transformers' own saving does.
        named = config["auto_map"].items()
        config["auto_map"] = {key: v if "--" in str(v) else f"{model_name}--{v}" for key, v in named}
    return config


def _shards(tensors: Iterable[Pending]) -> Iterator[list[Pending]]:
    """Consecutive tensors of at most SHARD_BYTES together; a larger one has a shard of its own."""
    shard: list[Pending] = []
    for tensor in tensors:
        if shard and sum(t.nbytes for t in shard) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def copy_files(source: Path, folder: Path, names: Iterable[str] = TOKENIZER_FILES) -> None:
    """Copies those of `names` that `source` has, so that tokenizer and chat template travel with the weights."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
