"""Files that survive kills and full disks: under a temporary name, synced, renamed; and a lock that dies with its holder."""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxft.errors import OutOfResources, UserError, disk_full

try:
    import fcntl
except ImportError:  # Windows: files are replaced as elsewhere, nothing is locked, and leftovers stay
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".jaxft-tmp"  # the end of every temporary name
LOCK = ".lock"

_numbers = itertools.count()


def write_text(file: Path, text: str) -> None:
    """Replaces `file`, in UTF-8, as `write_bytes` does."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Replaces `file` as a whole: a kill or a full disk leaves what was there before."""
    temporary = _temporary(file)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(file.parent)


def write_all(files: Mapping[Path, bytes], what: str) -> None:
    """Replaces each of `files` as `write_bytes` does, and makes their folders.

    Raises UserError, or OutOfResources where the disk is full, which begin with `what`.
    """
    try:
        for file, content in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, content)
    except OSError as error:
        said = f"{what} cannot be written: {error.strerror}"
        if disk_full(error):
            raise OutOfResources(f"{said}; it needs {sum(map(len, files.values())):,} bytes") from error
        raise UserError(said) from error


@contextlib.contextmanager
def new_folder(folder: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """A temporary folder to fill, which takes the name `folder` once all in it is on disk; what had that name goes.

    After an error nothing of it is left, after a kill only a temporary name, which the next call for `folder` removes.
    Raises OutOfResources where the disk is full, before anything is written where it has fewer than `needed_bytes`.
    """
    folder = Path(os.path.realpath(folder))
    if os.path.ismount(folder):
        raise UserError(f"{folder}: is where a file system is mounted, and cannot be replaced; give a folder inside it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, folder.name)
    if needed_bytes is not None:
        check_room(folder.parent, needed_bytes, str(folder))
    temporary = _temporary(folder)
    try:
        temporary.mkdir()
        with _held(temporary):
            yield temporary
            _sync(temporary)
            _replace(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OutOfResources) and disk_full(error):
            raise OutOfResources(full(folder.parent, str(folder), needed_bytes)) from error
        raise
    _sync_folder(folder.parent)


def _replace(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)  # also where there is an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        before = _temporary(folder)
        os.rename(folder, before)
        os.rename(temporary, folder)
        shutil.rmtree(before)


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what writers of `name` in `folder` left when they were killed; of anything, where this is the only writer.

    A folder that somebody fills at this moment is held by a lock, and stays.
    """
    for leftover in folder.glob(f".{glob.escape(name or '')}*{TEMPORARY}"):
        if not leftover.is_dir() or leftover.is_symlink():
            if name is None:
                leftover.unlink(missing_ok=True)
        elif name is None:
            shutil.rmtree(leftover)
        else:
            with contextlib.suppress(FileNotFoundError), _held(leftover) as held:
                if held:
                    shutil.rmtree(leftover)


def check_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises OutOfResources where `folder` has no room for so many bytes."""
    if free_bytes(folder) < needed_bytes:
        raise OutOfResources(full(folder, what, needed_bytes))


def free_bytes(folder: Path) -> int:
    """Bytes that may be written where `folder` is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def full(folder: Path, what: str, needed_bytes: int | None) -> str:
    """The line that says so."""
    needed = "more" if needed_bytes is None else f"{needed_bytes:,} bytes"
    free = f"{free_bytes(folder):,} bytes free"
    return f"{what}: the disk is full: {needed} needed, {free}; make room, then the same command again"


@contextlib.contextmanager
def only_writer(folder: Path, what: str) -> Iterator[str | None]:
    """Holds `folder` against other writers, on this machine and on others that share it by NFS; gives a warning or None.

    The lock is the kernel's (flock), so that a death frees it, whatever its cause. Raises UserError naming the holder. Where
    a file system knows no locks (and on Windows), nothing is held and the warning says so. Makes the folder, and removes it
    if it is empty in the end.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _open_locked(folder / LOCK, what)
    except OSError as error:
        if disk_full(error):
            raise
        raise UserError(f"{what} cannot be written: {error.strerror or error}") from error
    try:
        if handle is None:
            yield f"{what}: this file system has no locks; see that no other run writes here"
        else:
            yield from _saying_who(handle, folder / LOCK)
    finally:
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()


def _open_locked(file: Path, what: str) -> int | None:
    """A handle of the locked file; None where there are no locks."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        obstacle = _lock(handle)
        if obstacle is None and _same(handle, file):
            return handle
        os.close(handle)
        if isinstance(obstacle, BlockingIOError):
            said = f"{what} is in use by {_holder(file)}; wait until it ends, or give another folder"
            raise UserError(f"{said} (a dead run's lock is free)") from obstacle
        if obstacle is not None:
            file.unlink(missing_ok=True)
            return None
        # else its holder removed it in between


def _saying_who(handle: int, file: Path) -> Iterator[None]:
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(this_process()).encode())
        yield None
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # still held: who waits for it sees that it is no longer this one
        os.close(handle)


def _same(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    about: Any = None
    with contextlib.suppress(OSError, ValueError):
        about = json.loads(file.read_text())
    if not isinstance(about, dict):
        return "another process"
    return named(about)


def this_process() -> dict[str, Any]:
    """What one who holds a folder says of itself: pid, host, and since when."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def named(about: Mapping[str, Any]) -> str:
    """In words, what `this_process` said somewhere."""
    return f"process {about.get('pid')} on {about.get('host')} since {about.get('since')}"


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{next(_numbers)}-{os.urandom(3).hex()}{TEMPORARY}")


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Locks a folder as one that somebody fills; False where another does, or where locks are not known."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(handle) is None
    finally:
        os.close(handle)


def _lock(handle: int) -> OSError | None:
    """Takes the lock, or gives what kept it from being taken: BlockingIOError where another holds it."""
    if fcntl is None:
        return OSError("no locks")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        elif path.is_dir():
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Has the names in `folder` outlast a loss of power; not all file systems can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
