"""Compiled programs kept on disk, so that the next start of the same run compiles nothing."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import platform
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def keep_compiled(folder: str | None) -> None:
    """Has JAX keep every program that it compiles below `folder`; None keeps none. Call it before anything compiles.

    A cache that the user has set for JAX itself stays. A folder that cannot be written costs a line and no more. JAX runs
    what it finds there, so the folder must be the user's own.
    """
    if folder is None or jax.config.jax_compilation_cache_dir:
        return
    if "://" not in folder:  # gs://… is written by JAX itself
        path = Path(folder).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            said = f"{path} cannot be written ({error.strerror or error}); programs are compiled anew at each start"
            print(f"run.compilation_cache: {said}", flush=True)
            return
        folder = str(path)
    jax.config.update("jax_compilation_cache_dir", f"{folder}/{_host()}")
    # JAX by itself keeps what took a second to compile; a start runs many smaller programs, which add up.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def kept_only_for(devices: Iterable[Any]) -> Iterator[None]:
    """Compiles without the cache for devices that are not here: what was compiled for those cannot be read back."""
    folder = jax.config.jax_compilation_cache_dir
    if folder is None or set(devices) <= set(jax.devices()):
        yield
        return
    forget()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def forget() -> None:
    """Has JAX keep no program from here on."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def return_memory() -> None:
    """Gives the system back what compiling or loading has freed and the C library would keep: 250 MB after a training step."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have none
    if trim is not None:
        trim(0)


def _host() -> str:
    """Eight hex digits for this kind of processor: XLA compiles for the one at hand, and JAX's key does not tell them apart.

    A home folder that several machines share would else bring one the instructions of another (openxla/xla issue 44565).
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:8]
