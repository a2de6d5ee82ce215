"""The table of tensors: every variable of an abstract decoder with its shape, axes and Hub names.

Loading, adapters, checkpoints, merging and sharding all read this table, so none of them knows the model's structure.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxft.models.decoder import Decoder
from jaxft.models.lora import LoraParam, Scale, Trainable
from jaxft.models.quantize import Scheme
from jaxft.parallel import sharding


@dataclass(frozen=True)
class Tensor:
    """One variable. `names` are the Hub's tensors it holds, stacked on the leading axis where that is `layers`.

    `adapter` says that it is a low-rank pair's and no checkpoint has it. `saved` are its names in an adapter's file, None
    where an adapter does not hold it. `copied` says that PEFT trains a copy of it beside the original. With a `scheme` it
    holds codes of the named tensors, and rows whose `scale` is set hold the scales beside them.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[sharding.Axis, ...]
    names: tuple[str, ...]
    transposed: bool
    trainable: bool
    adapter: bool
    saved: tuple[str, ...] | None
    copied: bool
    scheme: Scheme | None = None
    scale: bool = False

    @property
    def of_checkpoint(self) -> bool:
        """Whether it holds tensors of a checkpoint, a quantised one's codes included."""
        return not self.adapter and not self.scale

    @property
    def stacked(self) -> bool:
        """Whether the leading axis runs over `names`."""
        return self.axes[0] == "layers"

    @property
    def hub_shape(self) -> tuple[int, ...]:
        """Shape of each named tensor in the file."""
        if self.scheme is not None and self.stacked:
            return self.scheme.shape(self.shape, self.dtype)[::-1]
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """How it lies on `mesh`; UserError where an axis does not split evenly."""
        return sharding.sharding(mesh, self.axes, self.shape, self.names[0])


def table(model: Decoder) -> list[Tensor]:
    """One row per variable, in a fixed order."""
    return [_row(path, variable) for path, variable in nnx.to_flat_state(nnx.state(model))]


def _row(path: tuple[Any, ...], variable: nnx.Variable) -> Tensor:
    value, about = variable.get_value(), variable.get_metadata()
    return Tensor(
        path=".".join(map(str, path)),
        shape=tuple(value.shape),
        dtype=jnp.dtype(value.dtype),
        axes=about["axes"],
        names=about["names"],
        transposed=about["transposed"],
        trainable=isinstance(variable, Trainable),
        adapter=isinstance(variable, LoraParam),
        saved=about["saved"],
        copied=about.get("copied", False),
        scheme=about.get("scheme"),
        scale=isinstance(variable, Scale),
    )


def count_parameters(rows: Iterable[Tensor]) -> tuple[int, int]:
    """`(trainable, all)`, as PEFT counts them: all is the checkpoint's tensors, the pairs, and copies of modules in full."""
    rows = list(rows)
    stored = {name: math.prod(row.hub_shape) for row in rows if row.of_checkpoint for name in row.names}
    added = sum(row.size for row in rows if row.adapter or row.copied)
    return sum(row.size for row in rows if row.trainable), sum(stored.values()) + added


def initial_magnitude(kernel: jax.Array) -> jax.Array:
    """DoRA's start, with which a fresh pair changes nothing: the length of each output's weights, `[L,out,in]` -> `[L,out]`."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=2))


def initial_adapter(row: Tensor, seed: int) -> jax.Array:
    """A fresh pair's A or B, float32: A uniform in ±1/sqrt(in) as PEFT's, seeded by module so that stacking and order
    change nothing; B zero, so that a fresh adapter changes nothing."""
    if row.names[0].endswith("lora_B.weight"):
        return jnp.zeros(row.shape, row.dtype)
    bound, keys = 1 / math.sqrt(row.hub_shape[-1]), [_key(name, seed) for name in row.names]
    draws = [jax.random.uniform(key, row.shape[1:], row.dtype, -bound, bound) for key in keys]
    return jnp.stack(draws)


def initial_weight(row: Tensor, seed: int, std: float) -> jax.Array:
    """A random start of a base tensor: matrices normal with `std`, norms one, biases zero."""
    per_layer = row.shape[1:] if row.stacked else row.shape
    if len(per_layer) == 1:
        fill = jnp.zeros if row.names[0].endswith("bias") else jnp.ones
        return fill(row.shape, row.dtype)
    draws = [initial_matrix(name, per_layer, seed, std).astype(row.dtype) for name in row.names]
    return jnp.stack(draws) if row.stacked else draws[0]


def initial_matrix(name: str, shape: tuple[int, ...], seed: int, std: float) -> jax.Array:
    """The random start of one named tensor, float32."""
    return std * jax.random.normal(_key(name, seed), shape, jnp.float32)


def _key(name: str, seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
