"""The train verb in several processes over loopback, and what they leave: for tests."""

import json
import os
import re
import socket
import subprocess
import sys
import time

HERE = "127.0.0.1"
SHORT = [
    "--data.limit", "60", "--data.max_length", "96", "--optim.max_steps", "4",
    "--eval.every_steps", "2", "--run.log_every", "2", "--eval.tasks", "--eval.samples", "0",
]  # fmt: skip
TIMES = {
    "tokens_per_second", "tokens_per_second_per_chip", "seconds_per_step", "host_memory_gib", "eval_seconds", "data_wait",
}  # fmt: skip
WEIGHTS = "adapter/adapter_model.safetensors"


def on_one_device():
    """The environment of a process with one device: eight that share two cores take twice the time."""
    return os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


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
    """metrics.jsonl without what clock and machine decide, and without an end that a kill has cut."""
    file = folder / "metrics.jsonl"
    whole = file.read_text().split("\n")[:-1] if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in whole]


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
    for name in (WEIGHTS, "adapter/adapter_config.json", "examples.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
