"""Matmul FLOPs of a traced function, and what its matmuls yield; scans and shard_maps are multiplied out.

XLA's own `cost_analysis()` counts the body of a loop once, and of a model in one scan that is a single layer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.interpreters import partial_eval

from jaxft.learn.recompute import Traceable
from jaxft.models.arch import Arch


def of_step(found: Traceable) -> Counter[tuple[int, ...]]:
    """Output shape -> FLOPs of a training step, over all devices; what nothing uses is left out."""
    traced = jax.make_jaxpr(lambda *inputs: found.step(*inputs))(*found.inputs)
    used, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    total: Counter[tuple[int, ...]] = Counter()
    for shape, flops, _ in dots(used):
        total[shape] += flops
    return total


def ideal(arch: Arch, tokens: int, *, frozen: bool = True) -> int:
    """4N + 4DV a token, 6 where weights are trained: every linear layer and the head forward, and backward to what goes in."""
    return tokens * (arch.flops_per_token(frozen=frozen) + arch.head_flops_per_token(frozen=frozen))


def dots(jaxpr: Any, times: int = 1) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """`(shape of the output, FLOPs, of how many)` of each dot_general in a jaxpr, those within other equations included.

    Of a `cond` the costliest branch counts; a Pallas kernel's inside is not looked at.
    """
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.outvars[0].aval.shape
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            yield shape, 2 * math.prod(shape) * inner * times, times
        elif name == "cond":
            branches = [list(dots(branch.jaxpr, times)) for branch in parameters["branches"]]
            yield from max(branches, key=lambda branch: sum(flops for _, flops, _ in branch))
        elif name != "pallas_call":
            inside = times * parameters.get("length", 1) if name == "scan" else times
            inside *= parameters["mesh"].size if name == "shard_map" else 1
            for inner in _jaxprs(parameters):
                yield from dots(inner, inside)


def _jaxprs(parameters: Mapping[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            found = getattr(one, "jaxpr", one)
            if hasattr(found, "eqns"):
                yield found
