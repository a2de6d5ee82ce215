"""Processes meet over loopback, agree, and all end when one does."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from launched import HERE, free_port
from marked import slow

from jaxft import config
from jaxft.parallel.meeting import Place, Told, find_place, meet, readable
from jaxft.parallel.processes import Processes

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


@pytest.mark.parametrize(("dead", "how"), [slow(0, "died"), (1, "died"), slow(1, "stopped")])
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
    [
        ([0], "processes 1, 2 of 3"),
        ([1], "process 0 at 127.0.0.1:{port}"),
        pytest.param([0, 2], "process 1 of 3", marks=pytest.mark.slow),
    ],
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
