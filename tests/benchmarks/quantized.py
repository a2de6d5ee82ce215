"""What quantising the base costs: `python -m tests.benchmarks.quantized [--schemes int8 nf4 …] [options of jaxft.train]`.

For the base as stored and for each scheme: bits of a linear weight; the largest difference of a logit on the first held-out
rows, in standard deviations of the logits; the base's perplexity on the held-out rows; and the best validation loss of a whole
training run. Prints Markdown. Where a group does not divide a module's inputs, give `--model.quantize_skip MODULE`.
"""

import argparse
import dataclasses
import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

SCHEMES = {
    "none": [],
    "int8": ["--model.quantize", "int8"],
    "int4, groups of 32": ["--model.quantize", "int4", "--model.quantize_group", "32"],
    "int4, groups of 64": ["--model.quantize", "int4"],
    "nf4": ["--model.quantize", "nf4"],
    "nf4, double": ["--model.quantize", "nf4", "--model.quantize_double", "True"],
}


def losses(overrides: list[str], config: str) -> tuple[float, float]:
    """Validation loss of the base, and the best one of the run."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "jaxft.train", "--config", config, *overrides, "--run.dir", name]
        subprocess.run(command, check=True, stdout=sys.stderr)
        lines = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
    found = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return found[0], min(found)


def logits(overrides: list[str], config: str):
    """The base's float32 logits `[N,V]` at the real tokens of the first held-out rows, and mean bits of a linear weight."""
    import jax
    import numpy as np

    from jaxft import config as configs
    from jaxft import train
    from jaxft.parallel.mesh import make_mesh
    from jaxft.plans.row import held_bytes
    from jaxft.weights import model

    settings = configs.load(config, [*overrides, "--model.dtype", "float32"])
    job = train.prepare(settings)
    batch = next(iter(job.data.validation.evaluation_batches(None)))
    source = model.find(dataclasses.replace(settings.model, adapter=None))
    decoder = model.materialise(source, make_mesh(devices=jax.devices()[:1])).decoder()
    found = np.asarray(decoder(batch.tokens, batch.positions, batch.segments))
    return found[np.asarray(batch.segments) > 0], 8 * held_bytes(source)


def main() -> None:
    """One row per scheme."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--config", default="tiny_cpu.py")
    arguments, overrides = parser.parse_known_args()
    print("| base | bits a weight | largest logit difference | perplexity of the base | best validation loss | ratio |")
    print("|---|---|---|---|---|---|")
    stored, _ = logits(overrides, arguments.config)
    reference = None
    for name in ["none", *(scheme for scheme in arguments.schemes if scheme != "none")]:
        options = [*overrides, *SCHEMES[name]]
        found, bits = logits(options, arguments.config)
        apart = abs(found - stored).max() / stored.std()
        base, best = losses(options, arguments.config)
        reference = reference or best
        cells = f"{bits:.2f}", f"{apart:.3f}", f"{math.exp(base):.3f}", f"{best:.4f}", f"{best / reference:.3f}"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(
        f"\n{datetime.date.today()}, Python {platform.python_version()}, {platform.processor() or platform.machine()}"
    )


if __name__ == "__main__":
    main()
