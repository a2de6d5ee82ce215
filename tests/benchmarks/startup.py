"""How long it takes until a command answers: `--help` of each verb, and the first training step, cold and warm.

`python -m tests.benchmarks.startup [--repeat 3]` runs real commands in processes of their own and prints a line of JSON per
case, with the smallest time of all repetitions. The run is configs/tiny_cpu.py without its tasks, whose answers of the
base would come before the first step, and once with them. A cold start finds no compiled program; the others find all.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VERBS = ("train", "generate", "export", "preview", "report")
MARKS = {  # of the lines that a run prints
    "banner_seconds": r"run folder: ",
    "base_task_seconds": r"final_answer, base: ",
    "base_evaluation_seconds": r"step +0/",
    "compiled_seconds": r"compiled the training step",
    "first_step_seconds": r"step +1/",
}
COMPILING = re.compile(r"compiled the training step for .* in ([\d.]+) s")


def help_seconds(verb: str) -> float:
    """Of the verb's --help, until the process has ended."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", f"jaxft.{verb}", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def first_step(home: Path, *more: str) -> dict[str, float]:
    """Seconds from the command to each of MARKS, in a new run folder; `step_compile_seconds` is what the loop itself says."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--run.dir", f"{folder}/run", "--run.log_every", "1", "--optim.max_steps", "2", *more]
        command = [sys.executable, "-m", "jaxft.train", "--config", "tiny_cpu.py", *options]
        found: dict[str, float] = {}
        began = time.monotonic()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HOME": str(home)})
        for line in child.stdout or ():
            seconds = time.monotonic() - began
            found |= {name: seconds for name, mark in MARKS.items() if name not in found and re.match(mark, line)}
            if said := COMPILING.match(line):
                found["step_compile_seconds"] = float(said[1])
        if child.wait():
            raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return found


def show(case: str, runs: list[dict[str, float]]) -> None:
    """The smallest of each figure."""
    least = {name: round(min(run[name] for run in runs), 2) for name in runs[0]}
    print(json.dumps({"case": case, **least, "runs": len(runs)}), flush=True)


def main() -> None:
    """One line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    repeat = range(parser.parse_args().repeat)
    for verb in VERBS:
        show(f"{verb} --help", [{"seconds": help_seconds(verb)} for _ in repeat])
    colds = []
    for _ in repeat:
        with tempfile.TemporaryDirectory() as home:
            colds.append(first_step(Path(home), "--eval.tasks"))
    show("first step, cold", colds)
    with tempfile.TemporaryDirectory() as home:
        first_step(Path(home))
        show("first step, warm", [first_step(Path(home), "--eval.tasks") for _ in repeat])
        show("first step, warm, after the base's answers", [first_step(Path(home)) for _ in repeat])


if __name__ == "__main__":
    main()
