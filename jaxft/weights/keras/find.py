"""A preset's name to its folder: local, built into keras-nlp, on Kaggle or on the Hub."""

from __future__ import annotations

import difflib
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxft.errors import UserError
from jaxft.weights.hub import download
from jaxft.weights.keras.layout import ARCHITECTURES, PREFIX, read_layout

FILES = ["*.json", "*.h5", "assets/*"]


def find(name: str) -> Path:
    """The folder of a preset, named without `keras:`. Raises UserError."""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if name.startswith("hf://"):
        return download(name.removeprefix("hf://"), None, FILES)
    if name.startswith("kaggle://"):
        return _kaggle(name.removeprefix("kaggle://"))
    if not name or name.startswith((".", "/", "~")) or "/" in name:
        raise UserError(
            f"model.name: {PREFIX}{name}: no folder {name or '(none given)'}; {PREFIX} is followed by a built-in preset such "
            "as gemma2_2b_en, a folder, kaggle://owner/model/keras/variant or hf://owner/model"
        )
    return _kaggle(_handle(name))


def _handle(name: str) -> str:
    """The Kaggle handle of a built-in preset of a supported class."""
    # Keras would choose TensorFlow, which takes every GPU's memory; JAX is here already. A choice already made stands.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    models = needed("keras_nlp", name).models
    presets = {kind: getattr(models, kind).presets for kind in ARCHITECTURES}
    for known in presets.values():
        if name in known:
            return known[name]["kaggle_handle"].removeprefix("kaggle://")
    if name in models.Backbone.presets:
        raise UserError(
            f"model.name: {PREFIX}{name} is a preset of another class; supported: {', '.join(ARCHITECTURES)}"
        )
    every = [preset for known in presets.values() for preset in known]
    near = difflib.get_close_matches(name, every, 1, 0.3)
    listed = next((list(known) for known in presets.values() if near and near[0] in known), every)
    raise UserError(f"model.name: {PREFIX}{name} is no preset of keras-nlp; there are: {', '.join(listed)}")


def _kaggle(handle: str) -> Path:
    """The folder of a Kaggle model, downloaded into kagglehub's cache; its config first, since that may be refused."""
    hub, errors = needed("kagglehub", handle), needed("kagglehub.exceptions", handle)
    where = f"model.name: {PREFIX}kaggle://{handle}"
    try:
        read_layout(Path(hub.model_download(handle, "config.json")))
        return Path(hub.model_download(handle))
    except errors.KaggleApiHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"{where} may not be read: accept its licence on kaggle.com, and set KAGGLE_USERNAME and KAGGLE_KEY"
            ) from error
        raise UserError(f"{where}: Kaggle answered {status}: {first_line(error)}") from error
    except (errors.UnauthenticatedError, errors.CredentialError) as error:
        raise UserError(f"{where}: {first_line(error)}; set KAGGLE_USERNAME and KAGGLE_KEY") from error
    except (errors.BackendError, errors.NotFoundError, errors.DataCorruptionError, OSError, ValueError) as error:
        raise UserError(f"{where} cannot be downloaded ({type(error).__name__}: {first_line(error)})") from error


def needed(module: str, name: str) -> Any:
    """A module that comes with the extra. Raises UserError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"model.name: {PREFIX}{name.removeprefix(PREFIX)}: Keras presets need keras-nlp ({error}); "
            "run: pip install 'jaxft[keras]'"
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
