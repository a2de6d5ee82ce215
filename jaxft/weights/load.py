"""Checkpoint files to sharded arrays: each device reads only its slice, and every tensor is accounted for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.models.arch import Arch
from jaxft.models.quantize import Scheme
from jaxft.models.tensors import Tensor, initial_adapter, initial_magnitude, initial_matrix, initial_weight
from jaxft.parallel.sharding import from_host
from jaxft.weights import quantized
from jaxft.weights.buffers import aligned, on_cpu, set_layer
from jaxft.weights.hub import read_json
from jaxft.weights.shards import Slice, check


def stored_dtype(folder: Path, files: Mapping[str, Slice] | None, arch: Arch) -> Any:
    """What `dtype="auto"` keeps: that of the checkpoint's embedding or, without weights, the one that config.json names."""
    embedding = (files or {}).get(f"{arch.names.embed}.weight")
    if embedding is None:
        return named_dtype(read_json(folder / "config.json", "every model"))
    return _trainable_dtype(embedding.dtype.name)


def named_dtype(config: Mapping[str, Any]) -> Any:
    """The dtype that a config.json names, float32 where none."""
    return _trainable_dtype(config.get("dtype") or config.get("torch_dtype"))


def _trainable_dtype(stored: Any) -> Any:
    """float16 becomes float32: its range is too small to train in, and bfloat16 would lose its precision."""
    return jnp.dtype(jnp.bfloat16 if stored == "bfloat16" else jnp.float32)


def load_base(files: Mapping[str, Slice], rows: Iterable[Tensor], mesh: Mesh) -> dict[str, jax.Array]:
    """Path -> array for the base tensors of a table that `check` has passed, on `mesh`, cast to their rows' dtypes, or coded
    where they have a scheme."""
    rows = list(rows)
    plain = (row for row in rows if row.of_checkpoint and row.scheme is None)
    found = {row.path: read_tensor(files, row, row.names, mesh) for row in plain}
    return found | quantized.read(quantized.of_files(files), rows, mesh)


def check_base(files: Mapping[str, Slice], rows: Iterable[Tensor], arch: Arch, source: str) -> None:
    """Raises one UserError listing every tensor that is missing, unexpected, or of another shape than the model's."""
    wanted = {name: row.hub_shape for row in rows if row.of_checkpoint for name in row.names}
    # Tied checkpoints may repeat the embedding as the head, and old ones store the rotary frequencies.
    spare = {f"{arch.names.head}.weight"} if arch.tied_head else set()
    found = {name: t for name, t in files.items() if name not in spare and not name.endswith("rotary_emb.inv_freq")}
    check(found, wanted, f"{source}: {{}} tensors do not fit config.json")


def read_tensor(files: Mapping[str, Slice], row: Tensor, names: tuple[str, ...], mesh: Mesh) -> jax.Array:
    """The row's variable on `mesh`, stacked from the tensors `names`; each device reads only its own slice of each."""
    sharding = row.sharding(mesh)
    shape = sharding.shard_shape(row.shape)

    def parts(index: tuple[slice, ...]) -> list[_Part]:
        inner = index[1:] if row.stacked else index
        chosen = names[index[0]] if row.stacked else names
        return [_Part(files[name], inner, row.transposed) for name in chosen]

    if on_cpu(sharding):
        return jax.make_array_from_callback(row.shape, sharding, lambda i: _on_host(parts(i), shape, row.dtype))
    indices = sharding.addressable_devices_indices_map(row.shape)
    shards = [_on_device(parts(index), shape, row.dtype, device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(row.shape, sharding, shards)


@dataclass(frozen=True)
class _Part:
    """A slice of one tensor of a file, in the variable's orientation."""

    tensor: Slice
    index: tuple[slice, ...]
    transposed: bool

    def get(self) -> np.ndarray:
        return self.tensor[self.index[::-1]].T if self.transposed else self.tensor[self.index]

    def into(self, out: np.ndarray) -> None:
        """Copies it into the flat, contiguous `out`, cast to its dtype."""
        first, *rest = self.index
        whole_rows = not self.transposed and all(s.indices(n) == (0, n, 1) for s, n in zip(rest, self.tensor.shape[1:]))
        if whole_rows and self.tensor.dtype == out.dtype and hasattr(self.tensor, "read_rows"):
            self.tensor.read_rows(first.start or 0, out.view(np.uint8))
            return
        piece = self.get()
        if piece.dtype.name == "bfloat16" and out.dtype == np.float32:  # by its bits: ten times as fast as by elements
            bits = out.view(np.uint32).reshape(piece.shape)
            np.copyto(bits, piece.view(np.uint16))
            np.left_shift(bits, 16, out=bits)
        else:
            out.reshape(piece.shape)[...] = piece


def _on_host(parts: Sequence[_Part], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The parts stacked in one new buffer, which JAX on a CPU takes over as it lies, because of its alignment."""
    out = aligned(shape, dtype)
    stack = out.reshape(len(parts), -1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading and copying happen without Python's lock
        list(pool.map(lambda i: parts[i].into(stack[i]), range(len(parts))))
    return out


def _on_device(parts: Sequence[_Part], shape: tuple[int, ...], dtype: Any, device: jax.Device) -> jax.Array:
    """The parts stacked on an accelerator one by one, so that the host holds one at a time."""
    with jax.default_device(device):
        stack = jnp.zeros((len(parts), math.prod(shape) // len(parts)), dtype)
    for i, part in enumerate(parts):
        value = np.ascontiguousarray(part.get()).reshape(-1)
        stack = set_layer(stack, jax.device_put(value, device), jax.device_put(np.int32(i), device))
    return jnp.reshape(stack, shape)


def random_base(rows: Iterable[Tensor], arch: Arch, mesh: Mesh, seed: int) -> dict[str, jax.Array]:
    """Path -> array: a seeded random start of every base tensor."""
    rows = list(rows)
    plain = (row for row in rows if row.of_checkpoint and row.scheme is None)
    found = {row.path: from_host(initial_weight(row, seed, arch.init_std), row.sharding(mesh)) for row in plain}
    shapes = {name: row.hub_shape for row in rows if row.scheme is not None for name in row.names}

    def drawn(name: str, part: slice) -> jax.Array:
        return initial_matrix(name, shapes[name], seed, arch.init_std)[part]

    return found | quantized.read(drawn, rows, mesh)


def fresh_adapter(rows: Iterable[Tensor], base: Mapping[str, jax.Array], mesh: Mesh, seed: int) -> dict[str, jax.Array]:
    """Path -> array: new pairs, which change nothing yet, beside the arrays of `base`."""
    rows = list(rows)
    schemes = {row.path.rpartition(".")[0]: row.scheme for row in rows if row.scheme is not None}
    return {row.path: _fresh(row, base, schemes, mesh, seed) for row in rows if row.adapter}


def _fresh(
    row: Tensor, base: Mapping[str, jax.Array], schemes: Mapping[str, Scheme], mesh: Mesh, seed: int
) -> jax.Array:
    module, _, leaf = row.path.rpartition(".")
    if leaf == "magnitude":
        kernel = quantized.kernel(base, module, schemes.get(module))
        return jax.jit(initial_magnitude, out_shardings=row.sharding(mesh))(kernel)
    return from_host(initial_adapter(row, seed), row.sharding(mesh))
