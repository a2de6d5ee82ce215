"""TensorBoard's event file, written as it is told: tensorboardX's own writer has a thread that dies where the disk is full, and
a run then waits for it for ever.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary


class Events:
    """A new event file in `folder`, which hides what earlier ones have from step `purged` on. All methods raise OSError."""

    def __init__(self, folder: Path, purged: int | None = None):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names: those of one second too were begun one after the other.
        second, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{second:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"
        self._stream = (folder / name).open("xb", buffering=0)
        try:
            self._add(Event(file_version="brain.Event:2"))
            if purged is not None:
                self._add(Event(session_log=SessionLog(status=SessionLog.START)), purged)
        except OSError:
            self.close()
            raise

    def add(self, summary: Summary, step: int | None = None) -> None:
        """One summary, at a step."""
        from tensorboardX.proto.event_pb2 import Event

        self._add(Event(summary=summary), step)

    def close(self) -> None:
        """What was written is there already."""
        with contextlib.suppress(OSError):
            self._stream.close()

    def _add(self, event: Event, step: int | None = None) -> None:
        """A record of the TFRecord format: length, its checksum, content, its checksum."""
        from tensorboardX.record_writer import masked_crc32c

        event.wall_time = time.time()
        if step is not None:
            event.step = step
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
        left = memoryview(length + next(checks) + content + next(checks))
        while left:
            left = left[self._stream.write(left) :]
