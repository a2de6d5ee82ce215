"""A run is one run whatever the number of its processes, also when one of them dies in the middle."""

import json
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from buckets import serving
from launched import HERE, Run, lines, logged, same_files, saved
from marked import exhaustive, slow

import jaxft
from jaxft.learn.marker import can_mark

# The train verb, with every byte counted that is read of the weights.
COUNTING = """
import sys
from jaxft import train
from jaxft.errors import run_verb
from jaxft.weights.shards import Slice

counted = []
for name, size in (("__getitem__", lambda out, *_: out.nbytes), ("read_rows", lambda _, first, out: out.nbytes)):
    def counting(self, *arguments, read=getattr(Slice, name), size=size):
        out = read(self, *arguments)
        counted.append(size(out, *arguments))
        return out
    setattr(Slice, name, counting)

def main(argv):
    train.main(argv)
    print(f"read {sum(counted)} bytes of weights", file=sys.stderr)

run_verb(main)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with two devices."""
    with Run(tmp_path_factory.mktemp("alone") / "run", 1, 2) as run:
        return run.all_end_well()


@pytest.mark.slow  # half a minute of two cores
def test_two_processes_are_one_process_with_as_many_devices(alone, tmp_path):
    """To the last bit; process 0 alone writes and prints, each reads its share, and the coordinator listens where asked."""
    with Run(tmp_path / "run", 2, 1, program=("-c", COUNTING)) as run:
        run.until(lambda: (run.folder / "config.json").exists())
        assert listening(run.port) == {HERE}
        run.all_end_well()
    same_files(alone.folder, run.folder)
    assert run.said(1, "out") == "" and "report: " in run.said(0, "out")
    assert {path.name for path in run.folder.iterdir()} == {path.name for path in alone.folder.iterdir()}
    assert len(list((run.folder / "tensorboard").iterdir())) == 1
    results = json.loads((run.folder / "results.json").read_text())
    assert (results["device"]["count"], results["device"]["processes"]) == (2, 2)
    whole = (Path(jaxft.__file__).parent / "tiny" / "base" / "model.safetensors").stat().st_size
    for index in (0, 1):
        read = int(re.fullmatch(r"read (\d+) bytes of weights\n", run.said(index))[1])
        assert 0.45 * whole < read < 0.55 * whole  # norms are on every device


def listening(port):
    """The addresses on which somebody listens on `port`, by Linux's own tables."""
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add(socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:"))
    return found


WHOLE = [
    "--optim.accumulation_steps", "2", "--lora.dropout", "0.2", "--eval.tasks", "final_answer", "--eval.limit", "6",
    "--eval.max_new_tokens", "8", "--eval.samples", "2", "--optim.max_steps", "12",
]  # fmt: skip


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """One process with four devices: packing, dropout, accumulation, evaluation, generation."""
    with Run(tmp_path_factory.mktemp("four") / "run", 1, 4, *WHOLE) as run:
        return run.all_end_well().folder


def scores(folder):
    return json.loads((folder / "results.json").read_text())["tasks"]


@pytest.mark.parametrize(("count", "devices"), [slow(2, 2), exhaustive(4, 1)])
def test_a_run_is_the_same_to_the_last_bit_on_one_two_and_four_processes(four, tmp_path, count, devices):
    with Run(tmp_path / "run", count, devices, *WHOLE) as run:
        run.all_end_well()
    same_files(four, run.folder)
    assert scores(run.folder) == scores(four)


@pytest.mark.parametrize(("count", "then", "dead"), [slow(1, 2, 0), exhaustive(2, 4, 1), exhaustive(4, 1, 0)])
def test_a_run_saved_on_some_processes_and_resumed_on_others_is_the_uninterrupted_one(
    four, tmp_path, count, then, dead
):
    """And when one is killed, the others end within 30 seconds, each with one line that names it."""
    with Run(tmp_path / "run", count, 4 // count, *WHOLE) as run:
        run.until(saved(run.folder, 4), what="a checkpoint")
        run.processes[dead].kill()
        began = time.monotonic()
        for index in set(run.processes) - {dead}:
            assert run.ends(index, 30) == 75
            (line,) = run.said(index).splitlines()
            assert re.match(
                rf"error: process {index} of {count}: process {dead} \(\S+\) died while this one was at \w+ ", line
            )
        assert time.monotonic() - began < 30
    assert not (run.folder / "adapter").exists()
    with Run(run.folder, then, 4 // then, *WHOLE) as resumed:
        resumed.all_end_well()
    assert re.search(r"resumed at step [4-9]", resumed.said(0, "out"))
    same_files(four, run.folder)


@pytest.mark.parametrize("stopped", [exhaustive(0), slow(1)])
def test_when_one_of_two_stops_the_other_ends_with_a_line_that_names_it(tmp_path, stopped):
    with Run(tmp_path / "run", 2, 1, "--optim.max_steps", "4000", "--eval.every_steps", "1000") as run:
        run.until(logged(run.folder, 8), what="step 8")
        run.processes[stopped].send_signal(signal.SIGSTOP)
        assert run.ends(1 - stopped, 30) == 75
        (line,) = run.said(1 - stopped).splitlines()
        assert re.search(
            rf"process {stopped} \(\S+\) has not answered for 24 s while this one was at step \d+; run the", line
        )


STUCK = """
import functools, sys, threading
from jaxft import train
from jaxft.data.loader import Loader
from jaxft.errors import run_verb
from jaxft.parallel import watchdog

watchdog.Watchdog = functools.partial(watchdog.Watchdog, step_seconds=10.0)
make = Loader.batch_at

def batch_at(self, step, rows=None):
    if step == 30 and sys.argv[sys.argv.index("--mesh.process_id") + 1] == "1":
        threading.Event().wait()
    return make(self, step, rows)

Loader.batch_at = batch_at
run_verb(train.main)
"""


@pytest.mark.slow
def test_when_one_hangs_in_its_data_both_end_and_the_stacks_show_where(tmp_path):
    with Run(tmp_path / "run", 2, 1, "--optim.max_steps", "60", program=("-c", STUCK)) as run:
        assert [run.ends(index) for index in (0, 1)] == [75, 75]
    assert '"<string>"' in run.said(1) and "in batch_at" in run.said(1)
    lasts = [run.said(index).splitlines()[-1] for index in (0, 1)]
    assert all(
        re.match(rf"error: process {index} of 2: .*step 3\d.* has not ended for", lasts[index]) for index in (0, 1)
    )


@pytest.mark.exhaustive
def test_every_weight_trained_on_two_processes_is_the_model_of_one(tmp_path):
    more = ["--lora", "none", "--optim.learning_rate", "1e-3"]
    with Run(tmp_path / "one", 1, 2, *more) as one, Run(tmp_path / "two", 2, 1, *more) as two:
        one.all_end_well(), two.all_end_well()
    assert lines(one.folder) == lines(two.folder)
    names = {path.name for path in (one.folder / "model").iterdir()}
    assert names == {path.name for path in (two.folder / "model").iterdir()}
    for name in names - {"README.md"}:
        assert (one.folder / "model" / name).read_bytes() == (two.folder / "model" / name).read_bytes(), name


# A bucket that is a folder: for etils, which all but the arrays go through, and for TensorStore, which writes those.
BUCKET = """
import os, sys
from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils

ROOT = os.environ["BUCKET"]
os.environ["EPATH_USE_TF"] = "0"  # etils prefers TensorFlow where it is installed

def here(path):
    return os.fspath(path).replace("gs://bucket", ROOT, 1)

class Folder(backend._OsPathBackend):
    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found
        def call(*arguments, **options):
            if name == "open" and "w" in arguments[1] or name == "rename":
                os.makedirs(os.path.dirname(here(arguments[-1] if name == "rename" else arguments[0])), exist_ok=True)
            assert not (name == "open" and "a" in arguments[1]), "object storage does not append"
            out = found(*(here(a) if isinstance(a, (str, os.PathLike)) else a for a in arguments), **options)
            return [p.replace(ROOT, "gs://bucket", 1) for p in out] if name == "glob" else out
        return call

gpath._PREFIX_TO_BACKEND["gs"] = Folder()
gcs_utils.is_hierarchical_namespace_enabled = lambda path: False  # asks the bucket
gcs_utils.get_kvstore_for_gcs = lambda path: {"driver": "file", "path": here(path)}
from jaxft import train
from jaxft.errors import run_verb
run_verb(train.main)
"""


@pytest.fixture
def marked(monkeypatch):
    """A stand-in of the storage's API, for the marker alone."""
    with serving() as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.address)
        yield bucket
    writes = [query for method, _, query in bucket.requests if method == "POST"]
    assert bool(writes) == can_mark() and bucket.objects == {}


@pytest.mark.slow
def test_a_run_in_object_storage_is_the_one_on_disk_also_when_it_was_killed(alone, tmp_path, monkeypatch, marked):
    """With a marker of its writer where google-cloud-storage is installed."""
    monkeypatch.setenv("BUCKET", str(tmp_path / "bucket"))
    folder, more = tmp_path / "bucket" / "run", ("--run.dir", "gs://bucket/run")
    with Run(tmp_path / "local", 2, 1, *more, program=("-c", BUCKET)) as run:
        run.until(lambda: len(list(folder.glob("checkpoints/*/commit_success*"))) > 0, what="a checkpoint")
        run.processes[1].kill()
        assert run.ends(0, 30) == 75, run.said(0)
    with Run(tmp_path / "again", 2, 1, *more, program=("-c", BUCKET)) as run:
        run.all_end_well()
    assert "run folder: gs://bucket/run, resumed at step " in run.said(0, "out")
    same_files(alone.folder, folder)
    names = {path.name for path in alone.folder.iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    assert not (tmp_path / "local").exists()
    with Run(tmp_path / "third", 1, 2, *more, program=("-c", BUCKET)) as run:
        run.all_end_well()
    assert "gs://bucket/run: this run has ended" in run.said(0, "out")
