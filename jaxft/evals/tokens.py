"""Tokens that a model is asked to read."""

from __future__ import annotations

from collections.abc import Iterable

from jaxft.errors import UserError


def check(tokens: Iterable[int], vocab_size: int, what: str) -> None:
    """Raises UserError, which names `what` was asked, for the first token that is none of the model's `vocab_size`."""
    strange = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if strange is not None:
        raise UserError(f"{what}: token {strange} is not in the model's vocabulary, which ends at {vocab_size - 1}")
