"""The very step that `train` runs, compiled for a place: what it holds, computes and sends."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from jaxft.config import Config
from jaxft.learn import recompute
from jaxft.learn.recompute import Compiled, Traceable
from jaxft.parallel import topology as topologies
from jaxft.parallel.mesh import check_batch, make_mesh, usable_bytes
from jaxft.plans import network, work
from jaxft.weights import model
from jaxft.weights.model import Source

STEPS = 1000  # of a schedule whose length depends on rows that are not read; no shape depends on it


@dataclass(frozen=True)
class Program:
    """The step of a run for a place, compiled under the first policy that fits."""

    source: Source
    mesh: Mesh
    traced: Traceable
    compiled: Compiled


def prepare(settings: Config, topology: str) -> tuple[Source, Mesh, int, tuple[int, int]]:
    """Model, mesh, steps and batch. Rows are of data.max_length, as packed ones are; no row is read, and no weight."""
    source = model.sketch(settings.model, settings.lora)
    mesh = make_mesh(settings.mesh, topologies.devices(topology))
    check_batch(settings.optim, mesh)
    return source, mesh, settings.optim.max_steps or STEPS, shape(settings, source)


def shape(settings: Config, source: Source) -> tuple[int, int]:
    """`[B,S]` of a step's batch."""
    return settings.optim.batch_size, min(settings.data.max_length, source.arch.max_positions)


def build(settings: Config, topology: str) -> Program:
    """Compiles. Raises UserError, and DoesNotFit where no policy does."""
    source, mesh, steps, batch = prepare(settings, topology)
    found = recompute.compile_step(settings, source, mesh, steps, batch, usable_bytes(mesh))
    return Program(source, mesh, recompute.traceable(settings, source, mesh, steps, batch, found.policy), found)


def lowered(settings: Config, topology: str) -> jax.stages.Lowered:
    """The training step lowered; with `model.remat` auto it is compiled first, to find the policy that fits the chips.

    Raises UserError, and DoesNotFit.
    """
    if settings.model.remat == "auto":
        found = build(settings, topology).traced
    else:
        found = recompute.traceable(settings, *prepare(settings, topology), settings.model.remat)
    return found.step.lower(*found.inputs)


def memory(found: Traceable, lora: bool, total: int) -> dict[str, float]:
    """Bytes of one chip while the step runs. Inputs by the shapes of their shards; activations are what is left of the total:
    what the policy keeps, temporaries, the program itself, and what tiles of (8, 128) add to small arrays."""
    state, frozen, batch, _ = found.inputs
    trained, moments = _shards(state.trainable), _shards(state.optimizer)
    inputs = {
        "weights_bytes_per_chip": _shards(frozen) + (0 if lora else trained),
        "lora_bytes_per_chip": trained if lora else 0,
        "optimizer_bytes_per_chip": moments,
        "batch_bytes_per_chip": _shards(batch),
    }
    return inputs | {"activations_bytes_per_chip": total - sum(inputs.values()), "total_bytes_per_chip": total}


def _shards(tree: Any) -> int:
    arrays = [x for x in jax.tree.leaves(tree) if x.sharding is not None]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


def flops_per_token(found: Traceable) -> float:
    """Of one position in matmuls, over all chips, counted on the traced step; the head's for every position."""
    rows, length = found.inputs[2]["tokens"].shape
    return sum(work.of_step(found).values()) / (rows * length)


def moved(executable: jax.stages.Compiled, chips: int) -> network.Moved | None:
    """What a chip takes in; None where this libtpu does not print the program, or not as this reads it."""
    try:
        with _muted():
            text = executable.as_text()
        return network.moved(text, chips)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, KeyError):
        return None


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Keeps off the terminal the stack trace of libtpu (0.0.52) where it cannot print its own program, as some for v6e."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def with_batch(settings: Config, batch_size: int, policy: str | None = None) -> Config:
    """The same run with another batch, and a policy of its own."""
    changed = replace(settings, optim=replace(settings.optim, batch_size=batch_size))
    return changed if policy is None else replace(changed, model=replace(changed.model, remat=policy))
