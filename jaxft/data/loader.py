"""Batches as a function of (examples, seed, step): the same wherever a run begins, and whatever came before."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxft.data import pack
from jaxft.data.chat import Example
from jaxft.errors import UserError

# Bins are planned over so many rows of an epoch's order: enough to fill them, few enough that each epoch mixes anew.
WINDOW = 4096


@dataclass(frozen=True)
class Batch:
    """Sequences of one step, all `[B,S]`; position i of `tokens` predicts `targets[i]`.

    `segments` int32 count the rows of a sequence from 1, 0 is padding; `positions` int32 restart at 0 in each;
    `weights` float32 are 1 where the target is trained. Tokens and targets are int32, 0 in padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    weights: np.ndarray


class Loader:
    """Batches of `batch_size` sequences of `length` positions; every example is in exactly one batch of each epoch.

    A row of n tokens takes n-1 positions, because its last token predicts nothing. Raises UserError without examples
    and for one that does not fit.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        length: int,
        packing: bool = True,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.examples, self.batch_size, self.length = list(examples), batch_size, length
        self.packing, self.shuffle, self.seed = packing, shuffle, seed
        self.lengths = np.array([len(example.tokens) - 1 for example in self.examples], np.int64)
        if not self.examples:
            raise UserError("data: no examples to make batches of")
        for index in np.flatnonzero((self.lengths < 1) | (self.lengths > length))[:1]:
            raise UserError(
                f"{self.examples[index].origin}: row of {self.lengths[index] + 1} tokens; sequences of {length} "
                f"positions take rows of 2 to {length + 1}"
            )
        self._steps: dict[int, int] = {}
        self._planned: tuple[int, list[np.ndarray]] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex digest of all that decides a batch: tokens, masks, settings."""
        settings = (self.batch_size, self.length, self.packing, self.shuffle, self.seed, WINDOW)
        digest = hashlib.sha256(repr(settings).encode())
        for example in self.examples:
            digest.update(len(example.tokens).to_bytes(8, "little"))
            digest.update(example.tokens.astype("<i4").tobytes())
            digest.update(example.loss_mask.astype("u1").tobytes())
        return digest.hexdigest()

    @property
    def fill(self) -> float:
        """Share of the first epoch's positions that rows occupy."""
        return pack.fill(self._bins(0), self.lengths, self.length)

    def steps_in_epoch(self, epoch: int) -> int:
        """Steps of that epoch; packed epochs differ by a few, because each plans its own bins."""
        epoch = epoch if self.shuffle and self.packing else 0
        if epoch not in self._steps:
            self._steps[epoch] = math.ceil(len(self._bins(epoch)) / self.batch_size)
        return self._steps[epoch]

    def total_steps(self, epochs: float) -> int:
        """Steps of so many epochs; of a fractional last one its share, rounded up."""
        whole = int(epochs)
        steps = sum(self.steps_in_epoch(epoch) for epoch in range(whole))
        if epochs > whole:
            # Rounded first: 0.1 of 30 steps is 3.0000000000000004 in floating point.
            steps += math.ceil(round((epochs - whole) * self.steps_in_epoch(whole), 6))
        return max(1, steps)

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of `step`, and the step's number in it; both from 0."""
        epoch = 0
        while step >= self.steps_in_epoch(epoch):
            step -= self.steps_in_epoch(epoch)
            epoch += 1
        return epoch, step

    def batch_at(self, step: int) -> Batch:
        """The batch of `step`, counted from 0 over all epochs; the last of an epoch may hold empty sequences."""
        epoch, step = self.locate(step)
        return self._batch(self._bins(epoch), step)

    def evaluation_batches(self) -> Iterator[Batch]:
        """One pass over all examples, packed as set but never shuffled."""
        bins = self._plan(np.arange(len(self.examples)))
        for step in range(math.ceil(len(bins) / self.batch_size)):
            yield self._batch(bins, step)

    def _bins(self, epoch: int) -> list[np.ndarray]:
        """Row indices of each sequence of that epoch, in order; the last epoch asked for is kept."""
        epoch = epoch if self.shuffle else 0
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan_epoch(epoch))
        return self._planned[1]

    def _plan_epoch(self, epoch: int) -> list[np.ndarray]:
        rows = len(self.examples)
        if not self.shuffle:
            return self._plan(np.arange(rows))
        bins = self._plan(_permutation(rows, self.seed, epoch, 0))
        return [bins[i] for i in _permutation(len(bins), self.seed, epoch, 1)]

    def _plan(self, order: np.ndarray) -> list[np.ndarray]:
        if not self.packing:
            return list(order[:, None])
        windows = (order[start : start + WINDOW] for start in range(0, len(order), WINDOW))
        return [window[members] for window in windows for members in pack.plan(self.lengths[window], self.length)]

    def _batch(self, bins: list[np.ndarray], step: int) -> Batch:
        shape = (self.batch_size, self.length)
        tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
        weights = np.zeros(shape, np.float32)
        for b, members in enumerate(bins[step * self.batch_size : (step + 1) * self.batch_size]):
            at = 0
            for segment, index in enumerate(members, 1):
                example, used = self.examples[index], int(self.lengths[index])
                here = np.s_[b, at : at + used]
                tokens[here], targets[here] = example.tokens[:-1], example.tokens[1:]
                weights[here] = example.loss_mask[1:]
                positions[here], segments[here] = np.arange(used), segment
                at += used
        return Batch(tokens, targets, positions, segments, weights)


def _permutation(size: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """Indices 0 to size-1 in random order, from Philox's raw output.

    NumPy keeps a bit generator's raw stream for good but may change what Generator.permutation makes of it, and a run
    resumed after an upgrade would train other rows.
    """
    bits = np.random.Philox(key=np.array([seed, 2 * epoch + purpose], np.uint64)).random_raw(size)
    return np.argsort(bits, kind="stable")
