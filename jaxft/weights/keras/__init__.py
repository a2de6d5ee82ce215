"""Keras presets as checkpoints in Hugging Face's terms: config.json, tokenizer files, and tensors read lazily.

The weights are HDF5 files in which Keras lays out each variable contiguously, under the path of its layer. They are
memory-mapped where they lie: no Keras model is built, so that nothing is held twice, no backend is chosen, and no device
ever sees more than its own slice. keras-nlp itself is imported only to find a preset by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxft.errors import UserError
from jaxft.weights.hub import check_links, read_json
from jaxft.weights.keras.find import find
from jaxft.weights.keras.layout import PREFIX, read_layout
from jaxft.weights.keras.tokenizer import read_tokenizer
from jaxft.weights.keras.variables import Variable, claim, stored


@dataclass(frozen=True)
class Preset:
    """`folder` holds config.json and tokenizer files as the Hub has them; `files` the tensors by the Hub's names."""

    folder: Path
    files: Mapping[str, Variable]


def is_preset(name: str) -> bool:
    """Whether `name` is `keras:…` or a local folder that Keras wrote."""
    if name.startswith(PREFIX):
        return True
    try:
        config = read_json(Path(name).expanduser() / "config.json", "every model")
    except UserError:
        return False
    return bool(name) and "class_name" in config and "model_type" not in config


def open_preset(name: str) -> Preset:
    """Resolves `name`, checks every variable against the architecture, and writes config and tokenizer for the Hub's readers.

    `keras:` is followed by a built-in name (gemma2_2b_en), a folder, kaggle://owner/model/keras/variant or hf://owner/model.
    Raises UserError for what cannot be found, read, or expressed.
    """
    folder = find(name.removeprefix(PREFIX))
    check_links(folder)
    layout = read_layout(folder / "config.json")
    files = claim(layout, stored(folder), str(folder))
    tokenizer = read_tokenizer(folder)
    head = "lm_head.weight"
    config = layout.config | tokenizer.ids | {
        "tie_word_embeddings": head not in files,
        "dtype": files["model.embed_tokens.weight"].dtype.name,
    }  # fmt: skip
    written = {"config.json": json.dumps(config, indent=2) + "\n", **tokenizer.files}
    return Preset(_write(written, Path(name).name), files)


def _write(files: Mapping[str, str], name: str) -> Path:
    """A folder with exactly `files`, in Hugging Face's cache; named by their content, so that it is never stale."""
    from huggingface_hub.constants import HF_HOME

    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(HF_HOME) / "jaxft" / "keras" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.')}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files.keys() - {found.name for found in folder.iterdir()}:
            new = folder / f".{file}.{uuid.uuid4().hex}"  # whole or not at all, whoever else is writing the same
            new.write_text(files[file], encoding="utf-8")
            os.replace(new, folder / file)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); set HF_HOME to a folder with room") from error
    return folder
