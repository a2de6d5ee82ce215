"""A model's name to a local folder, and the JSON files in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.errors import UserError

BUILTIN = {"builtin:tiny": Path(__file__).resolve().parent.parent / "tiny" / "base"}
TOKENIZER = ["*.json", "*.jinja", "*.model", "*.txt"]
WEIGHTS = [*TOKENIZER, "*.safetensors"]


def local_folder(name: str, revision: str | None = None, *, key: str = "model.name") -> Path:
    """The folder that holds model `name`: built in, local, or downloaded from the Hub into its cache.

    For the `key` model.tokenizer weights are left where they are. Raises UserError naming the repository, what was looked
    at, and what to do.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    if not name:
        raise UserError(f"{key}: not set; give a local folder, a Hub id such as owner/model, or {', '.join(BUILTIN)}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith("builtin:"):
        raise UserError(f"{key}: {name!r} is not built in; built in: {', '.join(BUILTIN)}")
    if folder.is_file():
        raise UserError(f"{key}: {name} is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{key}: no folder {name} (looked at {folder.absolute()}); a Hub id looks like owner/model")
    return download(name, revision, TOKENIZER if key == "model.tokenizer" else WEIGHTS, key)


def download(name: str, revision: str | None, files: list[str], key: str = "model.name") -> Path:
    """The cached folder of the Hub's repository `name` with the files of these patterns. Raises UserError with the remedy."""
    from huggingface_hub import errors, snapshot_download

    where = f"{key}: {name}" + (f" at revision {revision}" if revision else "")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{where} is gated; accept its licence at https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{where} does not exist on the Hub; list its branches at https://huggingface.co/{name}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{where} is neither a folder here ({Path(name).absolute()}) nor a repository that you may read; "
            "check the spelling, or for a private one run `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{where} is neither a folder here ({Path(name).absolute()}) nor a Hub id: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"{where} is not a folder here ({Path(name).absolute()}), not in the Hub's cache, and the Hub cannot be "
            "reached; check the path or the network"
        ) from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"{where}: the Hub answered {str(error).splitlines()[0]}") from error


def read_json(file: Path, what: str) -> Mapping[str, Any]:
    """The object in `file`. Raises UserError where it is missing, not JSON, or not an object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; {what} needs it") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError, OSError) as error:  # not text, absurdly long numbers or nesting, unreadable
        raise UserError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value
