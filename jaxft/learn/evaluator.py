"""Teacher-forced measurements of fixed rows, example by example, equal whatever the batch size, packing and mesh."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.data.loader import Loader
from jaxft.data.marks import KINDS
from jaxft.learn.loss import Scores
from jaxft.learn.step import place_batch
from jaxft.parallel.sharding import local_rows

AHEAD = 2  # batches handed to the devices before the oldest is waited for

# What the accuracy over a kind of tokens is called in a log line.
NAMES = {"no annotations": "token_accuracy_without_annotations", "final answer": "token_accuracy_final_answer"}


@dataclass(frozen=True)
class Found:
    """Of each example of a set, in order: summed `nll` in nats, float64; `correct` tokens, int64, and those of each kind."""

    nll: np.ndarray
    correct: np.ndarray
    kinds: dict[str, np.ndarray]


Evaluation = dict[str, Found]  # by the set's name


class Rows:
    """A loader's examples with what is counted of each: `[n]` int64 `tokens` supervised, `bytes` of their text, and `kinds`.

    A kind is there where at least one example has it. `bytes` are 0, and there is no kind, where a row brings no marks.
    """

    def __init__(self, loader: Loader):
        self.loader, examples = loader, loader.examples
        self._owner = np.repeat(np.arange(len(examples)), loader.lengths)
        supervised = np.concatenate([example.loss_mask[1:] for example in examples])
        self.tokens = self._sum(supervised)
        self.cut = [bool(example.marks and example.marks.cut) for example in examples]
        self.bytes, self.kinds = np.zeros_like(self.tokens), {}
        self._counted: dict[str, np.ndarray] = {}
        if not all(example.marks for example in examples):
            return
        self.bytes = self._sum(np.concatenate([e.marks.bytes[1:] for e in examples]) * supervised)
        for name in KINDS:
            counted = np.concatenate([e.marks.kinds[name][1:] for e in examples]) & supervised
            if counted.any() and not np.array_equal(counted, supervised):
                self._counted[name], self.kinds[name] = counted, self._sum(counted)

    def __len__(self) -> int:
        return len(self.loader.examples)

    def found(self, scored: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Found:
        """From `(places, nll, correct)` of each batch, `[B,S]`; float64 from here on."""
        nll, correct = np.zeros(len(self._owner)), np.zeros(len(self._owner), bool)
        for places, batch_nll, batch_correct in scored:
            real = places >= 0
            nll[places[real]], correct[places[real]] = batch_nll[real], batch_correct[real]
        kinds = {name: self._sum(correct & counted) for name, counted in self._counted.items()}
        return Found(np.bincount(self._owner, nll, len(self)), self._sum(correct), kinds)

    def _sum(self, of_tokens: np.ndarray) -> np.ndarray:
        """Int64 sums by example."""
        return np.bincount(self._owner, of_tokens, len(self)).astype(np.int64)


class Evaluator:
    """Measures sets of rows with any trainable parameters; `validation` is there, and `probe` may be.

    All processes call it together and get the same. `alive` is called for each batch that is done.
    """

    def __init__(
        self,
        eval_step: Callable[..., Scores],
        frozen: Any,
        mesh: Mesh,
        sets: Mapping[str, Loader],
        alive: Callable[[], None] = lambda: None,
    ):
        self._eval_step, self._frozen, self._mesh, self._alive = eval_step, frozen, mesh, alive
        self.rows = {name: Rows(loader) for name, loader in sets.items()}

    def __call__(self, trainable: Any) -> Evaluation:
        """What each set's examples come to."""
        return {name: rows.found(self._scored(rows.loader, trainable)) for name, rows in self.rows.items()}

    def _scored(self, loader: Loader, trainable: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        batches = loader.evaluation_batches(local_rows(self._mesh, loader.batch_size))
        running: collections.deque[tuple[np.ndarray, Scores]] = collections.deque()
        for batch, places in zip(batches, loader.evaluation_places(), strict=True):
            running.append((places, self._eval_step(trainable, self._frozen, place_batch(batch, self._mesh))))
            if len(running) > AHEAD:
                yield self._done(*running.popleft())
        while running:
            yield self._done(*running.popleft())

    def _done(self, places: np.ndarray, scores: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        nll, correct = jax.device_get(scores)
        self._alive()
        return places, nll, correct

    def figures(self, found: Evaluation) -> dict[str, float]:
        """The sets' sums as a log line has them: Σ nll / Σ tokens, Σ correct / Σ tokens, and so on."""
        rows, of = self.rows["validation"], found["validation"]
        loss = _share(of.nll, rows.tokens)
        figures = {"eval_loss": loss, "eval_mean_token_accuracy": _share(of.correct, rows.tokens)}
        if loss < 700:  # beyond that its exponential is beyond float64
            figures["eval_perplexity"] = math.exp(loss)
        figures |= {f"eval_{NAMES[kind]}": _share(of.kinds[kind], tokens) for kind, tokens in rows.kinds.items()}
        if rows.bytes.any():
            figures["eval_bits_per_byte"] = _share(of.nll, rows.bytes) / math.log(2)
        if "probe" in found:
            rows, of = self.rows["probe"], found["probe"]
            figures |= {
                "probe_loss": _share(of.nll, rows.tokens),
                "probe_mean_token_accuracy": _share(of.correct, rows.tokens),
            }
        return figures


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return math.fsum(part.tolist()) / max(int(whole.sum()), 1)
