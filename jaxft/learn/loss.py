"""Cross-entropy and token accuracy in one pass over chunks of supervised tokens, with the gradient formed on the way."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxft.models.decoder import Decoder
from jaxft.models.lora import Trainable
from jaxft.models.vocabulary import ROWS, vocabulary_split

CHUNK_ELEMENTS = 1 << 25  # logits that a device holds at once: 128 MiB in float32
MIN_CHUNK = 512  # tokens; with fewer, reading the head takes longer than computing with it
# On one device: tokens, and the columns of their logits at once, so that these stay in a CPU's cache, and small elsewhere.
SWEPT_CHUNK, COLUMNS, CPU_COLUMNS = 1024, 16384, 2048
LANES = 128  # of a TPU; what is cut elsewhere is padded


class Tally(NamedTuple):
    """Sums over supervised tokens, float32 scalars; their quotients do not depend on how the tokens were batched."""

    nll: jax.Array
    correct: jax.Array
    weight: jax.Array

    def __add__(self, other: Tally) -> Tally:  # type: ignore[override]
        return Tally(*(a + b for a, b in zip(self, other)))


class Scores(NamedTuple):
    """Of each position's target, `[B,S]`: its negative log-likelihood in nats, float32; whether it was the most likely, bool.

    Zero and False where a position is not supervised.
    """

    nll: jax.Array
    correct: jax.Array

    def plus(self, indices: jax.Array, chunk: Scores) -> Scores:
        """With those of a chunk's tokens put at `indices` of the flat arrays."""
        return Scores(*(x.at[indices].set(part, mode="drop") for x, part in zip(self, chunk)))


class _Head(NamedTuple):
    """What is known of the output matrix when compiling."""

    cap: float | None
    trained: bool
    split: tuple[str, ...]  # mesh axes over which its rows lie
    mesh: Mesh | None
    columns: int | None  # of logits at once, where the head lies on one device and is frozen; None: whole rows
    gathers: bool  # single logits quickly, as a CPU does

    @property
    def shared(self) -> tuple[str, ...]:
        """The mesh axes over which devices hold other tokens as well as other rows of the head."""
        return tuple(axis for axis in self.split if axis in ROWS)


class _Table(NamedTuple):
    """The output matrix: its rows `[V,D]`, or their int8 codes and the rows' scale `[V]`, which is for the logits."""

    rows: jax.Array
    scale: jax.Array | None

    def scaled(self, logits: jax.Array) -> jax.Array:
        """`[T,V]` as the rows themselves would have made it, float32."""
        return logits if self.scale is None else logits * self.scale[None, :]

    def part(self, first: Any, count: int) -> _Table:
        """So many rows from `first` on."""
        return _Table(*(None if x is None else jax.lax.dynamic_slice_in_dim(x, first, count) for x in self))

    def looked_up(self, indices: jax.Array) -> jax.Array:
        """Rows at `[T]` indices, float32 `[T,D]`."""
        found = self.rows[indices].astype(jnp.float32)
        return found if self.scale is None else found * self.scale[indices][:, None]


class _Sums(NamedTuple):
    """A training pass's result; the gradients are of the sum of nll, the head's None where it is not trained."""

    tally: Tally
    hidden: jax.Array
    head: jax.Array | None

    def plus(self, indices: jax.Array, chunk: _Sums) -> _Sums:
        """With a chunk's added, its hidden gradients put at `indices`."""
        placed = self.hidden.at[indices].set(chunk.hidden, mode="drop")
        tally, head = jax.tree.map(jnp.add, (self.tally, self.head), (chunk.tally, chunk.head))
        return _Sums(tally, placed, head)


def tally(model: Decoder, h: jax.Array, targets: jax.Array, weights: jax.Array) -> Tally:
    """Loss and accuracy sums of hidden `[B,S,D]` against int32 targets `[B,S]` under float32 weights `[B,S]`.

    Tokens of weight 0 cost nothing. The gradient with respect to h, and to the head where it is trained, is formed while a
    chunk's logits are there, so no logits are kept or formed again. Of equal largest logits the first counts as predicted.
    """
    return _tally(*_head(model), h, targets, weights)


def scores(model: Decoder, h: jax.Array, targets: jax.Array, weights: jax.Array) -> Scores:
    """Of every position with a weight above 0, as `tally` sums them up; forward only, and never with logits `[B,S,V]`."""
    return _pass(*_head(model), h, targets, weights, gradients=False)


def _head(model: Decoder) -> tuple[_Head, _Table]:
    split = vocabulary_split(model.arch.vocab_size, model.mesh)
    mesh = model.mesh if split else None
    variable = model.embed if model.head is None else model.head
    trained = isinstance(variable, Trainable)
    swept = model.mesh is not None and not trained and not split
    on_cpu = swept and _on_cpu(model.mesh)
    columns = _columns(model.arch.vocab_size, CPU_COLUMNS if on_cpu else COLUMNS) if swept else None
    return _Head(model.arch.logit_cap, trained, split, mesh, columns, on_cpu), _Table(variable[...], model.head_scale)


def _on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _columns(vocab_size: int, most: int) -> int:
    """At most `most`, and so that all parts are equal where at most twice as many of them can be."""
    fewest = -(-vocab_size // most)
    equal = (n for n in range(fewest, 2 * fewest) if vocab_size % (n * LANES) == 0)
    return next((vocab_size // n for n in equal), min(most, vocab_size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tally(head: _Head, table: _Table, h: jax.Array, targets: jax.Array, weights: jax.Array) -> Tally:
    found = _pass(head, table, h, targets, weights, gradients=False)
    return _summed(found.nll, found.correct, weights)


def _forward(head: _Head, table: _Table, h: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    sums = _pass(head, table, h, targets, weights, gradients=True)
    return sums.tally, (sums.hidden, sums.head)


def _backward(head: _Head, gradients: tuple[jax.Array, jax.Array | None], given: Tally) -> tuple[Any, ...]:
    of_h, of_head = gradients
    of_table = None if of_head is None else _Table(of_head * given.nll.astype(of_head.dtype), None)
    return of_table, of_h * given.nll.astype(of_h.dtype), None, None


_tally.defvjp(_forward, _backward)


def _pass(head: _Head, table: _Table, h: jax.Array, targets: jax.Array, weights: jax.Array, *, gradients: bool) -> Any:
    """_Sums with `gradients`, else Scores."""
    local = functools.partial(_local, head, gradients=gradients)
    if head.mesh is None:
        return local(table, h, targets, weights)
    rows, split = PartitionSpec(ROWS), PartitionSpec(head.split)
    out: Any = _Sums(PartitionSpec(), rows, split if head.trained else None) if gradients else Scores(rows, rows)
    spread = jax.shard_map(
        local, mesh=head.mesh, in_specs=(split, rows, rows, rows), out_specs=out, check_vma=False
    )  # fmt: skip
    return spread(table, h, targets, weights)


def _local(head: _Head, table: _Table, h: jax.Array, targets: jax.Array, weights: jax.Array, *, gradients: bool) -> Any:
    """One device's share. Its rows are shared with the fsdp group where that holds other parts of the vocabulary."""
    (B, S, D), V = h.shape, table.rows.shape[0]
    ways = head.mesh.shape["fsdp"] if head.shared else 1
    largest = SWEPT_CHUNK if head.columns else max(1, MIN_CHUNK // ways, CHUNK_ELEMENTS // (V * ways))
    chunk = _chunk_size(B * S, largest)
    supervised = weights.reshape(-1) > 0
    order = _supervised_first(supervised, chunk)
    needed = jnp.sum(supervised.astype(jnp.int32))
    if head.mesh is not None:  # all devices go through a chunk together, or none does
        needed = jax.lax.pmax(needed, head.mesh.axis_names)
    flat = h.reshape(-1, D), targets.reshape(-1), weights.reshape(-1)

    def compute(total: Any, indices: jax.Array) -> Any:
        # Indices beyond the end, which fill the last chunk, read zeros and write nothing.
        rows = [x.at[indices].get(mode="fill", fill_value=0) for x in flat]
        return total.plus(indices, (_swept if head.columns else _chunk)(head, table, *rows, gradients=gradients))

    def one(total: Any, step: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        first, indices = step
        return jax.lax.cond(first < needed, compute, lambda total, indices: total, total, indices), None

    steps = jnp.arange(0, order.size, chunk, dtype=jnp.int32), order.reshape(-1, chunk)
    if not gradients:
        start = Scores(jnp.zeros((B * S,), jnp.float32), jnp.zeros((B * S,), jnp.bool_))
        # What fills the last chunk up is not supervised, but computed.
        nll, correct = jax.lax.scan(one, start, steps)[0]
        return Scores(jnp.where(supervised, nll, 0.0).reshape(B, S), (correct & supervised).reshape(B, S))
    zero = jnp.zeros((), jnp.float32)
    of_head = jnp.zeros((V, D), jnp.float32) if head.trained else None
    sums, _ = jax.lax.scan(one, _Sums(Tally(zero, zero, zero), jnp.zeros((B * S, D), h.dtype), of_head), steps)
    if head.mesh is not None:
        apart = tuple(axis for axis in ROWS if axis not in head.shared)
        sums = sums._replace(**jax.tree.map(lambda x: jax.lax.psum(x, apart), {"tally": sums.tally, "head": sums.head}))
    of_head = None if sums.head is None else sums.head.astype(table.rows.dtype)
    return _Sums(sums.tally, sums.hidden.reshape(B, S, D), of_head)


def _chunk_size(tokens: int, largest: int) -> int:
    """Tokens per chunk: at most `largest`, and so that chunks are equal where at most twice as many of them can be."""
    fewest = -(-tokens // largest)
    chunks = next((n for n in range(fewest, 2 * fewest) if tokens % n == 0), fewest)
    return -(-tokens // chunks)


def _supervised_first(supervised: jax.Array, chunk: int) -> jax.Array:
    """Indices of `[T]` tokens, supervised ones first, padded to whole chunks with indices beyond the end."""
    T = supervised.size
    rank, index = jnp.cumsum(supervised.astype(jnp.int32)), jnp.arange(T, dtype=jnp.int32)
    place = jnp.where(supervised, rank - 1, rank[-1] + index - rank)
    padded = -(-T // chunk) * chunk
    return jnp.arange(padded, dtype=jnp.int32).at[place].set(index)


def _chunk(head: _Head, table: _Table, h: jax.Array, targets: jax.Array, weights: jax.Array, *, gradients: bool) -> Any:
    """_Sums or Scores of `[T]` tokens with hidden `[T,D]`; logits `[T,V]` live here only, in float32."""
    T = h.shape[0]
    if head.shared:
        h, targets, weights = (jax.lax.all_gather(x, head.shared, axis=0, tiled=True) for x in (h, targets, weights))
    kernel = table.rows.astype(h.dtype)
    raw = table.scaled(jnp.einsum("TD,VD->TV", h, kernel, preferred_element_type=jnp.float32))
    bent = None if head.cap is None else jnp.tanh(raw / head.cap)
    logits = raw if bent is None else head.cap * bent
    columns = jnp.arange(logits.shape[1], dtype=jnp.int32) + _first_row(head, logits.shape[1])
    is_target = columns[None, :] == targets[:, None]
    chosen = _sum(head, jnp.sum(jnp.where(is_target, logits, 0.0), axis=1))
    top = jnp.max(logits, axis=1)
    top = jax.lax.pmax(top, head.split) if head.split else top
    exp = jnp.exp(logits - top[:, None])
    total = _sum(head, jnp.sum(exp, axis=1))
    # The argmax without its index: nothing is larger than the target's logit, and nothing before it as large.
    beaten = (logits > chosen[:, None]) | ((logits == chosen[:, None]) & (columns[None, :] < targets[:, None]))
    right = _sum(head, jnp.sum(beaten.astype(jnp.float32), axis=1)) == 0
    nll = jnp.log(total) + top - chosen
    if not gradients:
        own = jax.lax.axis_index(head.shared) * T if head.shared else 0
        return Scores(*(jax.lax.dynamic_slice_in_dim(x, own, T) for x in (nll, right)))
    sums = _summed(nll, right, weights)
    of_logits = (exp / total[:, None] - is_target.astype(jnp.float32)) * weights[:, None]
    if bent is not None:
        of_logits = of_logits * (1 - jnp.square(bent))
    of_logits = table.scaled(of_logits).astype(h.dtype)
    of_h = jnp.einsum("TV,VD->TD", of_logits, kernel, preferred_element_type=jnp.float32)
    if head.shared:
        of_h = jax.lax.psum_scatter(of_h, head.shared, scatter_dimension=0, tiled=True)
    if "tensor" in head.split:
        of_h = jax.lax.psum(of_h, "tensor")
    of_head = jnp.einsum("TV,TD->VD", of_logits, h, preferred_element_type=jnp.float32) if head.trained else None
    return _Sums(sums, of_h.astype(h.dtype), of_head)


def _swept(head: _Head, table: _Table, h: jax.Array, targets: jax.Array, weights: jax.Array, *, gradients: bool) -> Any:
    """As `_chunk` for a frozen head that is not split, by parts of the vocabulary, as flash attention goes over its keys.

    The gradient is Σ_v exp(logit_v) head_v / Σ_v exp(logit_v) - head_target, so running sums, rescaled whenever a larger logit
    comes, stand in for the softmax, and the head is read once for all tokens.
    """
    (T, _), V = h.shape, table.rows.shape[0]
    columns = head.columns

    def part(carry: Any, first: jax.Array, table: _Table) -> Any:
        top, total, mixed, chosen, predicted, slope = carry
        kernel = table.rows.astype(h.dtype)
        raw = table.scaled(jnp.einsum("TD,VD->TV", h, kernel, preferred_element_type=jnp.float32))
        bent = None if head.cap is None else jnp.tanh(raw / head.cap)
        logits = raw if bent is None else head.cap * bent
        largest = jnp.max(logits, axis=1)
        higher = jnp.maximum(top, largest)
        exp, faded = jnp.exp(logits - higher[:, None]), jnp.exp(top - higher)
        at = targets - first
        inside = (at >= 0) & (at < kernel.shape[0])
        index = jnp.arange(kernel.shape[0], dtype=jnp.int32)
        if head.gathers:
            own = jnp.take_along_axis(logits, jnp.clip(at, 0, kernel.shape[0] - 1)[:, None], axis=1)[:, 0]
        else:
            own = jnp.sum(jnp.where(index[None, :] == at[:, None], logits, 0.0), axis=1)
        best = first + jnp.min(jnp.where(logits == largest[:, None], index[None, :], kernel.shape[0]), axis=1)
        if gradients:
            pull = exp if bent is None else exp * (1 - jnp.square(bent))
            pulled = jnp.einsum(
                "TV,VD->TD", table.scaled(pull).astype(h.dtype), kernel, preferred_element_type=jnp.float32
            )
            mixed = mixed * faded[:, None] + pulled
            if bent is not None:
                slope = jnp.where(inside, 1 - jnp.square(own / head.cap), slope)
        total = total * faded + jnp.sum(exp, axis=1)
        chosen, predicted = jnp.where(inside, own, chosen), jnp.where(largest > top, best, predicted)
        return higher, total, mixed, chosen, predicted, slope

    zero = jnp.zeros((T,), jnp.float32)
    mixed = jnp.zeros(h.shape if gradients else (), jnp.float32)
    carry = (
        jnp.full((T,), -jnp.inf, jnp.float32),
        zero,
        mixed,
        zero,
        jnp.zeros((T,), jnp.int32),
        jnp.ones((T,), jnp.float32),
    )
    whole = V // columns

    def one(carry: Any, i: jax.Array) -> tuple[Any, None]:
        return part(carry, i * columns, table.part(i * columns, columns)), None

    carry, _ = jax.lax.scan(one, carry, jnp.arange(whole, dtype=jnp.int32))
    if V % columns:
        carry = part(carry, jnp.int32(whole * columns), table.part(whole * columns, V % columns))
    top, total, mixed, chosen, predicted, slope = carry
    nll, right = jnp.log(total) + top - chosen, predicted == targets
    if not gradients:
        return Scores(nll, right)
    of_h = weights[:, None] * (mixed / total[:, None] - slope[:, None] * table.looked_up(targets))
    return _Sums(_summed(nll, right, weights), of_h.astype(h.dtype), None)


def _summed(nll: jax.Array, right: jax.Array, weights: jax.Array) -> Tally:
    return Tally(jnp.sum(nll * weights), jnp.sum(right.astype(jnp.float32) * weights), jnp.sum(weights))


def _first_row(head: _Head, rows: int) -> Any:
    """The vocabulary's index of this device's first row."""
    return jax.lax.axis_index(head.split) * rows if head.split else 0


def _sum(head: _Head, x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, head.split) if head.split else x
