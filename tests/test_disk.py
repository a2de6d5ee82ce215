"""Files and folders appear whole or not at all, leftovers go, full disks are said, and one writer at a time holds a folder."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxft import disk
from jaxft.errors import OutOfResources, UserError, exit_code, one_line, ran_out, run_verb


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def program(source, *arguments):
    """A process that runs `source`, its output a pipe."""
    return subprocess.Popen([sys.executable, "-c", source, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="session")
def small_disk():
    """`run(folder, size, *command)`: a command with a file system of its own on `folder`, which is copied to
    `folder`-left afterwards; gives the ended process."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare here to mount a small file system with")

    def run(folder, size, *command, **options):
        folder.mkdir(exist_ok=True)
        script = (
            'mount -t tmpfs -o size="$1" none "$2" || exit 99; d=$2; shift 2; "$@"; c=$?; cp -a "$d" "$d-left"; exit $c'
        )
        inside = ["sh", "-c", script, "sh", size, str(folder), *map(str, command)]
        return subprocess.run(["unshare", "-rm", *inside], capture_output=True, text=True, **options)

    tried = run(Path(os.environ["HOME"]) / "tried", "1m", "true")
    if tried.returncode:
        pytest.skip(f"no user namespaces here to mount a small file system in: {tried.stderr.strip()}")
    return run


def test_a_file_is_replaced_as_a_whole_and_an_error_leaves_the_old_one(tmp_path):
    file = tmp_path / "results.json"
    disk.write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        disk.write_text(file, "new \ud800")
    assert (file.read_text(), names(tmp_path)) == ("old", ["results.json"])
    disk.write_text(file, "new")
    assert (file.read_text(), names(tmp_path)) == ("new", ["results.json"])


def test_a_folder_takes_its_name_when_it_is_whole_and_replaces_the_old_one(tmp_path):
    for text in ("first", "second"):
        with disk.new_folder(tmp_path / "adapter") as new:
            (new / "sub").mkdir()
            (new / "sub" / text).write_text(text)
            assert new.name.endswith(disk.TEMPORARY)
        assert (names(tmp_path), names(tmp_path / "adapter" / "sub")) == (["adapter"], [text])
    with pytest.raises(ZeroDivisionError), disk.new_folder(tmp_path / "adapter") as new:
        (new / "half").touch()
        raise ZeroDivisionError
    assert (names(tmp_path), names(tmp_path / "adapter")) == (["adapter"], ["sub"])


FILLS = """
import sys, time
from pathlib import Path
from jaxft import disk
with disk.new_folder(Path(sys.argv[1])) as new:
    (new / "half").touch()
    print("begun", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_that_looks_whole_and_the_next_one_sweeps_it(tmp_path):
    living, dead = program(FILLS, tmp_path / "adapter"), program(FILLS, tmp_path / "adapter")
    with living, dead:
        for writer in (living, dead):
            assert writer.stdout.readline() == "begun\n"
        dead.kill()
        dead.wait()
        left = names(tmp_path)
        assert len(left) == 2 and all(name.startswith(".adapter.") and name.endswith(disk.TEMPORARY) for name in left)
        disk.sweep(tmp_path, "adapter")
        (kept,) = names(tmp_path)
        assert f".{living.pid}-" in kept  # what somebody fills at this moment stays
        living.kill()
    with disk.new_folder(tmp_path / "adapter") as new:
        (new / "whole").touch()
    assert names(tmp_path) == ["adapter"]


def test_the_only_writer_of_a_folder_sweeps_all_of_it(tmp_path):
    (tmp_path / f".report.md.1{disk.TEMPORARY}").touch()
    (tmp_path / f".adapter.1{disk.TEMPORARY}").mkdir()
    (tmp_path / "kept.txt").touch()
    disk.sweep(tmp_path)
    assert names(tmp_path) == ["kept.txt"]


WRITES_ALL = """
import sys
from pathlib import Path
from jaxft import disk
from jaxft.errors import run_verb
here = Path(sys.argv[1])

def main(argv):
    (here / "kept").write_bytes(bytes(1 << 20))
    if argv[1] == "file":
        disk.write_text(here / "big", "a" * (4 << 20))
    elif argv[1] == "print":
        sys.stdout = (here / "big").open("w")
        print("a" * (4 << 20))
    else:
        with disk.new_folder(here / "big", int(argv[2]) or None) as new:
            (new / "part").write_bytes(bytes(4 << 20))

run_verb(main)
"""


@pytest.mark.parametrize(
    ("what", "needed"), [("file", 0), ("folder", 0), ("folder", 4 << 20), ("print", 0)], ids=lambda x: str(x)
)
def test_a_full_disk_ends_with_exit_3_and_what_is_free_and_leaves_nothing_new(small_disk, tmp_path, what, needed):
    ended = small_disk(tmp_path / "d", "3m", sys.executable, "-c", WRITES_ALL, tmp_path / "d", what, needed)
    assert ended.returncode == 3, ended.stderr
    (line,) = ended.stderr.splitlines()
    wanted = "4,194,304 bytes needed" if needed else "more needed"
    assert (
        line.startswith("error: ")
        and "the disk is full" in line
        and wanted in line
        and " bytes free; make room" in line
    )
    assert names(tmp_path / "d-left") == ["kept", *(["big"] if what == "print" else [])][::-1]
    assert (tmp_path / "d-left" / "kept").stat().st_size == 1 << 20


class XlaRuntimeError(RuntimeError):
    """Called as JAX's own is."""


def test_what_ran_out_is_told_by_its_kind():
    error = OSError(errno.EDQUOT, "Disk quota exceeded", "/nowhere/file")
    assert "/nowhere/file: the disk is full (Disk quota exceeded)" in str(ran_out(error))
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = ValueError("OUT_OF_RANGE: write: No space left on device [tensorstore]")
    assert "the disk is full" in str(ran_out(wrapped)) and exit_code(wrapped) == 3
    assert "host's memory ran out" in str(ran_out(MemoryError()))
    device = XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes")
    assert "allocate 123 bytes; lower optim.batch_size" in str(ran_out(device))
    assert ran_out(OSError(errno.EACCES, "no")) is None and exit_code(KeyError()) == 1


def test_a_devices_memory_that_runs_out_is_one_line_and_exit_3(monkeypatch, capsys):
    import jax.numpy as jnp

    monkeypatch.setattr(sys, "argv", ["verb"])
    with pytest.raises(SystemExit) as ended:
        run_verb(lambda argv: jnp.zeros((1 << 50,), jnp.int8).block_until_ready() and 0)
    said = capsys.readouterr().err
    assert ended.value.code == 3 and said.count("\n") == 1
    assert "a device's memory ran out" in said and str(1 << 50) in said and "optim.batch_size" in said


HOLDS = """
import sys, time
from pathlib import Path
from jaxft import disk
with disk.only_writer(Path(sys.argv[1]), "run.dir: mine"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_by_name_and_a_dead_ones_lock_is_free(tmp_path):
    folder = tmp_path / "runs" / "mine"
    with program(HOLDS, folder) as first:
        assert first.stdout.readline() == "held\n"
        began = time.monotonic()
        refused = pytest.raises(UserError, match=rf"run.dir: mine is in use by process {first.pid} on .* since 20")
        with refused, disk.only_writer(folder, "run.dir: mine"):
            pass
        assert time.monotonic() - began < 2
        first.send_signal(signal.SIGKILL)
    assert names(folder) == [disk.LOCK]
    with disk.only_writer(folder, "run.dir: mine") as warning:
        assert warning is None and json.loads((folder / disk.LOCK).read_text())["pid"] == os.getpid()
        (folder / "made").touch()
    assert names(folder) == ["made"]


def test_a_folder_made_only_for_its_lock_goes_with_it(tmp_path):
    with disk.only_writer(tmp_path / "runs" / "mine", "x"):
        assert names(tmp_path / "runs" / "mine") == [disk.LOCK]
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="x cannot be written: "), disk.only_writer(tmp_path / "file" / "mine", "x"):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", unknown)
    with disk.only_writer(tmp_path, "x") as warning:
        assert warning == "x: this file system has no locks; see that no other run writes here"
    assert names(tmp_path) == []


def test_of_starts_at_once_one_holds_the_folder(tmp_path):
    """Each holds it for a moment, and appends a line at its begin and its end; no two are ever in it."""
    source = """
import sys, time
from pathlib import Path
from jaxft import disk
from jaxft.errors import UserError
for _ in range(50):
    try:
        with disk.only_writer(Path(sys.argv[1]) / "run", "x"), (Path(sys.argv[1]) / "log").open("a") as log:
            for word in ("in", "out"):
                log.write(word + "\\n")
                log.flush()
                time.sleep(0.0005)
    except UserError:
        time.sleep(0.0005)
"""
    for started in [program(source, tmp_path) for _ in range(3)]:
        with started:
            assert started.wait() == 0
    said = (tmp_path / "log").read_text().split()
    assert len(said) > 20 and said == ["in", "out"] * (len(said) // 2)


def test_no_secret_and_no_escape_is_in_a_line():
    said = one_line("at https://me:secret@host/x with hf_" + "aB3" * 11 + "\x1b[2J\nnext")
    assert said == "at https://***@host/x with ***\\x1b[2J next"


def test_no_room_is_found_before_anything_is_written(tmp_path):
    refused = pytest.raises(OutOfResources, match=r"9,000,000,000,000,000 bytes needed, [0-9,]+ bytes free")
    with refused, disk.new_folder(tmp_path / "merged", 9 * 10**15):
        pass
    assert names(tmp_path) == []
