"""Batches as a function of (examples, seed, step): the same wherever a run begins, and whatever came before."""

from __future__ import annotations

import contextlib
import hashlib
import math
import queue
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

from jaxft.data import pack
from jaxft.data.chat import Example
from jaxft.errors import UserError

T = TypeVar("T")

# Unpacked sequences are padded to one of so many lengths, each a multiple kind to the hardware's tiles: as many compiles.
LENGTHS, LENGTH_MULTIPLE = 4, 64
# Bins are planned over so many rows of an epoch's order: enough to fill them, few enough that each epoch mixes anew.
WINDOW = 4096
_NO_EPOCH = 1 << 62  # a stream of random bits that no epoch reaches


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

    Without `packing` a batch holds rows of about one length and is padded to one of `lengths`. A row of n tokens takes n-1
    positions, because its last token predicts nothing. Raises UserError without examples and for one that does not fit.
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
        lengths_padded: Sequence[int] | None = None,
    ) -> None:
        """`lengths_padded` are those of another loader, to have no shapes besides; they are added to where a row is longer."""
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
        if packing:
            lengths_padded = [length]
        elif lengths_padded is None:
            lengths_padded = _padded_lengths(self.lengths, length)
        elif self.lengths.max() > max(lengths_padded):
            lengths_padded = [*lengths_padded, length]
        self.lengths_padded = list(lengths_padded)
        self._steps: dict[int, int] = {}
        self._planned: tuple[int, list[np.ndarray]] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex digest of all that decides a batch: tokens, masks, settings."""
        settings = (
            self.batch_size,
            self.length,
            self.packing,
            self.shuffle,
            self.seed,
            WINDOW,
            LENGTHS,
            LENGTH_MULTIPLE,
        )
        digest = hashlib.sha256(repr(settings).encode())
        for example in self.examples:
            digest.update(len(example.tokens).to_bytes(8, "little"))
            digest.update(example.tokens.astype("<i4").tobytes())
            digest.update(example.loss_mask.astype("u1").tobytes())
        return digest.hexdigest()

    @property
    def fill(self) -> float:
        """Share of the first epoch's positions that rows occupy; of the sequences that are there, where rows are packed."""
        bins = self._bins(0)
        if self.packing:
            return pack.fill(bins, self.lengths, self.length)
        batches = [bins[at : at + self.batch_size] for at in range(0, len(bins), self.batch_size)]
        return int(self.lengths.sum()) / sum(self.batch_size * self._width(batch) for batch in batches)

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

    @property
    def largest_batch(self) -> tuple[int, int]:
        """`[B,S]` of the longest batch; packed ones are all of it."""
        return self.batch_size, self.lengths_padded[-1]

    def batch_at(self, step: int, rows: Container[int] | None = None) -> Batch:
        """The batch of `step`, counted from 0 over all epochs; the last of an epoch may hold empty sequences.

        Only the sequences `rows` are filled (all where None), those that this host's devices take; the shape is the same.
        """
        epoch, step = self.locate(step)
        return self._batch(self._bins(epoch), step, rows)

    def tokens_at(self, step: int) -> int:
        """Real tokens of that step's whole batch, whoever fills it."""
        epoch, step = self.locate(step)
        chosen = self._bins(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        return sum(int(self.lengths[members].sum()) for members in chosen)

    def origins_at(self, step: int) -> list[str]:
        """Where the rows of that step's whole batch came from, in order."""
        epoch, step = self.locate(step)
        chosen = self._bins(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        return [self.examples[i].origin for members in chosen for i in members]

    def evaluation_batches(self, rows: Container[int] | None = None) -> Iterator[Batch]:
        """One pass over all examples, packed as set but never shuffled; `rows` as in `batch_at`."""
        bins = self._plan(np.arange(len(self.examples)))
        for step in range(math.ceil(len(bins) / self.batch_size)):
            yield self._batch(bins, step, rows)

    def evaluation_places(self) -> Iterator[np.ndarray]:
        """For each of `evaluation_batches`, where its positions are among those of all examples one after the other, int64
        `[B,S]`; -1 in padding. Known to every host, whichever rows it fills."""
        firsts = np.cumsum(self.lengths) - self.lengths
        bins = self._plan(np.arange(len(self.examples)))
        for start in range(0, len(bins), self.batch_size):
            chosen = bins[start : start + self.batch_size]
            places = np.full((self.batch_size, self._width(chosen)), -1, np.int64)
            for row, members in zip(places, chosen):
                taken = np.concatenate([firsts[i] + np.arange(self.lengths[i]) for i in members])
                row[: len(taken)] = taken
            yield places

    def _bins(self, epoch: int) -> list[np.ndarray]:
        """Row indices of each sequence of that epoch, in order; the last epoch asked for is kept."""
        epoch = epoch if self.shuffle else 0
        planned = self._planned  # another thread may ask for another epoch meanwhile
        if planned is None or planned[0] != epoch:
            self._planned = planned = (epoch, self._plan_epoch(epoch))
        return planned[1]

    def _plan_epoch(self, epoch: int) -> list[np.ndarray]:
        rows = len(self.examples)
        if not self.shuffle:
            return self._plan(np.arange(rows))
        bins = self._plan(_permutation(rows, self.seed, epoch, 0))
        if self.packing:
            return [bins[i] for i in _permutation(len(bins), self.seed, epoch, 1)]
        whole = len(bins) // self.batch_size  # batches change places; a last one that is not full stays the last
        order = [*_permutation(whole, self.seed, epoch, 1), whole]
        return [row for i in order for row in bins[i * self.batch_size : (i + 1) * self.batch_size]]

    def _plan(self, order: np.ndarray) -> list[np.ndarray]:
        if not self.packing:
            # Rows of one padded length together, in the order given: a batch at the border takes the longer length.
            return list(
                order[np.argsort(np.searchsorted(self.lengths_padded, self.lengths[order]), kind="stable")][:, None]
            )
        windows = (order[start : start + WINDOW] for start in range(0, len(order), WINDOW))
        return [window[members] for window in windows for members in pack.plan(self.lengths[window], self.length)]

    def _batch(self, bins: list[np.ndarray], step: int, rows: Container[int] | None) -> Batch:
        chosen = bins[step * self.batch_size : (step + 1) * self.batch_size]
        shape = (self.batch_size, self._width(chosen))
        tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
        weights = np.zeros(shape, np.float32)
        for b, members in enumerate(chosen):
            if rows is not None and b not in rows:
                continue
            at = 0
            for segment, index in enumerate(members, 1):
                example, used = self.examples[index], int(self.lengths[index])
                here = np.s_[b, at : at + used]
                tokens[here], targets[here] = example.tokens[:-1], example.tokens[1:]
                weights[here] = example.loss_mask[1:]
                positions[here], segments[here] = np.arange(used), segment
                at += used
        return Batch(tokens, targets, positions, segments, weights)

    def _width(self, bins: Sequence[np.ndarray]) -> int:
        """Positions of a batch's sequences."""
        if self.packing:
            return self.length
        longest = max(int(self.lengths[members].sum()) for members in bins)
        return self.lengths_padded[int(np.searchsorted(self.lengths_padded, longest))]


class Prefetch(Generic[T]):
    """`make(step)` for consecutive steps, made in a thread up to `depth` steps before they are asked for."""

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 2):
        self.waited = 0.0  # seconds that `next` has spent waiting
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, start, stop), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], T], start: int, stop: int) -> None:
        for step in range(start, stop):
            try:
                made: tuple[T | None, BaseException | None] = make(step), None
            except BaseException as error:  # handed over to whoever asks for this step
                made = None, error
            self._ready.put(made)
            if self._stopped.is_set() or made[1] is not None:
                return
        self._ready.put((None, IndexError(f"no step {stop}: steps {start} to {stop - 1} were asked for")))

    def next(self) -> T:
        """The next step's; raises what making it raised."""
        began = time.monotonic()
        value, error = self._ready.get()
        self.waited += time.monotonic() - began
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the thread; what it has made is dropped."""
        self._stopped.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        self._thread.join()


def sample(count: int, rows: int, seed: int) -> list[int]:
    """`count` of the indices 0 to rows-1, rising, drawn by `seed` apart from the order of any epoch."""
    return sorted(_permutation(rows, seed, _NO_EPOCH, 0)[:count].tolist())


def _padded_lengths(lengths: np.ndarray, longest: int) -> list[int]:
    """The lengths to pad to, rising: at most LENGTHS, at equal shares of the rows, the last for the longest row."""
    shares = np.quantile(lengths, np.arange(1, LENGTHS + 1) / LENGTHS, method="higher")
    return sorted({min(longest, -(-int(n) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE) for n in shares})


def _permutation(size: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """Indices 0 to size-1 in random order, from Philox's raw output.

    NumPy keeps a bit generator's raw stream for good but may change what Generator.permutation makes of it, and a run
    resumed after an upgrade would train other rows.
    """
    bits = np.random.Philox(key=np.array([seed, 2 * epoch + purpose], np.uint64)).random_raw(size)
    return np.argsort(bits, kind="stable")
