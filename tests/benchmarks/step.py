"""`python -m tests.benchmarks.step`: the training step compiled for TPU slices on this machine, one JSON line per case.

A case is topology:rows:policy of Gemma 2 9B at its real shape, 1,024 tokens a row, LoRA r=8 with dropout; `--config` and
`--model` change that. `gib` is what a chip holds while the step runs. Nothing is timed but the compiler.
"""

import argparse
import json
import os
import re
import time
from collections import Counter
from dataclasses import replace

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from jaxft import config
from jaxft.learn import recompute
from jaxft.parallel import topology
from jaxft.parallel.mesh import make_mesh
from jaxft.plans import work
from jaxft.weights import model

CASES = "v5e-8:8:dots v5e-8:16:dots v5e-8:32:qkv v5e-8:32:full v6e-8:32:dots v5p-8:16:dots v5e-4:4:full v6e-1:4:full".split()
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s8": 1, "u8": 1}
MOVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def traceable(settings, where, rows, policy, length=1024):
    source = model.sketch(settings.model, settings.lora)
    mesh = make_mesh(settings.mesh, topology.devices(where))
    return source, recompute.traceable(settings, source, mesh, 1000, (rows, length), policy)


def moved(text):
    """Kind of collective -> the largest array that one of them makes, in MB, in an executable's text."""
    largest = Counter()
    for shapes, kind in re.findall(rf"= (\(.*?\)|\S+) ({MOVES})(?:-start)?\(", text):
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = BYTES.get(dtype, 0)
            for each in filter(None, sizes.split(",")):
                size *= int(each)
            largest[kind] = max(largest[kind], round(size / 1e6, 1))
    return dict(largest)


def measure(settings, case):
    where, rows, policy = case.split(":")
    source, found = traceable(settings, where, int(rows), policy)
    worked = sum(work.of_step(found).values()) / work.ideal(source.arch, int(rows) * 1024)
    began, used = time.monotonic(), time.process_time()
    lowered = found.step.lower(*found.inputs)
    record = {"case": case, "layers": len(source.arch.layers), "attention": found.outlined.attention}
    record |= {"flops": round(worked, 4)}
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return record | {"error": " ".join(str(error).split())[:200]}
    analysis = executable.memory_analysis()
    gib = {"gib": recompute.device_memory(executable), "gib_temporary": analysis.temp_size_in_bytes}
    record |= {name: round(size / 2**30, 2) for name, size in gib.items()}
    record |= {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time() - used, 1)}
    if where.startswith("v5e"):  # libtpu does not print the programs of the others
        record["largest_moved_mb"] = moved(executable.as_text())
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--config", default="gemma2_9b.py")
    parser.add_argument("--model", help="a folder with config.json, or a published run's name")
    parser.add_argument("--layers", type=int, help="as many of the model's layers, to see what depth costs")
    asked = parser.parse_args()
    settings = config.load(asked.config)
    if asked.model:
        settings = replace(settings, model=replace(settings.model, name=asked.model))
    if asked.layers:
        shorten(asked.layers)
    print(json.dumps({"jax": jax.__version__, "cores": os.cpu_count(), "model": settings.model.name}), flush=True)
    for case in asked.cases:
        print(json.dumps(measure(settings, case)), flush=True)


def shorten(layers):
    """Has every sketch end after so many layers."""
    whole = model.sketch

    def short(*arguments):
        source = whole(*arguments)
        arch = replace(source.arch, layers=source.arch.layers[:layers])
        return replace(source, arch=arch, plan=model.plan_of(config.Lora(dropout=0.1), arch))

    model.sketch = short


if __name__ == "__main__":
    main()
