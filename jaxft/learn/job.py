"""A run before its first step: config, rows, tokenizer and headers, all of them checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxft.config import Config

if TYPE_CHECKING:  # train names this type before it may import JAX
    from jax.sharding import Mesh

    from jaxft.data.dataset import Dataset
    from jaxft.weights.model import Source


@dataclass(frozen=True)
class Job:
    """A run whose parts have been checked; no weight is read and nothing written."""

    config: Config
    source: Source
    tokenizer: Any
    mesh: Mesh
    data: Dataset
    steps: int
