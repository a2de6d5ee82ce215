"""Matrices quantised while they are read: one at a time is held as the file has it, on the host and on the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.models.quantize import Scheme, encode_rows
from jaxft.models.tensors import Tensor
from jaxft.weights.buffers import Stack

ROWS = 8192  # of a table that are coded at once
Matrix = Callable[[str, slice], Any]  # (name, rows) -> those rows of the named matrix, [rows,in]


def read(matrix: Matrix, rows: Iterable[Tensor], mesh: Mesh) -> dict[str, jax.Array]:
    """Path -> array for the codes and scales among the rows of a table, on `mesh`, whatever `matrix` gives."""
    held = [row for row in rows if row.scheme is not None or row.scale]
    found: dict[str, jax.Array] = {}
    for _, module in groupby(sorted(held, key=lambda row: row.names), key=lambda row: row.names):
        of_one = list(module)
        found |= (_module if of_one[0].stacked else _tables)(matrix, of_one, mesh)
    return found


def _tables(matrix: Matrix, rows: Sequence[Tensor], mesh: Mesh) -> dict[str, jax.Array]:
    """Of an embedding or head, or both where a head begins as the embedding: codes `[V,D]` and scale `[V]` of each."""
    parts: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def part(row: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(row.shape[0])
        if (start, stop) not in parts:
            parts[start, stop] = _coded_rows(matrix, row.names[0], start, stop)
        codes, scale = parts[start, stop]
        return scale if row.scale else codes[:, index[1]]

    def array(row: Tensor) -> jax.Array:
        return jax.make_array_from_callback(row.shape, row.sharding(mesh), lambda index: part(row, index))

    return {row.path: array(row) for row in rows}


def _coded_rows(matrix: Matrix, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale of a table's rows, coded block by block."""
    blocks = [encoded_rows(matrix(name, slice(i, min(i + ROWS, stop)))) for i in range(start, stop, ROWS)]
    codes, scale = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*blocks))
    return codes, scale


def _module(matrix: Matrix, rows: Sequence[Tensor], mesh: Mesh) -> dict[str, jax.Array]:
    """Of one linear module: its codes' row and those of its scales."""
    codes = next(row for row in rows if row.scheme is not None)
    stacks = {_leaf(row): Stack(row.shape, row.dtype, row.sharding(mesh)) for row in rows}
    by_output = {name: stack for name, stack in stacks.items() if len(stack.shape) > 2}
    whole = len(by_output) < len(stacks)  # blocks that run over the ends of rows, or a scale of all scales
    spans = [(0, codes.shape[-1])] if whole else [span for stack in by_output.values() for span in stack.spans]
    low, high = min(start for start, _ in spans), max(stop for _, stop in spans)
    for i, name in enumerate(codes.names):
        coded = encoded(codes.scheme, matrix(name, slice(low, high)))
        for part, stack in stacks.items():
            stack.put(i, coded[part], low if part in by_output else 0)
    return {row.path: stacks[_leaf(row)].array() for row in rows}


def _leaf(row: Tensor) -> str:
    """`codes`, or the name of a scale."""
    return row.path.rpartition(".")[2]


@functools.partial(jax.jit, static_argnums=0)
def encoded(scheme: Scheme, weights: jax.Array) -> dict[str, jax.Array]:
    """`scheme.encode` compiled; on the first device."""
    return scheme.encode(weights)


encoded_rows = jax.jit(encode_rows)


def kernel(arrays: Mapping[str, jax.Array], module: str, scheme: Scheme | None) -> jax.Array:
    """The weights `[L,out,in]` of the module at a path, as they lie there or decoded in float32."""
    if scheme is None:
        return arrays[f"{module}.kernel"]
    codes = arrays[f"{module}.codes"]
    names = scheme.scales(scheme.shape(codes.shape, codes.dtype))
    scales = {name: arrays[f"{module}.scales.{name}"] for name in names}
    decode = jax.vmap(lambda codes, scales: scheme.decode(codes, scales, jnp.float32).T)
    return jax.jit(decode)(codes, scales)


def of_files(files: Mapping[str, Any]) -> Matrix:
    """Reads matrices as a checkpoint's files hold them."""
    return lambda name, rows: np.ascontiguousarray(files[name][rows, slice(None)])
