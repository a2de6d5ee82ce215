"""A model's name to a local folder, and the JSON files in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.bounds import bounded
from jaxft.errors import UserError
from jaxft.models.arch import Arch
from jaxft.models.families import arch_from_config

BUILTIN = {"builtin:tiny": Path(__file__).resolve().parent.parent / "tiny" / "base"}
TOKENIZER = ["*.json", "*.jinja", "*.model", "*.txt"]
WEIGHTS = [*TOKENIZER, "*.safetensors"]
JSON_LIMIT_BYTES = 10 << 20  # a config has a few kB, the index of a thousand shards some MB
JSON_LIMIT_VALUES = 1_000_000  # two of a hundred thousand tensors each, and of their names
MAX_LAYERS, MAX_SIZE = 1000, 2**31 - 1  # in a config.json
COPIES = ["*/*", "consolidated*.safetensors"]  # the same weights again, in other layouts


def local_folder(name: str, revision: str | None = None, *, key: str = "model.name", weights: bool = True) -> Path:
    """The folder that holds model `name`: built in, local, or downloaded from the Hub into its cache.

    Without `weights` they are left where they are. Raises UserError naming the repository, what was looked at, and what to
    do.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    if not name:
        raise UserError(f"{key}: not set; give a local folder, a Hub id such as owner/model, or {', '.join(BUILTIN)}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_links(folder)
        return folder
    if name.startswith("builtin:"):
        raise UserError(f"{key}: {name!r} is not built in; built in: {', '.join(BUILTIN)}")
    if folder.is_file():
        raise UserError(f"{key}: {name} is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{key}: no folder {name} (looked at {folder.absolute()}); a Hub id looks like owner/model")
    return download(name, revision, WEIGHTS if weights else TOKENIZER, key, COPIES)


def download(
    name: str, revision: str | None, files: list[str], key: str = "model.name", but: Sequence[str] = ()
) -> Path:
    """The cached folder of the Hub's repository `name` with these `files` `but` those. Raises UserError with the remedy."""
    from huggingface_hub import errors, snapshot_download

    where = f"{key}: {name}" + (f" at revision {revision}" if revision else "")
    skipped = {"ignore_patterns": list(but)} if but else {}
    _quieten()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, **skipped))
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
    except Exception as error:  # Two libraries' dozens of types; the chain keeps them for --debug.
        raise UserError(f"{where} {_obstacle(error, name)}") from error


def check_links(folder: Path) -> None:
    """Raises UserError where one of the files that are read in `folder` lies elsewhere, or is no file: somebody else's folder
    may have links into the reader's own. The Hub's cache is made of links, into its blobs."""
    inside = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parent.parent / "blobs")
    for pattern in (*WEIGHTS, "*.h5", "assets/*"):
        for file in folder.glob(pattern):
            real = file.resolve()
            if not any(real.is_relative_to(place) for place in inside):
                raise UserError(f"{file}: is a link to {real}, outside its folder; copy the file here if you trust it")
            if not real.is_file() and not real.is_dir():
                raise UserError(f"{file}: is no file")


def _quieten() -> None:
    """Nothing but the error's line: no retries, and no bars in a file or a pipe."""
    from huggingface_hub import constants, utils

    utils.logging.set_verbosity_error()
    if not sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        utils.disable_progress_bars()


def _obstacle(error: Exception, name: str) -> str:
    """Why a download ended, and what to do."""
    from huggingface_hub import constants, errors

    absent = f"is not a folder here ({Path(name).absolute()}), not (or not whole) in the Hub's cache, and"
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"{absent} HF_HUB_OFFLINE is set; unset it, or check the path"
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        said = cause.response.headers.get("X-Error-Message") or cause.response.reason_phrase
        remedy = "check the token (`hf auth whoami`, or HF_TOKEN)" if status in (401, 403) else "try again later"
        return f"cannot be downloaded: the Hub answered {status} ({said}); {remedy}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{absent} the Hub cannot be reached; check the path or the network"
    if isinstance(error, OSError) and error.errno:
        cache = constants.HF_HUB_CACHE
        return f"cannot be written to the Hub's cache {cache} ({error.strerror}); make room there, or set HF_HOME"
    what = " ".join(str(error).split())
    return f"cannot be downloaded ({type(error).__name__}: {what:.300}); check the network and try again: whole files are kept"


def read_arch(folder: Path) -> Arch:
    """The architecture that the folder's config.json describes."""
    file = folder / "config.json"
    config = read_json(file, "every model")
    if config.get("quantization_config") is not None:
        raise UserError(f"{file}: quantization_config: quantised checkpoints are not supported; use the original one")
    for key, value in config.items():  # all layers are laid out before a weight is looked at
        most = MAX_LAYERS if "layers" in key else MAX_SIZE
        if isinstance(value, (int, float)) and not abs(value) <= most:
            raise UserError(f"{file}: {key}: {value!r:.40} is out of range; at most {most:,}")
    return arch_from_config(config, str(file))


def read_json(file: Path, what: str) -> Mapping[str, Any]:
    """The object in `file`. Raises UserError where it is missing, not JSON, or not an object."""
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise UserError(f"{file}: is no file")
        value = json.loads(bounded(file, JSON_LIMIT_BYTES, JSON_LIMIT_VALUES).decode("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; {what} needs it") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError, OSError) as error:  # not text, absurdly long numbers or nesting, unreadable
        raise UserError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value
