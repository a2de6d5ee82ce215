"""Kills training runs with SIGKILL, at chosen places and at random times, and starts them again until they end.

    python -m tests.benchmarks.kills --kills 200 --seed 0

Each run must end with the adapter, the losses per example and the log of a run that was never killed; no checkpoint that
is listed may be damaged; and at most one save interval and the save in flight may be lost. Exits 1 where one did not hold.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from jaxft.weights import manifest
from tests.launched import lines, on_one_device

EVERY = 4
TRAIN = [
    "--config", "tiny_cpu.py", "--data.limit", "60", "--data.max_length", "96", "--optim.max_steps", "24",
    "--eval.every_steps", str(EVERY), "--run.log_every", "1", "--eval.tasks", "--eval.samples", "0",
]  # fmt: skip
FILES = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "examples.jsonl")
# Module, what of it, on which call, and whether before it or after it.
POINTS = {
    "compile": ("jaxft.learn.recompute", "_executable", 1, "before"),
    "step": ("jaxft.learn.loop", "Loop._train_once", 7, "after"),
    "log": ("jaxft.learn.metrics", "Metrics.write", 4, "after"),
    "evaluation": ("jaxft.learn.evaluator", "Evaluator._done", 3, "after"),
    "examples": ("jaxft.learn.examples", "Examples.keep", 2, "after"),
    "save begun": ("jaxft.weights.checkpoint", "Checkpoints.save", 2, "after"),
    "before the manifest": ("jaxft.weights.checkpoint", "Checkpoints._seal", 2, "before"),
    "after the manifest": ("jaxft.weights.checkpoint", "Checkpoints._seal", 2, "after"),
    "delete": ("jaxft.weights.checkpoint", "Checkpoints._empty_trash", 4, "before"),
    "deleted": ("jaxft.weights.checkpoint", "Checkpoints._empty_trash", 4, "after"),
    "export": ("jaxft.weights.peft", "save", 1, "after"),
    "rename": ("jaxft.disk", "_replace", 1, "before"),
    "finished": ("jaxft.report", "write", 1, "before"),
}
# The train verb, in which one of these is the last thing that happens; without PyTorch, as where jaxft is used: transformers
# would import it, a third of what a start takes.
DYING = """
import importlib.util, os, signal, sys
found_spec = importlib.util.find_spec
importlib.util.find_spec = lambda module, *more: None if module == "torch" else found_spec(module, *more)
name, what, times, when = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
if name:
    owner, calls = importlib.import_module(name), []
    *path, last = what.split(".")
    for part in path:
        owner = getattr(owner, part)
    made = getattr(owner, last)
    def call(*arguments, **options):
        calls.append(0)
        if when == "before" and len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        found = made(*arguments, **options)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(owner, last, call)
from jaxft import train
from jaxft.errors import run_verb
run_verb(train.main)
"""


@dataclass
class Found:
    """What came of it."""

    kills: dict[str, int] = field(default_factory=dict)
    lives: int = 0  # runs that were killed and ended
    most_lost: int = 0  # steps done again after one kill
    faults: list[str] = field(default_factory=list)
    useful: list[float] = field(default_factory=list)  # of each run, the share of the logged time that was not lost

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        useful = f"; not lost of the logged time: {min(self.useful):.3f} to 1" if self.useful else ""
        return (
            f"{self.total} kills ({kinds}) in {self.lives} runs; at most {self.most_lost} steps done again{useful}; "
            f"{len(self.faults)} faults"
        )


class Run:
    """A run folder and its starts."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, point: str | None = None, seconds: float | None = None) -> tuple[int, str, str]:
        """Exit code and what was printed, of a start that kills itself at a point or is killed after so many seconds."""
        name, what, times, when = POINTS[point] if point else ("", "", 0, "")
        command = [sys.executable, "-c", DYING, name, what, str(times), when, *TRAIN, "--run.dir", str(self.folder)]
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=on_one_device(), **piped) as process:
            try:
                out, said = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                out, said = process.communicate()
        return process.returncode, out, said

    def logged(self) -> int:
        """The last step that was logged."""
        return max((record["step"] for record in self.records()), default=0)

    def records(self) -> list[dict]:
        return lines(self.folder)

    def damaged(self) -> list[str]:
        """Checkpoints that have a name and are not whole."""
        steps = (self.folder / "checkpoints").glob("[0-9]*")
        found = {path.name: manifest.read(path) for path in steps if path.name.isdigit()}
        return [f"step {name}: {said}" for name, said in found.items() if isinstance(said, str)]

    def kept(self) -> float:
        """1 - lost / total of goodput.jsonl."""
        phases = [json.loads(line) for line in (self.folder / "goodput.jsonl").read_text().splitlines()]
        lost = sum(phase["seconds"] for phase in phases if phase["phase"] == "lost")
        return 1 - lost / sum(phase["seconds"] for phase in phases)


def kill(place: Path, kills: int, seed: int, say=print) -> Found:
    """So many kills of runs below `place`, each point in turn and as many at random times."""
    draw, found = random.Random(seed), Found()
    whole = Run(place / "whole")
    assert whole.start()[0] == 0  # which also fills the caches
    began = time.monotonic()
    assert Run(place / "timed").start()[0] == 0
    takes = time.monotonic() - began
    plan = list(POINTS)
    while found.total < kills and not found.faults:
        run = Run(place / f"run{found.lives}")
        ended = False
        while not ended:
            point = None if found.total >= kills or draw.random() < 0.5 else plan[found.total % len(plan)]
            seconds = None if found.total >= kills or point else draw.uniform(0.3, takes)
            before = run.logged()
            code, out, said = run.start(point, seconds)
            resumed = re.search(r"resumed at step (\d+)", out)
            if "run folder: " in out:
                lost = before - int(resumed[1] if resumed else 0)
                found.most_lost = max(found.most_lost, lost)
                if lost > 2 * EVERY:
                    found.faults.append(f"{lost} steps lost")
            if code == -signal.SIGKILL:
                kind = point or "any time"
                found.kills[kind] = found.kills.get(kind, 0) + 1
            elif code != 0:
                found.faults.append(f"exit {code} ({point}): {said.strip()[-300:]}")
            found.faults += run.damaged()
            say(f"{found.total} kills: {point or f'{seconds or 0:.1f} s'}: exit {code}, logged to step {run.logged()}")
            ended = code != -signal.SIGKILL
        found.lives += 1
        if found.faults:
            break
        if (run.folder / "report.html").exists() is False:
            found.faults.append("no report")
        if run.records() != whole.records():
            found.faults.append(f"{run.folder}: another log")
        found.faults += [
            f"{run.folder}: another {name}"
            for name in FILES
            if (run.folder / name).read_bytes() != (whole.folder / name).read_bytes()
        ]
        found.useful.append(run.kept())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps the runs; a temporary one by default")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxft-kills-") as temporary:
        found = kill(asked.folder or Path(temporary), asked.kills, asked.seed, lambda line: print(line, flush=True))
    print(found, *found.faults, sep="\n")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
