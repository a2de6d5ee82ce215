"""Runs of several processes over loopback: one run whatever their number, and all of them end when one does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import jaxft
from jaxft import config
from jaxft.parallel.meeting import Place, Told, find_place, meet, readable
from jaxft.parallel.processes import Processes

HERE = "127.0.0.1"
SHORT = [
    "--data.limit", "60", "--data.max_length", "96", "--optim.max_steps", "4",
    "--eval.every_steps", "2", "--run.log_every", "2", "--eval.tasks", "--eval.samples", "0",
]  # fmt: skip
TIMES = {
    "tokens_per_second", "tokens_per_second_per_chip", "seconds_per_step", "host_memory_gib", "eval_seconds", "data_wait",
}  # fmt: skip
WEIGHTS = "adapter/adapter_model.safetensors"


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


def free_port():
    with socket.create_server((HERE, 0)) as server:
        return server.getsockname()[1]


class Run:
    """The train verb in `count` processes with so many devices each, and what they say."""

    def __init__(self, folder, count, devices, *more, program=("-m", "jaxft.train"), only=None):
        self.folder, self.port = folder, free_port()
        home = folder.parent / "home"
        home.mkdir(exist_ok=True)
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        self.processes, self.logs = {}, {}
        for index in range(count) if only is None else only:
            place = self.place(index, count) if count > 1 else []
            command = [
                sys.executable,
                *program,
                "--config",
                "tiny_cpu.py",
                "--run.dir",
                str(folder),
                *SHORT,
                *place,
                *more,
            ]
            self.logs[index] = [folder.parent / f"{folder.name}.{index}.{name}" for name in ("out", "err")]
            with self.logs[index][0].open("w") as out, self.logs[index][1].open("w") as err:
                self.processes[index] = subprocess.Popen(
                    command, env={**os.environ, "XLA_FLAGS": flags, "HOME": str(home)}, stdout=out, stderr=err
                )

    def place(self, index, count):
        values = {"coordinator": f"{HERE}:{self.port}", "num_processes": count, "process_id": index}
        return [part for name, value in values.items() for part in (f"--mesh.{name}", str(value))]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def said(self, index, stream="err"):
        """What a process printed; but for that it waited for another, which on a busy machine starts later."""
        lines = self.logs[index][0 if stream == "out" else 1].read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not re.match(r"process \d of \d: waiting for ", line))

    def until(self, condition, seconds=600, what="it"):
        """Waits for `condition()`; fails where the time is up or a process ends before it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [i for i, process in self.processes.items() if process.poll() is not None]
            assert not ended or condition(), f"before {what}: " + "\n".join(map(self.said, ended))
            assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
            time.sleep(0.05)

    def ends(self, index, seconds=600):
        """The exit code."""
        return self.processes[index].wait(seconds)

    def all_end_well(self):
        for index in self.processes:
            assert self.ends(index) == 0, self.said(index)
        return self


def lines(folder):
    """metrics.jsonl without what clock and machine decide."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def logged(folder, step):
    file = folder / "metrics.jsonl"
    return lambda: (
        file.exists()
        and any(json.loads(line)["step"] >= step for line in file.read_text().splitlines() if line.endswith("}"))
    )


def saved(folder, step):
    return lambda: (folder / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").exists()


def same_files(one, two):
    assert lines(one) == lines(two)
    for name in (WEIGHTS, "adapter/adapter_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


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


MEMBER = """
import sys, time
from jaxft.errors import UserError, run_verb
from jaxft.parallel import processes
from jaxft.parallel.meeting import Place, Told, meet
from jaxft.parallel.watchdog import Watchdog

index, count, port, plan, rank, limit = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6], float(sys.argv[6])
processes.SILENCE_OTHERWISE_SECONDS, processes.BEAT_SECONDS, processes.GRACE_SECONDS = 2.0, 0.1, 2.0

def main(argv):
    place = Place(f"127.0.0.1:{port}", count, index)
    told = Told(lambda line: print(line, file=sys.stderr, flush=True), 0.5 if limit < 60 else limit)
    us = processes.Processes(index, count, meet(place, {"lora.rank": int(rank)}, told, limit))
    us.doing("step 7")
    agreed = us.from_first(lambda: {"began": 5})
    us.barrier()
    with processes.guarded(us):
        if plan == f"fails{index}":
            print("met", agreed, flush=True)
            raise UserError("the loss is not finite")
        with Watchdog(us, step_seconds=1.0, otherwise_seconds=1.0 if plan == f"hangs{index}" else 60.0) as watchdog:
            watchdog.doing("evaluating at step 7")
            print("met", agreed, flush=True)
            sys.stdin.readline()
        us.leave()

run_verb(main)
"""


JOIN = """
import sys
from jaxft import config
from jaxft.errors import run_verb
from jaxft.parallel.processes import joined

def main(argv):
    mesh = config.Mesh(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    with joined(mesh, {}, start_seconds=2.0, say_seconds=0.5):
        print("joined")

run_verb(main)
"""


def test_a_worker_alone_ends_with_exit_code_2_before_it_touches_a_device():
    index, address = 1, f"{HERE}:{free_port()}"
    found = subprocess.run([sys.executable, "-c", JOIN, address, str(index)], capture_output=True, text=True)
    what = f"process 0 at {address}"
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.splitlines() == [
        f"process {index} of 2: waiting for {what}; every process runs the same command",
        f"error: process {index} of 2: waited 2 s for {what}; every process runs the same command",
    ]


class Members:
    """Processes that meet as a run's do and wait, without devices."""

    def __init__(self, count, plan="waits", only=None, ranks=None, limit=60):
        self.port, self.processes = free_port(), {}
        self.start = lambda index: self.processes.update({index: self._start(index, count, plan, ranks or {}, limit)})
        for index in range(count) if only is None else only:
            self.start(index)

    def _start(self, index, count, plan, ranks, limit):
        limit = limit if index == min(self.processes, default=index) else max(limit, 59)  # the first gives up first
        arguments = [str(index), str(count), str(self.port), plan, str(ranks.get(index, 8)), str(limit)]
        command = [sys.executable, "-u", "-c", MEMBER, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes.values():
            process.kill()
            process.communicate() if not process.stdin.closed else process.wait()
            process.stdout.close(), process.stderr.close()

    def met(self):
        for index, process in sorted(self.processes.items()):
            assert readable([process.stdout], 60), f"process {index} has not met the others"
            assert process.stdout.readline() == "met {'began': 5}\n", self.end(index)

    def end(self, index, seconds=30):
        """Exit code and stderr."""
        process = self.processes[index]
        return process.wait(seconds), process.stderr.read()


def test_processes_meet_agree_and_leave():
    with Members(3) as members:
        members.met()
        for process in members.processes.values():
            process.stdin.close()
        assert [members.end(index) for index in range(3)] == [(0, "")] * 3


def test_what_process_0_says_in_one_breath_with_its_go_is_not_lost():
    """It has decided something before the other, on a busy machine, has read that all are there."""
    with socket.create_server((HERE, 0)) as server:
        found = []
        place = Place(f"{HERE}:{server.getsockname()[1]}", 2, 1)
        told = Told(print, 60.0)
        caller = threading.Thread(target=lambda: found.append(meet(place, {}, told, 60.0)))
        caller.start()
        with server.accept()[0] as wire:
            wire.recv(1 << 16)
            wire.sendall(b'{"go": "here"}\n{"share": 7}\n')
            caller.join()
            us = Processes(1, 2, found[0])
            asking = threading.Thread(target=lambda: found.append(us.from_first(lambda: None)), daemon=True)
            asking.start()
            asking.join(30)
            us.leave()
    assert found[1:] == [7]


@pytest.mark.parametrize(("dead", "how"), [(0, "died"), (1, "died"), (1, "stopped")])
def test_when_one_dies_or_stops_the_others_end_with_a_line_that_names_it(dead, how):
    with Members(3) as members:
        members.met()
        began = time.monotonic()
        members.processes[dead].send_signal(signal.SIGKILL if how == "died" else signal.SIGSTOP)
        for index in {0, 1, 2} - {dead}:
            code, said = members.end(index)
            what = "died" if how == "died" else "has not answered for 2 s"
            assert code == 75
            assert said == (
                f"error: process {index} of 3: process {dead} ({socket.gethostname()}) {what} while this one was at "
                "evaluating at step 7; run the same command again to resume from the newest checkpoint\n"
            )
        assert time.monotonic() - began < 30


def test_when_one_ends_by_a_mistake_the_others_end_with_its_line_and_its_code():
    with Members(3, "fails1") as members:
        assert members.end(1) == (2, "error: process 1 of 3: the loss is not finite\n")
        for index in (0, 2):
            code, said = members.end(index)
            named = f"process 1 ({socket.gethostname()}) ended: the loss is not finite"
            assert (code, said) == (2, f"error: process {index} of 3: {named}\n")


def test_when_one_hangs_all_print_their_stacks_and_end():
    with Members(2, "hangs1") as members:
        members.met()
        ends = [members.end(index) for index in (0, 1)]
    assert [code for code, _ in ends] == [75, 75]
    why = "evaluating at step 7 has not ended for 1 s"
    assert f"error: process 0 of 2: process 1 ({socket.gethostname()}) ended: {why}" in ends[0][1]
    assert f"error: process 1 of 2: {why}; the stacks of all threads are above" in ends[1][1]
    assert all('File "<string>", line' in said and "in main" in said for _, said in ends)  # where readline waits


@pytest.mark.parametrize(
    ("only", "missing"),
    [([0], "processes 1, 2 of 3"), ([1], "process 0 at 127.0.0.1:{port}"), ([0, 2], "process 1 of 3")],
)
def test_a_process_started_alone_says_what_it_waits_for_and_ends(only, missing):
    limit = 6 if len(only) == 1 else 20  # the other one has to come in time, on a busy machine too
    with Members(3, only=only, limit=limit) as members:
        missing = missing.format(port=members.port)
        code, said = members.end(only[0])
        first, last = said.splitlines()
        assert code == 2 and first.startswith("waiting for process")
        assert last == f"error: waited {limit} s for {missing}; every process runs the same command"
        if len(only) > 1:  # which process 0 tells, since it is not to call an empty house again
            assert members.end(only[1])[0] == 2


def test_a_process_that_died_while_it_waited_can_be_started_again():
    with Members(3, only=[0, 1], limit=50) as members:
        members.processes[1].stderr.readline()  # it is there, and waits
        members.processes[1].kill()
        members.processes[1].communicate()
        members.start(1)
        members.start(2)
        members.met()


def test_processes_started_otherwise_are_refused_on_all_with_what_differs():
    with Members(2, ranks={1: 16}) as members:
        ends = [members.end(index) for index in (0, 1)]
        named = f"process 1 ({socket.gethostname()}) was started otherwise than process 0: lora.rank 16, not 8"
        assert ends == [(2, f"error: {named}; every process runs the same command\n")] * 2


def test_a_number_that_is_taken_and_a_port_that_is_taken_are_refused():
    with Members(3, only=[0, 1], limit=50) as members:
        members.processes[1].stderr.readline()  # it is there, and waits
        second = members._start(1, 3, "waits", {}, 30)
        _, said = second.communicate(timeout=30)
        assert second.returncode == 2 and "process 1 (" in said and "is here already" in said
        other = members._start(0, 3, "waits", {}, 30)
        _, said = other.communicate(timeout=30)
        assert other.returncode == 2 and "cannot listen on 127.0.0.1:" in said
        assert all(process.poll() is None for process in members.processes.values())


def test_a_step_that_hangs_ends_the_run_with_the_stacks_and_a_long_evaluation_does_not():
    script = """
import threading, time
from jaxft.parallel.watchdog import Watchdog

def stuck():
    threading.Event().wait()

with Watchdog(step_seconds=1.0) as watchdog:
    for step in range(1, 5):
        watchdog.stepping(step)
    watchdog.doing("evaluating at step 4")
    time.sleep(2.5)
    watchdog.stepping(5)
    stuck()
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    *stacks, last = found.stderr.splitlines()
    assert found.returncode == 75
    assert any("in stuck" in line for line in stacks)
    assert last == (
        "error: step 5 has not ended for 1 s; the stacks of all threads are above; run the same command again to resume from "
        "the newest checkpoint"
    )


def test_the_environment_tells_who_is_who_and_a_single_process_is_none(monkeypatch):
    for name in [
        name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_", "JAX_COORD", "KUBERNETES_"))
    ]:
        monkeypatch.delenv(name)
    assert find_place(config.Mesh()) is None
    slurm = {"JOB_ID": "77", "STEP_NODELIST": "node[004-007],other", "NTASKS": "4", "PROCID": "2", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert find_place(config.Mesh()) == Place(f"node004:{65536 - 4096 + 77}", 4, 2)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    assert find_place(config.Mesh()) == Place("10.0.0.1:1234", 4, 2)
    flags = config.Mesh(coordinator="[::1]:99", num_processes=2, process_id=1)
    assert find_place(flags) == Place("[::1]:99", 2, 1) and find_place(flags).address == ("::1", 99)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find_place(config.Mesh()) is None
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a notebook's pod
    assert find_place(config.Mesh()) is None


def test_a_cloud_tpu_pod_tells_who_is_who(monkeypatch):
    """As a worker of a v5e-16 on GKE has it, from JAX's own detection."""
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", f"{HERE},{HERE},{HERE},{HERE}")
    monkeypatch.setenv("TPU_WORKER_ID", "3")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "0")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", HERE)
    assert find_place(config.Mesh()) == Place(f"{HERE}:8482", 4, 3)


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


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_a_run_is_the_same_to_the_last_bit_on_one_two_and_four_processes(four, tmp_path, count, devices):
    with Run(tmp_path / "run", count, devices, *WHOLE) as run:
        run.all_end_well()
    same_files(four, run.folder)
    assert scores(run.folder) == scores(four)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "then", "dead"), [(2, 4, 1), (4, 1, 0), (1, 2, 0)])
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


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_in_object_storage_is_the_one_on_disk_also_when_it_was_killed(alone, tmp_path, monkeypatch):
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
