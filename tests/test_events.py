"""TensorBoard's event file: read by TensorBoard, and a run goes on without it where it cannot be written any more."""

import json
import struct
import sys

import pytest
from test_disk import small_disk  # noqa: F401

from jaxft import config
from jaxft.errors import UserError
from jaxft.learn import metrics
from jaxft.learn.events import Events
from jaxft.learn.folder import RunFolder


def records(folder):
    """The events of all files, oldest file first; a file that is cut in a record ends there, as TensorBoard reads it."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while len(content) >= 12 and len(content) >= 16 + (size := struct.unpack("<Q", content[:8])[0]):
            yield Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def test_events_are_there_at_once_and_a_resumed_file_hides_what_was_undone(tmp_path):
    from tensorboardX import summary

    first = Events(tmp_path)
    for step in range(4):
        first.add(summary.scalar("train/loss", 0.5 * step), step)
    assert [e.step for e in records(tmp_path)] == [0, 0, 1, 2, 3]
    again = Events(tmp_path, purged=3)
    again.add(summary.scalar("train/loss", 9.0), 3)
    found = list(records(tmp_path))
    assert found[0].file_version == found[5].file_version == "brain.Event:2"
    assert (found[6].session_log.status, found[6].step) == (1, 3)  # START: what comes before, from step 3 on, is hidden
    assert found[7].summary.value[0].simple_value == 9.0
    first.close(), again.close()


FILLS = """
import sys, numpy as np
from pathlib import Path
from jaxft.learn.metrics import Metrics
from jaxft.learn.writers import Board
here = Path(sys.argv[1])
with Metrics(here) as metrics:
    metrics.writers.append(Board(here / "tensorboard", None, {"lora.rank": 8}, ["final/x"]))
    for step in range(1, 400):
        metrics.write({"step": step, "loss": 1.0, "grad_norm": 2.0})
        metrics.histogram("lora_norm/A", np.arange(50.0) * step, step)
        metrics.text("samples", "a" * 500, step)
        metrics.sync()
    metrics.scores({"final/x": 1.0}, step)
"""


def test_a_run_goes_on_without_tensorboard_when_its_disk_is_full_and_says_so_once(small_disk, tmp_path):  # noqa: F811
    (tmp_path / "run").mkdir()
    board = tmp_path / "run" / "tensorboard"
    ended = small_disk(board, "64k", sys.executable, "-c", FILLS, tmp_path / "run", timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        f"TensorBoard in {board}: No space left on device; the run goes on without it, metrics.jsonl has all"
    ]
    told = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = {e.step for e in records(tmp_path / "run" / "tensorboard-left")}
    assert told == list(range(1, 400)) and 10 < max(shown) < 399 and shown == set(range(max(shown) + 1))


def test_parts_of_a_run_folder_that_cannot_be_written_stop_it_at_its_start(tmp_path):
    settings = config.Config(run=config.Run(dir=str(tmp_path / "run")))
    folder = RunFolder(settings)
    with folder.held():
        folder.start({"data": {"fingerprint": "abc"}})
    (tmp_path / "run" / "tensorboard").touch()
    with pytest.raises(UserError, match=r"run.dir: .*tensorboard cannot be written: .*; mend that, or give another"):
        RunFolder(settings).held().__enter__()
    with pytest.raises(UserError, match=r"run.dir: .*tensorboard cannot be written: File exists; mend that"):
        metrics.opened(folder, settings, None)
