"""Generation: prefill and a sampling loop with a KV cache, each compiled once per shape."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError
from jaxft.evals.protocols import cut
from jaxft.evals.tokens import check
from jaxft.models import decoder
from jaxft.parallel.sharding import batch_ways, constrain, on_host

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple, so that a few compiled shapes serve all lengths
CHUNK = 32  # tokens between two looks for stop strings, which only the host can see


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen, in transformers' order: temperature, then top_k, then top_p; nothing else plays a part."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Only the k most likely tokens."""
    top_p: float | None = None
    """Only the most likely tokens that together have this probability."""
    samples: int = 1
    """Answers per prompt."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature: expected 0 or more, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: expected at least 1, or None for all tokens, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected more than 0 and at most 1, or None, found {self.top_p}")
        if self.samples < 1:
            raise UserError(f"samples: expected at least 1, found {self.samples}")


class Generator:
    """Continues token prompts with a decoder; holds the compiled programs, so make one and keep it."""

    def __init__(self, model: decoder.Decoder, eos_ids: Sequence[int], tokenizer: Any = None):
        """`tokenizer` is needed where stop strings are given."""
        self.max_positions = model.arch.max_positions
        self.vocab_size = model.arch.vocab_size
        self.ways = 1 if model.mesh is None else batch_ways(model.mesh)
        self.graphdef, self.trainable, self.frozen = decoder.split(model)
        self.eos = np.array(sorted(set(eos_ids)) or [-1], np.int32)
        self.tokenizer = tokenizer
        self.answered: Callable[[], None] = lambda: None  # called after each batch

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        batch_size: int = 16,
        documents: Sequence[int] | None = None,
        trainable: dict[str, jax.Array] | None = None,
    ) -> list[list[int]]:
        """New token ids up to and without the first EOS: `sampling.samples` answers per prompt, a prompt's side by side.

        A token is drawn from (seed, prompt's number, sample's, token's position), so that batching changes nothing; the
        prompts' numbers are `documents`, or count from 0. Prompts are batched by length. An answer is given up, soon after
        but not at, where its text holds one of `stop`.
        `trainable` replaces the model's own trainable parameters. An answer of `max_new_tokens` has not ended by itself.
        """
        self._check(prompts, max_new_tokens)
        wanted = [(i, sample) for i in range(len(prompts)) for sample in range(sampling.samples)]
        numbers = range(len(prompts)) if documents is None else documents
        answers: dict[tuple[int, int], list[int]] = {}
        order = sorted(wanted, key=lambda each: len(prompts[each[0]]))
        weights = (self.trainable if trainable is None else trainable), self.frozen
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = -(-min(batch_size, len(order)) // self.ways) * self.ways
            ids = [(numbers[i], sample) for i, sample in chosen]
            batch = _padded([prompts[i] for i, _ in chosen], ids, rows)
            out = self._batch(weights, batch, max_new_tokens, sampling, [text for text in stop if text], len(chosen))
            for each, row in zip(chosen, out):
                stops = np.flatnonzero(np.isin(row, self.eos))
                answers[each] = row[: stops[0] if stops.size else None].tolist()
            self.answered()
        return [answers[each] for each in wanted]

    def _batch(
        self, weights: Any, batch: Any, new: int, sampling: Sampling, stop: Sequence[str], rows: int
    ) -> np.ndarray:
        """int32 `[B,new]`; behind an EOS, or where a row was given up, EOS."""
        tokens, lengths, ids = batch
        chooser = _Chooser(sampling.temperature == 0, sampling.top_k, sampling.top_p is not None)
        draw = jax.random.key(sampling.seed), np.float32(sampling.temperature), np.float32(sampling.top_p or 1.0)
        fixed = lengths, ids, draw, self.eos
        carry = _begin(self.graphdef, *weights, tokens, *fixed, chooser, new)
        done = np.zeros(len(lengths), bool)
        for upto in range(CHUNK, new, CHUNK) if stop else ():
            carry = _extend(self.graphdef, *weights, carry, done, *fixed, chooser, np.int32(upto))
            out, done = on_host(carry.out), on_host(carry.done).copy()
            for row in range(rows):
                if not done[row]:
                    said = self.tokenizer.decode(out[row, :upto].tolist(), skip_special_tokens=True)
                    done[row] = any(text in said for text in stop)
            if done[:rows].all():
                return out
        return on_host(_extend(self.graphdef, *weights, carry, done, *fixed, chooser, np.int32(new)).out)

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {i}: empty; give at least one token")
            check(prompt, self.vocab_size, f"prompt {i}")
            if len(prompt) + max_new_tokens > self.max_positions:
                raise UserError(
                    f"prompt {i}: {len(prompt)} tokens + {max_new_tokens} new ones exceed the model's {self.max_positions} "
                    "positions; shorten the prompt or lower max_new_tokens"
                )


def _padded(
    prompts: list[Sequence[int]], ids: list[tuple[int, int]], rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-padded int32 tokens `[rows,P]`, lengths `[rows]` and `[rows,2]` ids; missing rows repeat the first."""
    width = -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    spare = rows - len(prompts)
    prompts, ids = prompts + [prompts[0]] * spare, ids + [ids[0]] * spare
    tokens = np.zeros((rows, width), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(p) for p in prompts], np.int32), np.array(ids, np.int32)


class _Chooser(NamedTuple):
    """What of Sampling decides the program."""

    greedy: bool
    top_k: int | None
    nucleus: bool

    def __call__(self, logits_BV: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
        """int32 `[B]`."""
        if self.greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        scaled = logits_BV / temperature
        if self.top_k is not None:
            least = jax.lax.top_k(scaled, min(self.top_k, scaled.shape[-1]))[0][:, -1:]
            scaled = jnp.where(scaled < least, -jnp.inf, scaled)
        if self.nucleus:
            falling = jnp.sort(scaled, axis=-1, descending=True)
            share = jax.nn.softmax(falling, axis=-1)
            kept = jnp.cumsum(share, axis=-1) - share < top_p  # what comes before a kept token has not yet that much
            least = jnp.where(kept, falling, jnp.inf).min(axis=-1, keepdims=True)
            scaled = jnp.where(scaled < least, -jnp.inf, scaled)
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


class _Carry(NamedTuple):
    t: jax.Array  # tokens chosen
    token: jax.Array  # int32 [B], the last of them
    done: jax.Array  # bool [B]
    out: jax.Array  # int32 [B,new]
    cache: decoder.Cache


@functools.partial(jax.jit, static_argnames=("graphdef", "chooser", "new"))
def _begin(
    graphdef: Any,
    trainable: Any,
    frozen: Any,
    tokens: Any,
    lengths: Any,
    ids: Any,
    draw: Any,
    eos: Any,
    chooser: _Chooser,
    new: int,
) -> _Carry:
    """Reads the prompts and chooses each row's first token."""
    model = decoder.join(graphdef, trainable, frozen)
    B, P = tokens.shape
    where = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None, :], (B, P))
    segments = (where < lengths[:, None]).astype(jnp.int32)
    h, cache = model.hidden(tokens, where, segments, cache=model.empty_cache(B, P + new))
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]
    first = _choose(model, chooser, last, jnp.int32(0), ids, draw)
    out = jnp.full((B, new), eos[0], jnp.int32).at[:, 0].set(first)
    return _seen(model, _Carry(jnp.int32(1), first, jnp.any(first[:, None] == eos[None, :], axis=1), out, cache))


@functools.partial(jax.jit, static_argnames=("graphdef", "chooser"), donate_argnames=("carry",))
def _extend(
    graphdef: Any,
    trainable: Any,
    frozen: Any,
    carry: _Carry,
    done: Any,
    lengths: Any,
    ids: Any,
    draw: Any,
    eos: Any,
    chooser: _Chooser,
    upto: Any,
) -> _Carry:
    """Chooses tokens until there are `upto` or every row is done; `done` rows are given up. EOS follows EOS."""
    model = decoder.join(graphdef, trainable, frozen)
    B = lengths.shape[0]

    def more(carry: _Carry) -> jax.Array:
        return (carry.t < upto) & ~jnp.all(carry.done)

    def step(carry: _Carry) -> _Carry:
        t, token, done, out, cache = carry
        h, cache = model.hidden(token[:, None], (lengths + t - 1)[:, None], jnp.ones((B, 1), jnp.int32), cache=cache)
        token = jnp.where(done, eos[0], _choose(model, chooser, h[:, 0], t, ids, draw))
        done = done | jnp.any(token[:, None] == eos[None, :], axis=1)
        return _Carry(t + 1, token, done, jax.lax.dynamic_update_slice(out, token[:, None], (jnp.int32(0), t)), cache)

    return _seen(model, jax.lax.while_loop(more, step, carry._replace(done=carry.done | done)))


def _choose(
    model: decoder.Decoder, chooser: _Chooser, h_BD: jax.Array, t: jax.Array, ids: jax.Array, draw: Any
) -> jax.Array:
    """Each row's token `t`, drawn from (seed, prompt, sample, t)."""
    key, temperature, top_p = draw
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, i[0]), i[1]), t))(ids)
    return chooser(model.logits(h_BD), keys, temperature, top_p)


def _seen(model: decoder.Decoder, carry: _Carry) -> _Carry:
    """What every process reads, whole on each."""
    return carry._replace(
        out=constrain(carry.out, (None, None), model.mesh), done=constrain(carry.done, (None,), model.mesh)
    )


def complete(
    model: decoder.Decoder,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
) -> list[str]:
    """What the model adds to each prompt: token ids, or a text that is tokenised as the tokenizer does by itself.

    `sampling.samples` texts per prompt, a prompt's side by side, each cut before the first of `stop`.
    """
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop}
    return [text for text, _ in completions(model, tokenizer, prompts, **options)]


def completions(
    model: decoder.Decoder,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
) -> list[tuple[str, int]]:
    """The texts of `complete`, each with the number of tokens generated for it."""
    if isinstance(prompts, str):
        raise UserError(f"prompts: expected a list of texts, found one text; pass [{prompts[:20]!r}]")
    tokens = [list(tokenizer(p)["input_ids"]) if isinstance(p, str) else list(p) for p in prompts]
    generator = Generator(model, eos_ids(model, tokenizer), tokenizer)
    new = generator(tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
    asked = [prompt for prompt in tokens for _ in range(sampling.samples)]
    return [(cut(continuation(tokenizer, before, after), stop), len(after)) for before, after in zip(asked, new)]


def continuation(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of `new` as it follows `prompt`: decoded alone, its first token could lose its space."""
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(new), skip_special_tokens=True)


def eos_ids(model: decoder.Decoder, tokenizer: Any) -> list[int]:
    """Where an answer ends: the tokenizer's EOS, and what config.json and generation_config.json name (end of turn)."""
    file = Path(tokenizer.name_or_path) / "generation_config.json"
    try:
        named = json.loads(file.read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        named = None
    ids = [tokenizer.eos_token_id, *model.arch.eos_ids, *(named if isinstance(named, list) else [named])]
    return [i for i in ids if isinstance(i, int)]
