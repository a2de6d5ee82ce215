"""The training and evaluation steps: pure functions over pytrees, compiled once for a mesh."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jaxft.data import loader
from jaxft.learn import rounding
from jaxft.learn.loss import Scores, Tally, scores, tally
from jaxft.models import decoder
from jaxft.parallel.sharding import constrain, from_host, place, replicated, spec
from jaxft.weights.model import Loaded

ROUNDING = zlib.crc32(b"rounding")  # folds a step's key for what rounds its update; micro-batches fold in 0, 1, 2, …
Batch = dict[str, jax.Array]  # tokens, targets, positions, segments int32 and weights float32, each [B,S]


class TrainState(NamedTuple):
    """What a step changes and a checkpoint holds."""

    step: jax.Array  # int32 scalar: updates done
    trainable: dict[str, jax.Array]
    optimizer: Any


def place_batch(batch: loader.Batch, mesh: Mesh) -> Batch:
    """The batch as global arrays, rows split over the mesh."""
    return place(mesh, {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}, ("batch", None))


def abstract_inputs(
    outlined: Loaded, optimizer: optax.GradientTransformation, mesh: Mesh, shape: tuple[int, int]
) -> tuple[TrainState, dict[str, Any], Batch, jax.Array]:
    """What a training step takes, as shapes, dtypes and shardings: state, frozen, a batch of `[B,S]` = `shape`, key."""
    placed = state_sharding(outlined, optimizer, mesh)
    moments = jax.eval_shape(optimizer.init, outlined.trainable)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), outlined.trainable, moments)
    state = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, placed)
    rows = NamedSharding(mesh, spec(("batch", None), mesh, shape))
    dtypes = {f.name: jnp.float32 if f.name == "weights" else jnp.int32 for f in dataclasses.fields(loader.Batch)}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in dtypes.items()}
    return state, outlined.frozen, batch, jax.eval_shape(lambda: jax.random.key(0))


def initial_state(loaded: Loaded, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Step 0, with every leaf placed on `mesh`: moments as their parameters, counters on every device."""
    placed = state_sharding(loaded, optimizer, mesh)
    moments = jax.jit(optimizer.init, out_shardings=placed.optimizer)(loaded.trainable)
    return TrainState(from_host(np.zeros((), np.int32), placed.step), loaded.trainable, moments)


def state_sharding(loaded: Loaded, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A TrainState of NamedShardings."""
    parameters = {row.path: row.sharding(mesh) for row in loaded.rows if row.trainable}
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, loaded.trainable),
        parameters,
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(replicated(mesh), parameters, moments)


def make_train_step(
    loaded: Loaded, optimizer: optax.GradientTransformation, mesh: Mesh, *, accumulation_steps: int = 1
) -> Callable[[TrainState, dict[str, jax.Array], Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """`(state, frozen, batch, key) -> (state, metrics)`; the state is donated.

    The gradient is Σ over micro-batches of ∂Σnll, divided once by the supervised tokens of the whole batch. Metrics are
    float32 scalars: nll, correct and weight (sums), and grad_norm (before clipping); and a bool, `applied`: where loss or
    gradient is not finite, an update changes nothing but the step number, moments and the schedule's count included. Dropout
    and what rounds bfloat16 weights draw from (key, step).
    """

    def nll(trainable: Any, frozen: Any, micro: Batch, key: jax.Array) -> tuple[jax.Array, Tally]:
        model = decoder.join(loaded.graphdef, trainable, frozen)
        h, _ = model.hidden(micro["tokens"], micro["positions"], micro["segments"], key=key)
        sums = tally(model, h, micro["targets"], micro["weights"])
        return sums.nll, sums

    gradient = jax.grad(nll, has_aux=True)

    def step(state: TrainState, frozen: Any, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        grads, sums = _accumulate(gradient, state.trainable, frozen, batch, key, accumulation_steps, mesh)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / jnp.maximum(sums.weight, 1.0), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a Python float to its int32 count
            updates, moments = optimizer.update(grads, state.optimizer, state.trainable)
        norm = optax.tree.norm(grads)
        applied = jnp.isfinite(sums.nll) & jnp.isfinite(norm)
        updated = rounding.updated(state.trainable, updates, jax.random.fold_in(key, ROUNDING)), moments
        trainable, moments = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old), updated, (state.trainable, state.optimizer)
        )
        metrics = {**sums._asdict(), "grad_norm": norm, "applied": applied}
        return TrainState(state.step + 1, trainable, moments), metrics

    placed = state_sharding(loaded, optimizer, mesh)
    return jax.jit(step, out_shardings=(placed, replicated(mesh)), donate_argnums=0)


def _accumulate(
    gradient: Any, trainable: Any, frozen: Any, batch: Batch, key: jax.Array, parts: int, mesh: Mesh
) -> tuple[Any, Tally]:
    if parts == 1:
        return gradient(trainable, frozen, batch, jax.random.fold_in(key, 0))

    def cut(x: jax.Array) -> jax.Array:
        return constrain(x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), (None, "batch", None), mesh)

    def one(total: Any, part: Any) -> tuple[Any, None]:
        micro, index = part
        new = gradient(trainable, frozen, micro, jax.random.fold_in(key, index))
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, new), None

    zero = jnp.zeros((), jnp.float32)
    # Sums in float32, also of bfloat16 weights' gradients.
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable), Tally(zero, zero, zero)
    return jax.lax.scan(one, start, (jax.tree.map(cut, batch), jnp.arange(parts, dtype=jnp.int32)))[0]


def make_eval_step(loaded: Loaded, mesh: Mesh) -> Callable[[Any, Any, Batch], Scores]:
    """`(trainable, frozen, batch) -> Scores` of each position, whole on every process; without dropout."""

    def step(trainable: Any, frozen: Any, batch: Batch) -> Scores:
        model = decoder.join(loaded.graphdef, trainable, frozen)
        h, _ = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
        return scores(model, h, batch["targets"], batch["weights"])

    return jax.jit(step, out_shardings=replicated(mesh))
