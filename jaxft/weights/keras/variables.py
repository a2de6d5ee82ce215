"""The variables in a preset's HDF5 files, as the Hub's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.errors import UserError
from jaxft.weights.hub import read_json
from jaxft.weights.keras.find import first_line, needed
from jaxft.weights.keras.layout import EMBEDDING, FLOATS, HEAD, Layout
from jaxft.weights.shards import Slice, check

SINGLE, INDEX = "model.weights.h5", "model.weights.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.weights\.h5")


@dataclass(frozen=True)
class Variable:
    """A Keras variable as the Hub's tensor of `shape`; indexing gives a numpy array.

    Where the Hub's layout is no view of Keras' (q, k and v of Gemma, whose heads lie before D), indexing copies this one
    tensor.
    """

    stored: Slice
    order: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """As in the file."""
        return self.stored.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.stored[...].transpose(self.order).reshape(self.shape)[index]


def claim(layout: Layout, stored: Mapping[str, Slice], source: str) -> dict[str, Variable]:
    """The Hub's tensors, each variable of the files claimed once. Raises one UserError that lists all that do not fit."""
    tied = next(iter(HEAD)) not in stored if layout.tied is None else layout.tied
    config = layout.config
    sizes = dict(
        V=config["vocab_size"], D=config["hidden_size"], F=config["intermediate_size"], N=config["num_attention_heads"],
        K=config["num_key_value_heads"], H=config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
    )  # fmt: skip
    wanted = {path: (hub, axes, out) for path, hub, axes, out in _wanted(layout, tied)}
    shapes = {path: tuple(sizes[axis] for axis in axes) for path, (_, axes, _) in wanted.items()}
    remedy = "where keras-nlp itself can load the preset, its save_to_preset writes one that fits"
    check(stored, shapes, f"{source}: {{}} variables do not fit config.json ({remedy})")
    return {hub: _variable(stored[path], axes, out, sizes) for path, (hub, axes, out) in wanted.items()}


def _wanted(layout: Layout, tied: bool) -> Iterator[tuple[str, str, str, str]]:
    """`(path in the file, Hub name, axes, Hub axes)` of every variable; Keras numbers the blocks from the second on."""
    for path, (hub, axes, out) in (EMBEDDING if tied else EMBEDDING | HEAD).items():
        yield path, hub, axes, out
    for i in range(layout.config["num_hidden_layers"]):
        block = layout.block + (f"_{i}" if i else "")
        for path, (hub, axes, out) in layout.names.items():
            yield f"{block}/{path}", f"model.layers.{i}.{hub}", axes, out
    yield f"{layout.norm}/vars/0", "model.norm.weight", "D", "D"


def _variable(stored: Slice, axes: str, out: str, sizes: Mapping[str, int]) -> Variable:
    order = tuple(axes.index(axis) for axis in out.replace(" ", ""))
    shape = tuple(int(np.prod([sizes[axis] for axis in group])) for group in out.split())
    return Variable(stored, order, shape)


def stored(folder: Path) -> dict[str, Slice]:
    """Every variable of the preset's file or shards, by its path below `layers`."""
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        names = _shard_names(folder / INDEX)
    else:
        raise UserError(f"{folder}: no {SINGLE} and no {INDEX}; a Keras preset has one of them")
    found: dict[str, Slice] = {}
    for name in names:
        for path, variable in _read_file(folder / name):
            if path in found:
                raise UserError(f"{folder / name}: {path} is also in {found[path].file.name}")
            found[path] = variable
    return found


def _shard_names(index: Path) -> list[str]:
    places = read_json(index, "a sharded Keras preset").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: no weight_map")
    # A layer whose variables lie in several shards names them all.
    names = {str(name) for place in places.values() for name in (place if isinstance(place, list) else [place])}
    strange = [name for name in sorted(names) if not SHARD_NAME.fullmatch(name)]
    if strange:
        raise UserError(f"{index}: weight_map names {strange[0]!r}; shards are .weights.h5 files in the same folder")
    return sorted(names)


def _read_file(file: Path) -> list[tuple[str, Slice]]:
    h5py = needed("h5py", str(file))
    if not file.is_file():
        raise UserError(f"{file}: missing; download the preset again")
    found = []

    def visit(path: str, item: Any) -> None:
        # The counters of Keras' dropout, which are no weights.
        if isinstance(item, h5py.Dataset) and "/seed_generator" not in path:
            found.append((_plain(path), _slice(file, path, item)))

    try:
        with h5py.File(file, "r") as opened:
            opened.visititems(visit)  # follows no link, so nothing outside the file is reached
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"{file}: not an HDF5 file, or a damaged one: {first_line(error)}") from error
    return found


def _plain(path: str) -> str:
    """`path` below the model; Keras before 3.0 named the layers' group otherwise, and reads both."""
    return path.removeprefix("layers/").removeprefix("_layer_checkpoint_dependencies/")


def _slice(file: Path, path: str, item: Any) -> Slice:
    dtype, offset, size = item.dtype, item.id.get_offset(), file.stat().st_size
    if dtype.kind == "V" and dtype.itemsize == 2 and item.attrs.get("dtype") == "bfloat16":
        dtype = np.dtype(ml_dtypes.bfloat16)  # HDF5 has no such type; Keras stores its bytes and says so beside them
    if dtype.name not in FLOATS or not dtype.isnative:
        raise UserError(
            f"{file}: {path}: dtype {dtype} is not supported; quantised presets are not, use the original one"
        )
    length = int(np.prod(item.shape)) * dtype.itemsize
    if offset is None or offset + length > size:
        raise UserError(
            f"{file}: {path}: not laid out as Keras does (compressed, external or truncated); download it again"
        )
    return Slice(file, offset, item.shape, dtype)
