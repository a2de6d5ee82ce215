"""Generation: prefill and a sampling loop with a KV cache, each compiled once per shape."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError
from jaxft.models import decoder
from jaxft.parallel.sharding import batch_ways

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple, so that a few compiled shapes serve all lengths


class Generator:
    """Continues token prompts with a decoder; holds the compiled programs, so make one and keep it."""

    def __init__(self, model: decoder.Decoder, eos_ids: Sequence[int]):
        self.max_positions = model.arch.max_positions
        self.vocab_size = model.arch.vocab_size
        self.ways = 1 if model.mesh is None else batch_ways(model.mesh)
        self.graphdef, self.trainable, self.frozen = decoder.split(model)
        self.eos = np.array(sorted(set(eos_ids)) or [-1], np.int32)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        trainable: dict[str, jax.Array] | None = None,
    ) -> list[list[int]]:
        """New token ids per prompt, up to and without the first EOS.

        Greedy at temperature 0, else sampled from (seed, prompt's index, token's position), so that batching changes
        nothing. Prompts are batched by length. `trainable` replaces the model's own trainable parameters.
        """
        self._check(prompts, max_new_tokens)
        answers: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        weights = (self.trainable if trainable is None else trainable), self.frozen
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = -(-min(batch_size, len(prompts)) // self.ways) * self.ways
            tokens, lengths, ids = _padded([prompts[i] for i in chosen], chosen, rows)
            draw = jax.random.key(seed), jnp.float32(temperature)
            out = _generate(self.graphdef, *weights, tokens, lengths, ids, *draw, self.eos, max_new_tokens)
            for index, row in zip(chosen, np.asarray(out)):
                stops = np.flatnonzero(np.isin(row, self.eos))
                answers[index] = row[: stops[0] if stops.size else None].tolist()
        return answers

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {i}: empty; give at least one token")
            strange = [token for token in prompt if not 0 <= token < self.vocab_size]
            if strange:
                raise UserError(
                    f"prompt {i}: token {strange[0]} is not in the model's vocabulary, which ends at {self.vocab_size - 1}"
                )
            if len(prompt) + max_new_tokens > self.max_positions:
                raise UserError(
                    f"prompt {i}: {len(prompt)} tokens + {max_new_tokens} new ones exceed the model's {self.max_positions} "
                    "positions; shorten the prompt or lower max_new_tokens"
                )


def _padded(prompts: list[Sequence[int]], indices: list[int], rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-padded int32 tokens `[rows,P]`, lengths `[rows]` and prompt numbers; missing rows repeat the first."""
    width = -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    spare = rows - len(prompts)
    prompts, indices = prompts + [prompts[0]] * spare, indices + [indices[0]] * spare
    tokens = np.zeros((rows, width), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(p) for p in prompts], np.int32), np.array(indices, np.int32)


@functools.partial(jax.jit, static_argnames=("graphdef", "new"))
def _generate(
    graphdef: Any,
    trainable: Any,
    frozen: Any,
    tokens: Any,
    lengths: Any,
    ids: Any,
    key: Any,
    temperature: Any,
    eos: Any,
    new: int,
) -> jax.Array:
    """int32 `[B,new]`; after a row's EOS, EOS again."""
    model = decoder.join(graphdef, trainable, frozen)
    B, P = tokens.shape
    where = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None, :], (B, P))
    segments = (where < lengths[:, None]).astype(jnp.int32)
    h, cache = model.hidden(tokens, where, segments, cache=model.empty_cache(B, P + new))
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)

    def choose(h_BD: jax.Array, t: jax.Array) -> jax.Array:
        return _choose(model.logits(h_BD), jax.vmap(lambda k: jax.random.fold_in(k, t))(keys), temperature)

    def more(carry: Any) -> jax.Array:
        t, _, done, *_ = carry
        return (t < new) & ~jnp.all(done)

    def step(carry: Any) -> Any:
        t, token, done, out, cache = carry
        h, cache = model.hidden(token[:, None], (lengths + t - 1)[:, None], jnp.ones((B, 1), jnp.int32), cache=cache)
        token = jnp.where(done, eos[0], choose(h[:, 0], t))
        done = done | jnp.any(token[:, None] == eos[None, :], axis=1)
        return t + 1, token, done, jax.lax.dynamic_update_slice(out, token[:, None], (jnp.int32(0), t)), cache

    first = choose(last, jnp.int32(0))
    out = jnp.full((B, new), eos[0], jnp.int32).at[:, 0].set(first)
    done = jnp.any(first[:, None] == eos[None, :], axis=1)
    return jax.lax.while_loop(more, step, (jnp.int32(1), first, done, out, cache))[3]


def _choose(logits_BV: jax.Array, keys: jax.Array, temperature: jax.Array) -> jax.Array:
    greedy = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled = logits_BV / jnp.maximum(temperature, 1e-6)
    return jax.lax.cond(
        temperature > 0,
        lambda: jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32),
        lambda: greedy,
    )


def complete(
    model: decoder.Decoder,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What the model adds to each prompt: token ids, or a text that is tokenised as the tokenizer does by itself."""
    if isinstance(prompts, str):
        raise UserError(f"prompts: expected a list of texts, found one text; pass [{prompts[:20]!r}]")
    tokens = [list(tokenizer(p)["input_ids"]) if isinstance(p, str) else list(p) for p in prompts]
    generator = Generator(model, eos_ids(model, tokenizer))
    new = generator(tokens, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return [continuation(tokenizer, before, after) for before, after in zip(tokens, new)]


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
