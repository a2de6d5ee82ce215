"""`config.json` -> Arch. A new family is one file here and its line in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxft.errors import UserError
from jaxft.models.arch import Arch
from jaxft.models.families import gemma, gemma2, llama, mistral, openelm, qwen2, qwen3

FAMILIES: dict[str, Callable[[Mapping[str, Any]], Arch]] = {
    "gemma": gemma.arch,
    "gemma2": gemma2.arch,
    "llama": llama.arch,
    "mistral": mistral.arch,
    "openelm": openelm.arch,
    "qwen2": qwen2.arch,
    "qwen3": qwen3.arch,
}


def arch_from_config(config: Mapping[str, Any], source: str = "config.json") -> Arch:
    """The architecture that a Hugging Face `config.json` describes.

    Raises UserError for a family without a reader and for any field whose value is missing or not understood.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{source}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family](config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
