"""Greedy generation on a CPU: jaxft beside transformers with torch, the same weights, prompts and number of tokens.

`python -m tests.benchmarks.generation jaxft|transformers --model tiny|llama` prints one JSON line; `--alternate` runs
both in processes of their own, in turn, and ends with the ratio of their times. Only ratios within one run count.

The work: 16 prompts of 64 random tokens in one batch, 128 new tokens for each, greedy, float32, no end of text. `tiny` is the
embedded model (0.9 M parameters); `llama` has random weights: hidden 512, 8 layers, 8 heads and 2 kv heads of 64, ffn 1408,
vocabulary 32,000, tied (37 M). `seconds` are wall, `cpu_seconds` those of all threads, which other work on the machine
disturbs less; compiling is not counted, `first_s` has it. `answers` is a digest of the tokens: both give the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LLAMA = dict(
    hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1408,
    vocab_size=32000, tie_word_embeddings=True, max_position_embeddings=2048,
)  # fmt: skip
SIZES = {"rows": 16, "prompt": 64, "new": 128, "repeats": 3}


def main() -> None:
    """One case here, or both in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", nargs="?", choices=PEERS)
    parser.add_argument("--model", choices=("tiny", "llama"), default="tiny")
    parser.add_argument("--alternate", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.alternate:
            alternate(args, folder)
        else:
            print(json.dumps(measure(args, _model(args.model, folder))), flush=True)


def alternate(args: argparse.Namespace, folder: str) -> None:
    """Prints every process's line, then jaxft's medians over those of transformers."""
    lines: dict[str, list[dict]] = {peer: [] for peer in PEERS}
    for _ in range(args.rounds):
        for peer in PEERS:
            sizes = [f"--{name}={getattr(args, name)}" for name in SIZES]
            command = [sys.executable, "-m", __spec__.name, peer, "--model", args.model, *sizes]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            lines[peer].append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(lines[peer][-1]), flush=True)
    middle = {
        peer: {key: statistics.median(line[key] for line in of) for key in ("seconds", "cpu_seconds")}
        for peer, of in lines.items()
    }
    same = len({line["answers"] for of in lines.values() for line in of}) == 1
    ratios = {key: round(middle["jaxft"][key] / middle["transformers"][key], 3) for key in ("seconds", "cpu_seconds")}
    print(json.dumps({"model": args.model, "jaxft_over_transformers": ratios, "same_answers": same}))


def measure(args: argparse.Namespace, folder: str) -> dict:
    """The best of several repeats after one that is not counted."""
    import numpy as np

    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    prompts = np.random.default_rng(0).integers(3, vocabulary, (args.rows, args.prompt)).tolist()
    once = PEERS[args.peer](folder, prompts, args.new)
    began = time.perf_counter()
    said = once()
    first = time.perf_counter() - began
    walls, used = [], []
    for _ in range(args.repeats):
        began, before = time.perf_counter(), _cpu_seconds()
        assert once() == said
        walls.append(time.perf_counter() - began)
        used.append(_cpu_seconds() - before)
    tokens = sum(map(len, said))
    return {
        "peer": args.peer, "model": args.model, "rows": args.rows, "prompt": args.prompt, "new": args.new,
        "first_s": round(first, 2), "seconds": round(min(walls), 3), "cpu_seconds": round(min(used), 3),
        "tokens_per_second": round(tokens / min(walls)), "tokens_per_cpu_second": round(tokens / min(used)),
        "answers": hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12],
    }  # fmt: skip


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _model(name: str, folder: str) -> str:
    if name == "tiny":
        import jaxft.tiny

        return str(Path(jaxft.tiny.__path__[0]) / "base")
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LLAMA, initializer_range=0.05))
    model.save_pretrained(folder)
    return folder


def _jaxft(folder: str, prompts: list[list[int]], new: int) -> Callable[[], list[list[int]]]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxft.evals.decode import Generator
    from jaxft.weights.model import load_decoder

    generator = Generator(load_decoder(folder)[0], [])
    return lambda: generator(prompts, max_new_tokens=new)


def _transformers(folder: str, prompts: list[list[int]], new: int) -> Callable[[], list[list[int]]]:
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new, "pad_token_id": 0}

    def once() -> list[list[int]]:
        with torch.inference_mode():
            return model.generate(ids, **options)[:, ids.shape[1] :].tolist()

    return once


PEERS = {"jaxft": _jaxft, "transformers": _transformers}


if __name__ == "__main__":
    main()
