"""The adapter layer, written by hand: variable types, targets, and a linear layer with a low-rank pair beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.config import Lora
from jaxft.errors import UserError
from jaxft.models.arch import Arch


class Frozen(nnx.Variable):
    """A base tensor that no gradient reaches."""


class Trainable(nnx.Variable):
    """A tensor that the optimizer moves; float32 always."""


class LoraParam(Trainable):
    """A or B of a low-rank pair."""


class Tuned(Trainable):
    """A base tensor trained in place."""


@dataclass(frozen=True)
class Adapter:
    """One pair: y = x W + scale · dropout(x) A B."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (as PEFT)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Adaptation:
    """Which modules, by Hub path, have a pair, or that every base tensor is trained in place."""

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    every_weight: bool = False


def adaptation(lora: Lora | None, arch: Arch) -> Adaptation:
    """What `lora` means for `arch`; None trains every weight. Raises UserError for a target that matches nothing."""
    if lora is None:
        return Adaptation(every_weight=True)
    adapter = Adapter(lora.rank, float(lora.alpha), lora.dropout, lora.rslora)
    return Adaptation({path: adapter for path in targets(lora.targets, arch)})


def targets(wanted: str | tuple[str, ...], arch: Arch) -> list[str]:
    """Hub paths of the linear modules that `wanted` selects, by PEFT's rules.

    `all-linear`: every one. A sequence of names: a path that equals one or ends in `.name`. Any other string: a
    regular expression over the whole path, or a single name. UserError, with what exists, where a name matches nothing.
    """
    paths = list(arch.linear_shapes())
    if wanted == "all-linear":
        return paths
    if isinstance(wanted, str):
        try:
            selected = [p for p in paths if re.fullmatch(wanted, p)]
        except re.error as error:
            raise UserError(f"lora.targets: {wanted!r} is not a regular expression: {error}") from error
        if selected:
            return selected
        wanted = (wanted,)
    unmatched = [name for name in wanted if not any(_named(p, name) for p in paths)]
    if unmatched or not wanted:
        existing = sorted({p.rpartition(".")[2] for p in paths})
        raise UserError(
            f"lora.targets: {', '.join(map(repr, unmatched)) or 'an empty list'} matches no linear module; "
            f"{arch.family} has {', '.join(existing)} (e.g. {paths[0]})"
        )
    return [p for p in paths if any(_named(p, name) for name in wanted)]


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


class Linear(nnx.Module):
    """y = x W (+ bias) (+ the pair), for one module of each of L stacked layers; a scan strips the leading axis.

    `kernel` `[L,in,out]`, `bias` `[L,out]`, `a` `[L,in,R]`, `b` `[L,R,out]`. Every variable carries its logical `axes`,
    the Hub `names` of its L tensors, and whether the file holds its transpose.
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        shape: tuple[int, int],
        axes: tuple[str, str],
        plan: Adaptation,
        *,
        bias: bool,
        dtype: jnp.dtype,
    ):
        L, (n_in, n_out) = len(paths), shape
        self.adapter = plan.adapters.get(paths[0])
        self.kernel = base(plan, paths, (L, *shape), ("layers", *axes), dtype, transposed=True)
        self.bias = base(plan, paths, (L, n_out), ("layers", axes[1]), dtype, leaf="bias") if bias else None
        if self.adapter is not None:
            R = self.adapter.rank
            a = {"axes": ("layers", axes[0], None), "names": _names(paths, "lora_A.weight"), "transposed": True}
            b = {"axes": ("layers", None, axes[1]), "names": _names(paths, "lora_B.weight"), "transposed": True}
            self.a = LoraParam(jnp.zeros((L, n_in, R), jnp.float32), **a)
            self.b = LoraParam(jnp.zeros((L, R, n_out), jnp.float32), **b)

    def __call__(self, x: jax.Array, dropped: jax.Array | None = None) -> jax.Array:
        """x `[B,S,in]` -> `[B,S,out]`; `dropped` is x after dropout, for the pair alone (x itself where None)."""
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[None, None, :]
        if self.adapter is not None:
            x = x if dropped is None else dropped
            # x A first: A B as a matrix would cost in · out a token.
            y = y + (x @ self.a[...].astype(x.dtype)) @ self.b[...].astype(x.dtype) * self.adapter.scale
        return y


def base(
    plan: Adaptation,
    paths: tuple[str, ...],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: jnp.dtype,
    *,
    leaf: str = "weight",
    transposed: bool = False,
) -> nnx.Variable:
    """A variable for the base tensors `path.leaf`: frozen in `dtype`, or trained in place in float32."""
    kind = Tuned if plan.every_weight else Frozen
    value = jnp.zeros(shape, jnp.float32 if issubclass(kind, Trainable) else dtype)
    return kind(value, axes=axes, names=_names(paths, leaf), transposed=transposed)


def _names(paths: tuple[str, ...], leaf: str) -> tuple[str, ...]:
    return tuple(f"{path}.{leaf}" for path in paths)
