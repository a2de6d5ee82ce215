"""Safetensors files as lazy slices: headers are parsed and checked here, bytes are read where a device wants them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.bounds import check_values
from jaxft.errors import UserError
from jaxft.weights.hub import read_json

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
HEADER_LIMIT_BYTES = 10 << 20  # of a hundred thousand tensors; a larger one, parsed, would fill the memory
HEADER_LIMIT_VALUES = 1_200_000
SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")


@dataclass(frozen=True)
class Slice:
    """A tensor in a file; indexing reads only the bytes it needs."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)[index]

    def read_rows(self, first: int, out: np.ndarray) -> None:
        """Reads consecutive rows (along the first dimension) from `first` on into contiguous `out` of the same dtype.

        No page is mapped, which for fresh memory is half the cost. Raises UserError where the file has become shorter.
        """
        left, at = memoryview(out).cast("B"), self.offset + first * math.prod(self.shape[1:]) * self.dtype.itemsize
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(at)
            while left:
                count = stream.readinto(left)
                if not count:
                    raise UserError(f"{self.file}: truncated while it was read")
                left = left[count:]


def open_folder(folder: Path) -> dict[str, Slice]:
    """Every tensor of the checkpoint in `folder`, by name: one model.safetensors, or the shards of its index.

    Raises UserError for missing, damaged and pickle files, and for an index that names a file outside the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        return _open_shards(folder, index)
    if single.is_file():
        return open_file(single)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: has only pickle weights ({pickles[0]}), which can run code when read; convert them to safetensors "
            "(in transformers: model.save_pretrained(folder, safe_serialization=True))"
        )
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _open_shards(folder: Path, index: Path) -> dict[str, Slice]:
    places = read_json(index, "a sharded checkpoint").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: no weight_map")
    opened: dict[str, dict[str, Slice]] = {}
    for name in sorted(set(map(str, places.values()))):
        if not SHARD_NAME.fullmatch(name):
            raise UserError(f"{index}: weight_map names {name!r}; shards are safetensors files in the same folder")
        opened[name] = open_file(folder / name)
    lost = [tensor for tensor, name in places.items() if tensor not in opened[name]]
    if lost:
        raise UserError(
            f"{index}: {len(lost)} tensors are not in the shard it names, first {lost[0]} in {places[lost[0]]}"
        )
    return {tensor: found for shard in opened.values() for tensor, found in shard.items()}


def open_file(file: Path) -> dict[str, Slice]:
    """The tensors of one safetensors file. Raises UserError where header and length do not agree."""
    header, start, size = _header(file)
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        found[name] = _slice(file, name, entry, start, size)
    return found


def _header(file: Path) -> tuple[Mapping[str, Any], int, int]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
                raise UserError(f"{file}: a header of {length} bytes in a file of {size}; truncated? download it again")
            text = stream.read(length)
        check_values(text, HEADER_LIMIT_VALUES, f"{file}: header")
        header = json.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; download the checkpoint again") from error
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: not a safetensors file: its header is no object")
    return header, 8 + length, size


def _slice(file: Path, name: str, entry: Any, start: int, size: int) -> Slice:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: {name}: damaged header entry") from error
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise UserError(f"{file}: {name}: damaged header entry: shape and data_offsets must be counts")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise UserError(f"{file}: {name}: dtype {kind} is not supported; supported: {', '.join(DTYPES)}")
    if end - begin != math.prod(shape) * DTYPES[kind].itemsize:
        raise UserError(f"{file}: {name}: {end - begin} bytes do not make {kind} {shape}")
    if start + end > size:
        raise UserError(f"{file}: truncated: {size} bytes, expected at least {start + end}; download it again")
    return Slice(file, start + begin, shape, DTYPES[kind])


def check(found: Mapping[str, Slice], wanted: Mapping[str, tuple[int, ...]], complaint: str) -> None:
    """Raises one UserError, `complaint` with the number of faults, listing what is missing, unexpected or misshapen."""
    faults = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    faults += [f"unexpected {name} {tensor.shape}" for name, tensor in found.items() if name not in wanted]
    faults += [
        f"{name}: file {found[name].shape}, model {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if faults:
        raise UserError(f"{complaint.format(len(faults))}: {'; '.join(faults)}")


def write_file(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file, with the metadata that transformers and PEFT ask for."""
    from safetensors.numpy import save_file

    file.touch()
    mode = file.stat().st_mode  # the library makes files that only their owner may read
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)
