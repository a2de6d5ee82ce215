"""One LoRA training step on a CPU: jaxft beside PEFT with torch, doing the same work.

`python -m tests.benchmarks.cpu_peers jaxft|peft` prints one JSON line; `--alternate jaxft,peft --rounds 3` runs each in a
process of its own, in turn, and ends with the ratios of each to the last one named. Only ratios within one run count.

The work: a Qwen2 of hidden 512, 8 layers, 8 heads and 2 kv heads of 64, ffn 1408, vocabulary 32,000, tied, random weights,
float32; LoRA r=8, alpha=16, no dropout on all seven linears; 4 rows of 256 tokens, loss on all but the first of a row;
AdamW at 2e-4 on the pairs alone, no clipping. Peak memory is the process's ru_maxrss; before it, that after imports.
"""

from __future__ import annotations

import argparse
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

ARCH = dict(
    model_type="qwen2", hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=1408, vocab_size=32000, tie_word_embeddings=True, rope_theta=10000.0, max_position_embeddings=32768,
)  # fmt: skip
RANK, ALPHA, RATE = 8, 16, 2e-4
WARMUP = 2  # steps that are not counted


def main() -> None:
    """One case here, or several in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", nargs="?", choices=PEERS)
    parser.add_argument("--alternate", help="names, with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    if args.alternate:
        alternate(args)
    else:
        print(json.dumps(measure(args)), flush=True)


def alternate(args: argparse.Namespace) -> None:
    """Prints every process's line, then each peer's median and best, over those of the last one named."""
    names = args.alternate.split(",")
    sizes = [f"--{name}={getattr(args, name)}" for name in ("steps", "rows", "length")]
    lines: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            command = [sys.executable, "-m", __spec__.name, name, *sizes]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout.splitlines()[-1], flush=True)
            lines[name].append(json.loads(done.stdout.splitlines()[-1]))
    best = {
        name: {
            "step_s": statistics.median(line["step_s"] for line in of),
            "step_s_min": min(line["step_s_min"] for line in of),
            "peak_rss_MB": max(line["peak_rss_MB"] for line in of),
        }
        for name, of in lines.items()
    }
    base = best[names[-1]]
    ratios = {name: {key: round(value / base[key], 3) for key, value in of.items()} for name, of in best.items()}
    print(json.dumps({"over": names[-1], "ratios": ratios}))


def measure(args: argparse.Namespace) -> dict:
    """Imports, then builds, then steps, each timed."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, ARCH["vocab_size"], (args.rows, args.length)).astype(np.int32)
    build = PEERS[args.peer]()
    before = _rss()
    began = time.perf_counter()
    step = build(tokens)
    setup = time.perf_counter() - began
    losses, seconds = [], []
    for _ in range(WARMUP + args.steps):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
    counted = seconds[WARMUP:]
    return {
        "peer": args.peer, "rows": args.rows, "length": args.length, "setup_s": round(setup, 1),
        "first_step_s": round(seconds[0], 2), "step_s": round(statistics.median(counted), 4),
        "step_s_min": round(min(counted), 4), "tokens_per_second": round(tokens.size / statistics.median(counted), 1),
        "rss_before_MB": before, "peak_rss_MB": _rss(), "loss0": round(losses[0], 4), "loss_end": round(losses[-1], 4),
    }  # fmt: skip


def _rss() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _jaxft() -> Callable:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np

    from jaxft import config
    from jaxft.learn import recompute, step
    from jaxft.parallel.mesh import make_mesh
    from jaxft.weights import model

    def build(tokens: np.ndarray) -> Callable[[], float]:
        settings = config.Config(
            lora=config.Lora(rank=RANK, alpha=ALPHA, dropout=0.0),
            optim=config.Optim(learning_rate=RATE, schedule="constant", warmup=0, weight_decay=0.01, clip=None),
        )
        mesh = make_mesh()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(ARCH))
            named = config.Model(name=folder, init="random", dtype="float32")
            source = model.find(named, settings.lora)
        compiled = recompute.compile_step(settings, source, mesh, 1000, tokens.shape, None)
        loaded = model.materialise(source, mesh, compiled.outlined)
        state = step.initial_state(loaded, compiled.optimizer, mesh)
        key = jax.random.key(0)
        weights = np.ones(tokens.shape, np.float32)
        weights[:, -1] = 0
        batch = {
            "tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "weights": weights,
            "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
            "segments": np.ones_like(tokens),
        }  # fmt: skip
        batch = jax.device_put(batch)

        def once() -> float:
            nonlocal state
            state, sums = compiled.executable(state, loaded.frozen, batch, key)
            return float(sums["nll"] / sums["weight"])

        return once

    return build


def _peft() -> Callable:
    import peft
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)

    def build(tokens) -> Callable[[], float]:
        settings = {key: value for key, value in ARCH.items() if key not in ("model_type", "rope_theta")}
        rope = {"rope_type": "default", "rope_theta": ARCH["rope_theta"]}
        wanted = transformers.Qwen2Config(**settings, rope_parameters=rope, use_cache=False, dtype="float32")
        base = transformers.AutoModelForCausalLM.from_config(wanted, attn_implementation="sdpa")
        adapter = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
        model = peft.get_peft_model(base, adapter).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, inputs = torch.optim.AdamW(trained, lr=RATE), torch.from_numpy(tokens).long()

        def once() -> float:
            loss = model(input_ids=inputs, labels=inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return once

    return build


PEERS = {"jaxft": _jaxft, "peft": _peft}


if __name__ == "__main__":
    main()
