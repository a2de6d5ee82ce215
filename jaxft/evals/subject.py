"""What is measured: one model on its devices, as the base it began as and as it was tuned, with one copy of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxft import config
from jaxft.data.chat import load_tokenizer
from jaxft.models.decoder import Decoder
from jaxft.models.tensors import count_parameters
from jaxft.parallel.mesh import make_mesh
from jaxft.weights import load
from jaxft.weights.digests import sha256
from jaxft.weights.model import Loaded, Source, find, held_as, materialise

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Subject:
    """A decoder and its tokenizer; each of `sides` (base, tuned) is the trainable parameters that make the decoder that one.

    Frozen weights are shared by all sides. `origin` says what was opened, JSON-ready.
    """

    model: Decoder
    tokenizer: Any
    sides: Mapping[str, dict[str, jax.Array]]
    origin: dict[str, Any]

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Token ids; None adds what the tokenizer adds by itself, and no second BOS to a text that begins with one."""
        if text.startswith(self.tokenizer.decode(self.prefix)):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        return self.tokenizer.encode(text, **options)

    @property
    def prefix(self) -> int:
        """What stands before a text without context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos


def open_subject(
    name: str,
    adapter: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    *,
    sides: tuple[str, ...] | None = None,
    quantize: str = "none",
    quantize_group: int = 64,
    quantize_double: bool = False,
) -> Subject:
    """Loads a Hub id, local folder or builtin:tiny over all devices, with a PEFT adapter folder on top where given.

    `sides` default to tuned with an adapter and to base without. Raises UserError.
    """
    held = {"quantize": quantize, "quantize_group": quantize_group, "quantize_double": quantize_double}
    named = {"name": str(name), "tokenizer": tokenizer, "dtype": dtype, "adapter": adapter and str(adapter)}
    return open_model(config.Model(**named, **held), sides)


def open_model(model: config.Model, sides: tuple[str, ...] | None = None) -> Subject:
    """`open_subject` for a model described in full. Raises UserError."""
    adapter = model.adapter
    source = find(model)
    brought = load_tokenizer(source.tokenizer if model.tokenizer else source.tokenizer_beside_adapter)
    mesh = make_mesh(config.Mesh())
    loaded = materialise(source, mesh)
    wanted = sides or ((TUNED,) if adapter else (BASE,))
    values = {TUNED: loaded.trainable}
    if BASE in wanted:
        values[BASE] = _untrained(source, loaded, mesh) if adapter else loaded.trainable
    origin = _origin(source, model, loaded)
    return Subject(loaded.decoder(), brought, {side: values[side] for side in wanted}, origin)


def _untrained(source: Source, loaded: Loaded, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Parameters with which the adapted decoder is its base: pairs that add nothing, tensors as the base has them."""
    rows = [row for row in loaded.rows if row.path in loaded.trainable]
    files = source.files
    kept = load.load_base(files, rows, mesh) if files is not None else {}
    return kept | load.fresh_adapter(loaded.rows, loaded.frozen, mesh, seed=0)  # which asks every row how it is held


def _origin(source: Source, model: config.Model, loaded: Loaded) -> dict[str, Any]:
    about = {
        "model": model.name, "commit": source.commit, "family": source.arch.family, "dtype": str(source.dtype),
        "dtype_asked": model.dtype, "config_sha256": _sha256(source.folder / "config.json"),
        "parameters": count_parameters(loaded.rows)[1], "quantize": model.quantize,
        "held_as": held_as(model, source.dtype),
    }  # fmt: skip
    if source.adapter is not None:
        weights = source.adapter.folder / "adapter_model.safetensors"
        about |= {"adapter": model.adapter, "adapter_sha256": _sha256(weights)}
    return about


def _sha256(file: Path) -> str | None:
    return sha256(file) if file.is_file() else None
