"""The README's table of the embedded default: `python -m tests.benchmarks.tiny_default --seeds 0 1 2`.

Trains configs/tiny_cpu.py once per seed in a process of its own, then measures base and adapter on the held-out problems
and on a fresh set that neither training nor the choice of settings has seen. Prints Markdown.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def train(seed: int, folder: Path) -> float:
    """Seconds of the whole command."""
    began = time.monotonic()
    command = [sys.executable, "-m", "jaxft.train", "--config", "tiny_cpu.py", "--run.dir", str(folder)]
    subprocess.run([*command, "--run.seed", str(seed)], check=True, stdout=sys.stderr)
    return time.monotonic() - began


def fresh(adapter: Path) -> float:
    """Exact match on the fresh problems."""
    import jaxft
    from jaxft.config import Data
    from jaxft.data import rows
    from jaxft.evals.tasks import Answerer, measure

    model, tokenizer = jaxft.load("builtin:tiny", adapter=str(adapter))
    problems = rows.load(Data(name="generated:word_problems", split="fresh", validation_fraction=0), 0).train
    answerer = Answerer(model, tokenizer, "plain", 128)
    return measure("final_answer", problems, answerer, answerer.generator.trainable)[0]["exact_match"]


def main() -> None:
    """One row per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    seeds = parser.parse_args().seeds
    print(
        "| seed | exact match, base | exact match, adapter (95 % interval) | 200 fresh problems | token accuracy | seconds |"
    )
    print("|---|---|---|---|---|---|")
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            seconds = train(seed, Path(name))
            report = json.loads((Path(name) / "report.json").read_text())
            sides, accuracy = report["tasks"]["final_answer"], report["eval_mean_token_accuracy"]
            base, tuned = sides["base"]["exact_match"], sides["tuned"]
            low, high = tuned["exact_match_interval"]
            cells = (
                seed,
                f"{base:.1%}",
                f"{tuned['exact_match']:.1%} ({low:.1%} to {high:.1%})",
                f"{fresh(Path(name) / 'adapter'):.1%}",
                f"{accuracy['start']:.3f} → {accuracy['best']:.3f}",
                f"{seconds:.0f}",
            )
            print("|", " | ".join(map(str, cells)), "|", flush=True)
    import jax

    versions = (
        f"Python {platform.python_version()}, jax {jax.__version__}, {os.cpu_count()} cores ({platform.machine()})"
    )
    print(f"\nMeasured {datetime.date.today()}, {versions}.")


if __name__ == "__main__":
    main()
