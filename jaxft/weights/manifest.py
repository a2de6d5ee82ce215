"""What a whole checkpoint looks like: each file's size and digest, so that damage is found before anything is loaded.

Orbax loads flipped bits in silence, and fails on a lost file in words of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxft.weights.digests import sha256

NAME = "manifest.json"
# Orbax writes these two after everything else, and so after the manifest: of the first only the time changes, and the
# second is read nowhere but in object storage, where it stands for the renaming.
METADATA, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
TIME = "commit_timestamp_nsecs"


@dataclass(frozen=True)
class Manifest:
    """`files`: name -> [bytes, sha256 or None]; `arrays`: path -> dtype and shape; `metadata`: Orbax's, without its time."""

    files: dict[str, list[Any]]
    arrays: dict[str, str]
    metadata: dict[str, Any]
    best: int | None  # the step that was best when this one was saved


def write(folder: Any, arrays: dict[str, str], best: int | None) -> None:
    """Seals the checkpoint in `folder`, a path of either kind; the last thing written into it."""
    names = sorted(_names(folder))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing holds no lock of Python's
        files = dict(zip(names, pool.map(lambda name: _state(folder / name), names)))
    text = _text(Manifest(files, arrays, _metadata(folder), best))
    target = folder / NAME
    if not isinstance(target, Path):
        target.write_text(text)
        return
    with target.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def read(folder: Any) -> Manifest | str:
    """The manifest of the checkpoint in `folder`, every file checked against it, or what is wrong with them."""
    try:
        text = (folder / NAME).read_text()
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError) as error:
        return f"{NAME} cannot be read ({error})"
    try:
        found = Manifest(**json.loads(text.partition("\n")[0]))
        damaged = text != _text(found)
    except (ValueError, TypeError, RecursionError):
        damaged = True
    if damaged:
        return f"{NAME} is damaged"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(lambda item: _fault(folder, *item), found.files.items()))
    faults.append(_metadata_fault(folder, found))
    return next(filter(None, faults), found)


def _text(manifest: Manifest) -> str:
    """One line of JSON and its own digest."""
    line = json.dumps(asdict(manifest), sort_keys=True)
    return f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n"


def _names(folder: Any, under: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        name = under + path.name
        if path.is_dir():
            yield from _names(path, f"{name}/")
        elif name not in (NAME, METADATA, COMMITTED):
            yield name


def _state(file: Any) -> list[Any]:
    """[bytes, sha256]. Objects in a storage service change as a whole or not at all, and it checks them: their size will do."""
    if not isinstance(file, Path):
        return [file.stat().length, None]
    return [file.stat().st_size, sha256(file)]


def _fault(folder: Any, name: str, wanted: list[Any]) -> str | None:
    file = folder / name
    try:
        size = file.stat().st_size if isinstance(file, Path) else file.stat().length
        if size != wanted[0]:
            return f"{name} has {size:,} bytes instead of {wanted[0]:,}"
        return None if _state(file) == wanted else f"{name} has changed"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def _metadata(folder: Any) -> dict[str, Any]:
    return {key: value for key, value in json.loads((folder / METADATA).read_text()).items() if key != TIME}


def _metadata_fault(folder: Any, wanted: Manifest) -> str | None:
    try:
        return None if _metadata(folder) == wanted.metadata else f"{METADATA} has changed"
    except FileNotFoundError:
        return f"{METADATA} is missing"
    except (OSError, ValueError, AttributeError, RecursionError):
        return f"{METADATA} is damaged"
