"""A run folder in object storage (gs://…): a local folder that is written as ever, and copied there when told to.

Such storage has no appending and no renaming, which logs and event files want; each file goes up whole. Checkpoints do not
pass here: Orbax writes them to the storage itself.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from jaxft.errors import UserError

READ = (
    "config.json",
    "results.json",
    "metrics.jsonl",
    "goodput.jsonl",
    "examples",
)  # by a start that resumes; a folder with its files


def is_remote(name: str) -> bool:
    """Whether a run folder's name is a URL."""
    return "://" in name


def is_marked(name: str) -> bool:
    """Whether its storage knows generations, with which a marker keeps other writers out."""
    return name.startswith("gs://")


def remote_path(name: str) -> Any:
    """An etils path. Raises UserError for storage that is not known here, or without its library."""
    from etils import epath

    path = epath.Path(name)
    try:
        path.exists()
    except (ImportError, KeyError, ValueError) as error:
        raise UserError(
            f"run.dir: {name} cannot be reached ({error}); gs:// needs `pip install 'jaxft[gcs]'`"
        ) from error
    except Exception as error:  # of the storage's own client
        raise UserError(f"run.dir: {name} cannot be reached: {type(error).__name__}: {error}") from error
    return path


class Mirror:
    """The local copy of what is in `remote`, in a temporary folder; made with the files that a start reads."""

    def __init__(self, remote: Any):
        self.remote = remote
        self._temporary = tempfile.TemporaryDirectory(prefix="jaxft-run-")
        self.local = Path(self._temporary.name)
        self._sent: dict[Path, tuple[int, int]] = {}
        for name in READ:
            source = remote / name
            for file in source.iterdir() if source.is_dir() else [source] if source.exists() else []:
                target = self.local / file.relative_to(remote).as_posix()
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(file.read_bytes())
        self._sent = {file: _state(file) for file in self.local.rglob("*") if file.is_file()}

    def close(self) -> None:
        """Removes the copy."""
        self._temporary.cleanup()

    def send(self) -> None:
        """Copies every file that has changed since the last time."""
        for file in sorted(self.local.rglob("*")):
            if not file.is_file() or self._sent.get(file) == (state := _state(file)):
                continue
            target = self.remote / file.relative_to(self.local).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 24)
            self._sent[file] = state


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size
