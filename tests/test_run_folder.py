"""Whole runs against one folder: a full disk at any time, a second start, a start after a kill, and damage in between."""

import os
import signal
import subprocess
import sys
import time

import pytest
from launched import on_one_device
from test_disk import names, small_disk  # noqa: F401
from test_train import SHORT

from jaxft.disk import LOCK, TEMPORARY
from jaxft.weights.checkpoint import UNFINISHED

pytestmark = pytest.mark.slow
TRAIN = [sys.executable, "-m", "jaxft.train", "--config", "tiny_cpu.py", *SHORT]


def start(folder, *more):
    """A training run in a process of its own."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": on_one_device()}
    return subprocess.Popen([*TRAIN, "--run.dir", str(folder), *more], **piped)


@pytest.mark.parametrize("kilobytes", [8, 700, 1700])
def test_a_full_disk_ends_a_run_with_exit_3_whenever_it_fills(small_disk, tmp_path, kilobytes):  # noqa: F811
    """As the folder is begun, at a save, and later; the cache of programs and rows lies elsewhere."""
    place = tmp_path / "d"
    ended = small_disk(place, f"{kilobytes}k", *TRAIN, "--run.dir", place / "run", timeout=300)
    assert ended.returncode == 3, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "the disk is full" in line and " needed, " in line and " bytes free; make room" in line
    left = tmp_path / "d-left"
    found = [path.name for path in left.rglob("*")]
    assert not [name for name in found if TEMPORARY in name or UNFINISHED in name or name == LOCK]
    assert "adapter" not in found


def test_a_second_start_is_refused_and_one_after_a_kill_takes_over_and_says_what_is_damaged(tmp_path):
    folder = tmp_path / "run"
    more = ("--optim.max_steps", "1000", "--optim.epochs", "1000", "--run.keep", "3")
    with start(folder, *more) as first:
        while not (folder / "checkpoints" / "20").exists():
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.1)
        first.send_signal(signal.SIGSTOP)  # it keeps the folder, and leaves the cores to the others
        second = start(folder, *more)
        began = os.times().children_user
        said = second.communicate()[1]
        assert second.returncode == 2 and f"in use by process {first.pid} on " in said and said.count("\n") == 1
        assert os.times().children_user - began < 10  # before anything is read or compiled
        reads = [sys.executable, "-m", "jaxft.report", str(folder)]
        assert subprocess.run(reads, capture_output=True).returncode == 0
        first.kill()
    steps = sorted(int(name) for name in names(folder / "checkpoints") if name.isdigit())
    (folder / "checkpoints" / str(steps[-1]) / "state" / "manifest.ocdbt").write_bytes(b"")
    with start(folder, *more) as third:
        lines = []
        while not lines or not lines[-1].startswith("run folder: "):
            lines.append(third.stdout.readline())
            assert lines[-1], third.stderr.read()
        third.kill()
    assert any(f"step {steps[-1]}: state/manifest.ocdbt has 0 bytes" in line for line in lines)
    assert lines[-1].strip().endswith(f"resumed at step {steps[-2]}")
