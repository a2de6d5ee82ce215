"""One writer of a run folder on gs://, which has no locks: an object that names it and is written anew while it lives.

Every write names the generation that it replaces, so that of two writers one wins
(cloud.google.com/storage/docs/request-preconditions). A holder that finds another's marker, or cannot write its own for long,
ends: by then another one may have taken over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jaxft.disk import LOCK, named, this_process
from jaxft.errors import EXIT_AGAIN, EXIT_USER, UserError

REQUEST_SECONDS = 20.0


@dataclass(frozen=True)
class Times:
    """A marker is written every `beat` seconds; one that was not for `silent` is waited for, for `dead` it is taken over."""

    beat: float = 20.0
    silent: float = 60.0
    dead: float = 300.0

    @property
    def fenced(self) -> float:
        """Seconds without a beat after which a holder ends by itself, before others may take over."""
        return 0.8 * self.dead


@dataclass(frozen=True)
class Holder:
    """Who a marker names, and how long ago, by the storage's clock for the writing and this machine's for now."""

    about: dict[str, str]
    generation: int
    heard_seconds: float

    def __str__(self) -> str:
        return named(self.about)

    @property
    def gone(self) -> bool:
        """Whether this machine knows that it has ended."""
        pid = self.about.get("pid", "")
        if self.about.get("host") != socket.gethostname() or not pid.isdecimal():
            return False
        if int(pid) == os.getpid():  # an earlier one, in a container that was started again
            return True
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


@contextlib.contextmanager
def only_writer(
    place: str,
    what: str,
    lost: Callable[[int, str], None],
    say: Callable[[str], None] = print,
    times: Times | None = None,
) -> Iterator[None]:
    """Holds the folder `gs://…` against other writers. Raises UserError naming the holder, or what keeps it from being held.

    `lost(exit code, why)` is called in another thread once it is not held any more, and has to end the process.
    """
    marker = Marker(_blobs(place, what), what, times or Times())
    marker.take(say)
    over = threading.Event()
    thread = threading.Thread(target=marker.keep, args=(over, lost), name="marker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        marker.drop()


def can_mark() -> bool:
    """Whether google-cloud-storage is here; gcsfs alone, which Orbax and etils take, tells no generations."""
    try:
        return importlib.util.find_spec("google.cloud.storage") is not None
    except ModuleNotFoundError:
        return False


def _blobs(place: str, what: str) -> Callable[[], Any]:
    """Makes google-cloud-storage's object of the marker, which it is asked through."""
    from google.cloud import storage

    bucket, _, folder = place.removeprefix("gs://").partition("/")
    with _told(what):
        found = storage.Client().bucket(bucket)
    return lambda: found.blob("/".join(part for part in (folder.strip("/"), LOCK) if part))


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever the storage's client raises, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(f"{what} cannot be marked as in use: {type(error).__name__}: {said:.300}") from error


class Marker:
    """The object of one folder; `blobs` makes a handle of it, `what` begins what is said of it."""

    def __init__(self, blobs: Callable[[], Any], what: str, times: Times):
        self._blobs, self._what, self._times = blobs, what, times
        # An object's metadata are texts.
        self._about = {name: str(value) for name, value in this_process().items()} | {"key": os.urandom(8).hex()}
        self._generation = 0

    def take(self, say: Callable[[str], None]) -> None:
        """Raises UserError where a living process holds it; waits where one may be dead."""
        wanted, waiting = 0, None
        with _told(self._what):
            while not self._write(wanted):
                found = self.holder()
                if found is None:
                    wanted = 0
                elif found.about.get("key") == self._about["key"]:  # the answer to an earlier request was lost
                    self._generation = found.generation
                    return
                elif found.gone or found.heard_seconds > self._times.dead:
                    wanted = found.generation
                elif found.heard_seconds < self._times.silent or waiting not in (None, found.generation):
                    raise UserError(
                        f"{self._what} is in use by {found}, last heard {found.heard_seconds:.0f} s ago; wait until it ends, "
                        f"or give another folder (a dead run's marker is free after {self._times.dead:.0f} s)"
                    )
                else:
                    waiting = waiting or self._wait_for(found, say)
                    time.sleep(min(self._times.beat, 5.0))

    def _wait_for(self, found: Holder, say: Callable[[str], None]) -> int:
        left = self._times.dead - found.heard_seconds
        say(f"{self._what}: {found} has not been heard for {found.heard_seconds:.0f} s; waiting {left:.0f} s for it")
        return found.generation

    def keep(self, over: threading.Event, lost: Callable[[int, str], None]) -> None:
        """Writes it anew until `over`, or until it is `lost`."""
        written = time.monotonic()
        while not over.wait(self._times.beat):
            began, why = time.monotonic(), "another process has removed the marker"
            try:
                if self._write(self._generation):
                    written = began
                    continue
                found = self.holder()
                if found is not None and found.about.get("key") == self._about["key"]:
                    self._generation, written = found.generation, began
                    continue
                why = why if found is None else f"{found} has taken over"
            except Exception as error:  # the network's; the next beat may come through
                if time.monotonic() - written < self._times.fenced:
                    continue
                seconds, kind = time.monotonic() - written, type(getattr(error, "cause", error)).__name__
                why = f"it could not be marked as in use for {seconds:.0f} s ({kind}), and another run may take over"
                lost(EXIT_AGAIN, f"{self._what}: {why}; run the same command again")
                return
            lost(EXIT_USER, f"{self._what}: {why}; this run ends, and nothing more is written")
            return

    @property
    def _patience(self) -> dict[str, Any]:
        """With a request, and with those that repeat it."""
        from google.cloud.storage.retry import DEFAULT_RETRY

        return {"timeout": REQUEST_SECONDS, "retry": DEFAULT_RETRY.with_timeout(self._times.beat)}

    def drop(self) -> None:
        """Frees it; where that fails, it is free once it is old."""
        with contextlib.suppress(Exception):
            self._blobs().delete(if_generation_match=self._generation, **self._patience)

    def holder(self) -> Holder | None:
        """Who holds it."""
        from google.api_core.exceptions import NotFound

        blob = self._blobs()
        try:
            blob.reload(**self._patience)
        except NotFound:
            return None
        heard = (datetime.now(UTC) - blob.updated).total_seconds()
        return Holder(dict(blob.metadata or {}), blob.generation, max(0.0, heard))

    def _write(self, generation: int) -> bool:
        """False where what is there is not of this generation (0: nothing is)."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._blobs()
        blob.metadata = self._about
        options = {"content_type": "application/json", "if_generation_match": generation, **self._patience}
        try:
            blob.upload_from_string(json.dumps(self._about), **options)
        except PreconditionFailed:
            return False
        self._generation = blob.generation
        return True
