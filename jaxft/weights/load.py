"""Checkpoint files to sharded arrays: each device reads only its slice, and every tensor is accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.errors import UserError
from jaxft.models.arch import Arch
from jaxft.models.families import arch_from_config
from jaxft.models.tensors import Tensor, initial_adapter, initial_magnitude, initial_weight
from jaxft.weights.hub import read_json
from jaxft.weights.shards import Slice


def read_arch(folder: Path) -> Arch:
    """The architecture that the folder's config.json describes."""
    file = folder / "config.json"
    config = read_json(file, "every model")
    if config.get("quantization_config") is not None:
        raise UserError(f"{file}: quantization_config: quantised checkpoints are not supported; use the original one")
    return arch_from_config(config, str(file))


def stored_dtype(folder: Path, files: Mapping[str, Slice] | None, arch: Arch) -> Any:
    """What `dtype="auto"` keeps: that of the checkpoint's embedding or, without weights, the one that config.json names.

    float16 becomes float32: its range is too small to train in, and bfloat16 would lose its precision.
    """
    embedding = (files or {}).get(f"{arch.names.embed}.weight")
    if embedding is not None:
        stored = embedding.dtype.name
    else:
        config = read_json(folder / "config.json", "every model")
        stored = config.get("dtype") or config.get("torch_dtype")
    return jnp.dtype(jnp.bfloat16 if stored == "bfloat16" else jnp.float32)


def load_base(files: Mapping[str, Slice], rows: Iterable[Tensor], mesh: Mesh) -> dict[str, jax.Array]:
    """Path -> array for the base tensors of a table that `check` has passed, on `mesh`, cast to their rows' dtypes."""
    return {row.path: read_tensor(files, row, row.names, mesh) for row in rows if not row.adapter}


def check_base(files: Mapping[str, Slice], rows: Iterable[Tensor], arch: Arch, source: str) -> None:
    """Raises one UserError listing every tensor that is missing, unexpected, or of another shape than the model's."""
    wanted = {name: row.hub_shape for row in rows if not row.adapter for name in row.names}
    # Tied checkpoints may repeat the embedding as the head, and old ones store the rotary frequencies.
    spare = {f"{arch.names.head}.weight"} if arch.tied_head else set()
    found = {name: t for name, t in files.items() if name not in spare and not name.endswith("rotary_emb.inv_freq")}
    check(found, wanted, f"{source}: {{}} tensors do not fit config.json")


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


def read_tensor(files: Mapping[str, Slice], row: Tensor, names: tuple[str, ...], mesh: Mesh) -> jax.Array:
    """The row's variable on `mesh`, stacked from the tensors `names`; each device reads only its own slice of each."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        inner = index[1:] if row.stacked else index
        pieces = [_oriented(files[name], inner, row.transposed) for name in (names[index[0]] if row.stacked else names)]
        if not row.stacked:
            return np.asarray(pieces[0], row.dtype)
        out = np.empty((len(pieces), *pieces[0].shape), row.dtype)
        for i, piece in enumerate(pieces):
            out[i] = piece  # casts tensor by tensor, so that no more than one is held twice
        return out

    return jax.make_array_from_callback(row.shape, row.sharding(mesh), part)


def _oriented(tensor: Slice, index: tuple[slice, ...], transposed: bool) -> np.ndarray:
    return tensor[index[::-1]].T if transposed else tensor[index]


def random_base(rows: Iterable[Tensor], arch: Arch, mesh: Mesh, seed: int) -> dict[str, jax.Array]:
    """Path -> array: a seeded random start of every base tensor."""
    return {
        row.path: jax.device_put(initial_weight(row, seed, arch.init_std), row.sharding(mesh))
        for row in rows
        if not row.adapter
    }


def fresh_adapter(rows: Iterable[Tensor], base: Mapping[str, jax.Array], mesh: Mesh, seed: int) -> dict[str, jax.Array]:
    """Path -> array: new pairs, which change nothing yet, beside the arrays of `base`."""
    return {row.path: _fresh(row, base, mesh, seed) for row in rows if row.adapter}


def _fresh(row: Tensor, base: Mapping[str, jax.Array], mesh: Mesh, seed: int) -> jax.Array:
    module, _, leaf = row.path.rpartition(".")
    if leaf == "magnitude":
        return jax.jit(initial_magnitude, out_shardings=row.sharding(mesh))(base[f"{module}.kernel"])
    return jax.device_put(initial_adapter(row, seed), row.sharding(mesh))
