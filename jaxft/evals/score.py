"""Log-likelihoods of continuations: what a model gives to tokens that follow others, in float32."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError
from jaxft.evals.tokens import check
from jaxft.models import decoder
from jaxft.parallel.sharding import batch_ways, constrain, on_host

LEAST = 32  # tokens that an input is padded to
CHUNK = 64  # positions whose logits exist at a time, per row


class Request(NamedTuple):
    """Tokens `continuation` after tokens `context`; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """Σ log p of a continuation's tokens, in nats, and whether each of them is the most likely one."""

    log_probability: float
    greedy: bool


class Scorer:
    """Scores continuations with a decoder; holds the compiled programs, so make one and keep it."""

    def __init__(self, model: decoder.Decoder, batch_size: int = 16, max_length: int | None = None):
        """`max_length` tokens are read at most; by default the model's positions."""
        self.max_length = max_length or model.arch.max_positions
        self.vocab_size = model.arch.vocab_size
        ways = 1 if model.mesh is None else batch_ways(model.mesh)
        self.rows = -(-batch_size // ways) * ways
        self.graphdef, self.trainable, self.frozen = decoder.split(model)

    def __call__(self, requests: Sequence[Request], trainable: dict[str, jax.Array] | None = None) -> list[Likelihood]:
        """One per request, in their order; `trainable` replaces the model's own trainable parameters.

        An input longer than `max_length` loses its head, as in lm-evaluation-harness. Requests that differ in their last
        token alone, such as the letters of a multiple choice, are read once. Raises UserError for tokens that the model does
        not have and continuations longer than `max_length`.
        """
        for i, request in enumerate(requests):
            self._check(i, request)
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, (context, continuation) in enumerate(requests):
            read = (*context, *continuation)[-(self.max_length + 1) : -1]
            groups.setdefault((read, len(continuation)), []).append(i)
        answers: list[Likelihood] = [Likelihood(0.0, True)] * len(requests)
        order = sorted(groups, key=lambda key: -len(key[0]))  # the longest first: what does not fit shows at once
        for start in range(0, len(order), self.rows):
            values = self.trainable if trainable is None else trainable
            self._score(order[start : start + self.rows], groups, requests, answers, values)
        return answers

    def _check(self, i: int, request: Request) -> None:
        if not (request.context and request.continuation):
            raise UserError(f"request {i}: context and continuation need a token each")
        if len(request.continuation) > self.max_length:
            raise UserError(
                f"request {i}: a continuation of {len(request.continuation)} tokens; the model reads at most {self.max_length}"
            )
        check((*request.context, *request.continuation), self.vocab_size, f"request {i}")

    def _score(
        self,
        keys: list[Any],
        groups: dict[Any, list[int]],
        requests: Sequence[Request],
        answers: list[Any],
        trainable: dict[str, jax.Array],
    ) -> None:
        """Reads these inputs, at most `rows`, and sets the answers of their requests."""
        width, choices = _padded(max(len(key[0]) for key in keys)), _power(max(len(groups[key]) for key in keys))
        scored = min(width, _padded(max(key[1] for key in keys)))
        tokens, lengths = np.zeros((self.rows, width), np.int32), np.ones(self.rows, np.int32)
        counts, targets = np.zeros(self.rows, np.int32), np.zeros((self.rows, scored), np.int32)
        last = np.zeros((self.rows, choices), np.int32)
        for row, key in enumerate(keys):
            read, count = key
            continuation = requests[groups[key][0]].continuation
            tokens[row, : len(read)], lengths[row], counts[row] = read, len(read), count
            targets[row, :count] = continuation
            last[row, : len(groups[key])] = [requests[i].continuation[-1] for i in groups[key]]
        weights = self.graphdef, trainable, self.frozen
        sums, greedy = _likelihoods(*weights, tokens, lengths, targets, counts, last)
        sums, greedy = on_host(sums), on_host(greedy)
        for row, key in enumerate(keys):
            for choice, i in enumerate(groups[key]):
                answers[i] = Likelihood(float(sums[row, choice]), bool(greedy[row, choice]))


def _padded(length: int) -> int:
    """The least of 32, 48, 64, 96, 128, … that is at least `length`: few, so that few programs are compiled."""
    size = LEAST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _power(count: int) -> int:
    """The least power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _likelihoods(
    graphdef: Any, trainable: Any, frozen: Any, tokens: Any, lengths: Any, targets: Any, counts: Any, last: Any
) -> tuple[jax.Array, jax.Array]:
    """float32 and bool `[B,K]`, for K alternatives to the last of `counts` tokens `targets` `[B,C]` that end each row.

    Logits exist for CHUNK positions of each row at a time, and only of the continuations.
    """
    model = decoder.join(graphdef, trainable, frozen)
    B, S = tokens.shape
    C = targets.shape[1]
    where = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None, :], (B, S))
    h, _ = model.hidden(tokens, where, (where < lengths[:, None]).astype(jnp.int32))
    at = jnp.clip((lengths - counts)[:, None] + jnp.arange(C, dtype=jnp.int32)[None, :], 0, S - 1)
    final = jnp.arange(C, dtype=jnp.int32)[None, :] == (counts - 1)[:, None]

    def score(part: Any) -> Any:
        """Of `[B,P]` positions and their targets: log p of the targets, of the alternatives, and what is the most likely."""
        at_BP, targets_BP = part
        logits = model.logits(jnp.take_along_axis(h, at_BP[:, :, None], axis=1))
        total = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets_BP[:, :, None], axis=2)[:, :, 0] - total
        others = jnp.take_along_axis(logits, jnp.broadcast_to(last[:, None, :], (*at_BP.shape, last.shape[1])), axis=2)
        return picked, others - total[:, :, None], jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def cut(x: jax.Array) -> jax.Array:
        width = min(CHUNK, C)
        padded = jnp.pad(x, ((0, 0), (0, -C % width)))
        return padded.reshape(B, -1, width).swapaxes(0, 1)

    def joined(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(B, -1, *x.shape[3:])[:, :C]

    picked, others, best = map(joined, jax.lax.map(score, (cut(at), cut(targets))))
    before = jnp.arange(C, dtype=jnp.int32)[None, :] < (counts - 1)[:, None]
    sums = jnp.where(before, picked, 0.0).sum(axis=1)[:, None] + jnp.where(final[:, :, None], others, 0.0).sum(axis=1)
    right = jnp.all(~before | (best == targets), axis=1)[:, None]
    chosen = jnp.where(final, best, 0).sum(axis=1)[:, None] == last
    return constrain(sums, (None, None), model.mesh), constrain(right & chosen, (None, None), model.mesh)
