"""LoRA training steps on one NVIDIA GPU: jaxft beside PEFT with torch, at a published model's real shape.

`python -m tests.benchmarks.gpu_peers [--model google/gemma-2-9b] [--budget-seconds 540] [--steps 8] [--toy]` runs jaxft's
cases, each in a process of its own, then PEFT's in another, prints a JSON line per case, and ends with the ratios. Nothing is
downloaded: weights are random, bfloat16, made on the GPU. `--toy` runs all of it tiny on a CPU.

Packages: for jaxft's half jax[cuda13], flax, optax and rich (tokamax where it is there); for PEFT's torch built for CUDA,
transformers and peft (flash-attn where it is there). The half that lacks one is left out, and a line says so.

The work, the same for both: rows of random tokens, their lengths drawn from GSM8K's law (lognormal, median 175, sigma 0.37,
mean 188, clipped to 48..542; seed 0); loss on all of a row but its first token; LoRA r=8, alpha=16, dropout 0.1 on all seven
linears; AdamW at 2e-4 on the pairs alone, no clipping. A step is forward, backward and update; batches lie on the GPU before
it. Tokens are real ones only, each row in full; the rate is the median over the steps after two that are not counted.
- packed: best fit into sequences of 1,024, positions restarting, each row attending to itself; the same batches for both.
  PEFT has a 4-D mask for eager and sdpa, position ids for flex_attention, and rows laid end to end for flash_attention_2.
- padded: B rows filled to the longest of them, rounded up to 64. PEFT only: jaxft packs.

A case of jaxft is rows:policy:attention (model.remat and model.attention). One of PEFT is attention:mode:rows:options, of which
checkpoint recomputes the layers, chunked forms the logits of 1,024 tokens at a time and forms them again, autocast is
torch's to bfloat16 (the Trainer's bf16=True; without it PEFT's pairs compute in float32), half keeps the pairs in bfloat16,
compile is torch.compile.
Peaks are of memory in use, not reserved: jax's peak_bytes_in_use of the process, hence with what compiling took, and torch's
max_memory_allocated of the case. compiled_GiB is what jaxft's compiler says that the step needs.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data import pack
from jaxft.models.families import arch_from_config, published

MODELS = ("google/gemma-2-9b", "meta-llama/Llama-3.2-3B", "Qwen/Qwen2-1.5B")
TOY = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32,
}  # fmt: skip
RANK, ALPHA, DROPOUT, RATE, DECAY = 8, 16, 0.1, 2e-4, 0.01
MEDIAN, SIGMA, SHORTEST, LONGEST = 175, 0.37, 48, 542  # of a row's tokens
WARMUP = 2  # steps that are not counted
CASE_SECONDS = 40  # of a case's steps, after which three counted ones are enough
TOKENS_AT_ONCE = 1024  # of a chunked loss
NEEDS = {"jaxft": ("jax", "jaxlib", "flax", "optax", "rich"), "peft": ("torch", "transformers", "peft")}
NOTED = ("jax", "jaxlib", "flax", "optax", "tokamax", "torch", "transformers", "peft", "flash-attn", "triton", "numpy")

# In order of worth, because the budget may end before them.
JAXFT = "8:auto:auto 32:auto:auto 8:dots:dense 32:qkv:auto 8:qkv:auto 32:full:auto 8:full:auto 32:auto:dense".split()
PEFT = (
    "{}:padded:8:autocast", "{}:packed:8:checkpoint+chunked+autocast", "{}:padded:32:checkpoint+chunked+autocast",
    "{}:packed:8:chunked+autocast", "{}:padded:32:autocast", "{}:packed:8:chunked+half", "{}:padded:8:half",
    "flash_attention_2:packed:8:chunked+autocast", "flash_attention_2:packed:8:checkpoint+chunked+autocast",
    "{}:padded:8:", "{}:padded:8:checkpoint", "{}:packed:8:checkpoint", "{}:packed:32:checkpoint+chunked+autocast",
    "flex_attention:packed:8:checkpoint+chunked+autocast", "flex_attention:padded:8:checkpoint+autocast",
    "{}:packed:8:checkpoint+autocast+compile",
)  # fmt: skip
JAXFT_TOY = ("2:auto:auto", "2:auto:blocked", "2:full:dense")
PEFT_TOY = (
    "{}:padded:4:", "{}:padded:4:checkpoint+autocast", "{}:packed:2:", "{}:packed:2:chunked+autocast",
    "{}:packed:2:checkpoint+chunked+half", "flash_attention_2:packed:2:",
)  # fmt: skip


def main() -> None:
    """Both halves in turn, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--budget-seconds", type=float, default=540)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--toy", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--peer", choices=tuple(NEEDS), help="this half alone, in this process")
    parser.add_argument("--cases", help="of --peer, with commas between; matmul is one")
    args = parser.parse_args()
    if args.peer is None:
        both(args)
        return
    for line in PEERS[args.peer](args, (args.cases or "matmul").split(",")):
        print(json.dumps({"peer": args.peer, **line}), flush=True)


# The process that runs the others; it leaves the GPU alone.


def both(args: argparse.Namespace) -> None:
    """What is installed, every case's line, and the ratios."""
    began = time.monotonic()
    print(json.dumps(_about(args)), flush=True)
    lacking = {
        peer: [name for name in names if importlib.util.find_spec(name) is None] for peer, names in NEEDS.items()
    }
    for peer, names in lacking.items():
        if names:
            print(json.dumps({"peer": peer, "skipped": f"not installed: {', '.join(names)}"}), flush=True)
    runs = [peer for peer, names in lacking.items() if not names]
    lines: list[dict[str, Any]] = []
    for i, peer in enumerate(runs):
        until = began + args.budget_seconds * (i + 1) / len(runs)
        lines += (_jaxft_lines if peer == "jaxft" else _peft_lines)(args, until)
    print(json.dumps(_compared(args, lines)), flush=True)


def _about(args: argparse.Namespace) -> dict[str, Any]:
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        gpu = None
    versions = {name: found for name in NOTED if (found := _version(name))}
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"), "gpu": gpu, "cores": os.cpu_count(),
        "python": sys.version.split()[0], "versions": versions, "model": args.model, "toy": args.toy,
        "steps": args.steps, "budget_seconds": args.budget_seconds, "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _jaxft_lines(args: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """A process for each case, so that its peak is its own; what an earlier one already measured is left out."""
    lines = _child(args, "jaxft", ["matmul"], until)
    measured: set[tuple[str, str, str]] = set()
    kernel = None
    for case in JAXFT_TOY if args.toy else JAXFT:
        rows, policy, attention = case.split(":")
        if (rows, policy, kernel if attention == "auto" else attention) in measured:
            continue
        for line in _child(args, "jaxft", [case], until):
            lines.append(line)
            if "step_s" in line:
                kernel = line["attention"] if attention == "auto" else kernel
                measured |= {(rows, policy, line["attention"]), (rows, line["remat"], line["attention"])}
    return lines


def _peft_lines(args: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    plain = "eager" if "gemma-2" in args.model else "sdpa"  # sdpa cannot cap scores
    return _child(args, "peft", ["matmul", *(case.format(plain) for case in (PEFT_TOY if args.toy else PEFT))], until)


def _child(args: argparse.Namespace, peer: str, cases: list[str], until: float) -> list[dict[str, Any]]:
    """The lines of a process, printed as they come; it is ended where it outlasts its time."""
    left = until - time.monotonic()
    if left < 5:
        return _say([{"peer": peer, "case": case, "skipped": "no time left"} for case in cases])
    command = [sys.executable, "-m", __spec__.name, "--peer", peer, "--cases", ",".join(cases), "--model", args.model]
    command += [f"--budget-seconds={left}", f"--steps={args.steps}", *(["--toy"] if args.toy else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment(args.toy))
    late = threading.Timer(left, process.kill)
    late.start()
    lines = []
    with process, process.stdout as written:
        for text in written:
            if text.startswith('{"peer"'):
                lines += _say([json.loads(text)])
            else:  # what a library has to say, such as why jaxft goes on without a kernel
                print(text, end="", file=sys.stderr, flush=True)
    in_time = late.is_alive()
    late.cancel()
    if process.returncode:
        done = {line.get("case") for line in lines}
        why = f"ended with {process.returncode}" if in_time else "out of time"
        lines += _say([{"peer": peer, "case": case, "error": why} for case in cases if case not in done])
    return lines


def _say(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for line in lines:
        print(json.dumps(line), flush=True)
    return lines


def _environment(toy: bool) -> dict[str, str]:
    """All memory at once for jax, or a hole would keep a large buffer out; in-use counts do not change by it."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu" if toy else "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def _compared(args: argparse.Namespace, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The best case of each kind, and jaxft's over PEFT's; None where one was not measured."""
    kinds = {
        "jaxft": lambda line: line["peer"] == "jaxft",
        "peft_padded": lambda line: line["peer"] == "peft" and ":padded:" in line["case"],
        "peft_packed": lambda line: line["peer"] == "peft" and ":packed:" in line["case"],
    }
    counted = [line for line in lines if "step_s" in line]
    best = {
        kind: max(filter(of, counted), key=lambda line: line["tokens_per_second"], default={})
        for kind, of in kinds.items()
    }
    peak = max((line["matmul_TFLOPs"] for line in lines if "matmul_TFLOPs" in line), default=None)
    flops = arch_from_config(_config(args), args.model).flops_per_token(frozen=True)
    ours = best["jaxft"]
    return {
        "best": {kind: line.get("case") for kind, line in best.items()},
        "tokens_per_second": {kind: line.get("tokens_per_second") for kind, line in best.items()},
        "jaxft_over": {kind: _ratio(ours, best[kind], "tokens_per_second") for kind in ("peft_padded", "peft_packed")},
        "peak_memory_over": {kind: _ratio(ours, best[kind], "peak_GiB") for kind in ("peft_padded", "peft_packed")},
        "GFLOP_per_token_4N": round(flops / 1e9, 6),
        "matmul_TFLOPs": peak,
        "share_of_matmul": {
            kind: round(line["tokens_per_second"] * flops / (peak * 1e12), 4) for kind, line in best.items() if line and peak
        },
    }  # fmt: skip


def _ratio(ours: dict[str, Any], theirs: dict[str, Any], key: str) -> float | None:
    return round(ours[key] / theirs[key], 3) if ours.get(key) and theirs.get(key) else None


# The work.


def _config(args: argparse.Namespace) -> dict[str, Any]:
    """config.json of the model."""
    known = published.CONFIGS[args.model]
    return known | {key: value for key, value in TOY.items() if key in known} if args.toy else known


def _folder(args: argparse.Namespace) -> tempfile.TemporaryDirectory:
    """A folder with config.json alone, which both libraries read as they read any model's."""
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "config.json").write_text(json.dumps(_config(args)))
    return folder


def _length(args: argparse.Namespace) -> int:
    return 128 if args.toy else 1024


def _rows(args: argparse.Namespace, random: np.random.Generator, count: int) -> np.ndarray:
    """Lengths of so many rows, an eighth of the law's for a toy."""
    drawn = np.clip(np.exp(random.normal(np.log(MEDIAN), SIGMA, count)), SHORTEST, LONGEST).astype(np.int64)
    return drawn // 8 if args.toy else drawn


def packed(args: argparse.Namespace, rows: int) -> list[tuple[dict[str, np.ndarray], int]]:
    """`(batch, real tokens)` of every step, as jaxft's loader lays batches out: segments from 1, 0 is filler."""
    random, length, batches = np.random.default_rng(0), _length(args), WARMUP + args.steps
    mean = MEDIAN / 8 if args.toy else MEDIAN  # less than the real one, so that there are bins enough
    lengths = _rows(args, random, int(batches * rows * length / mean) + 64)
    bins = pack.plan(lengths, length)
    order = random.permutation(len(bins))[: batches * rows].reshape(batches, rows)
    return [_packed([lengths[bins[i]] for i in of], length, _config(args)["vocab_size"], random) for of in order]


def _packed(
    bins: list[np.ndarray], length: int, vocabulary: int, random: np.random.Generator
) -> tuple[dict[str, np.ndarray], int]:
    shape = len(bins), length
    tokens = random.integers(3, vocabulary, shape).astype(np.int32)
    positions, segments, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, members in enumerate(bins):
        begin = 0
        for number, size in enumerate(members.tolist(), 1):
            positions[row, begin : begin + size] = np.arange(size)
            segments[row, begin : begin + size] = number
            weights[row, begin : begin + size - 1] = 1
            begin += size
        positions[row, begin:] = np.arange(length - begin)
    real = int(sum(members.sum() for members in bins))
    targets = np.roll(tokens, -1, axis=1)
    batch = {"tokens": tokens, "targets": targets, "positions": positions, "segments": segments, "weights": weights}
    return batch, real


def padded(args: argparse.Namespace, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`(tokens, mask)` of every step, both `[B,S]`."""
    random, vocabulary = np.random.default_rng(0), _config(args)["vocab_size"]
    for _ in range(WARMUP + args.steps):
        lengths = _rows(args, random, rows)
        width = -(-int(lengths.max()) // 64) * 64
        yield random.integers(3, vocabulary, (rows, width)), np.arange(width)[None] < lengths[:, None]


def timed(once: Callable[[int], float], real: list[int], positions: list[int]) -> dict[str, Any]:
    """`once(i)` takes step i and gives its loss, when the device has done it."""
    seconds, losses, began = [], [], time.perf_counter()
    for i in range(len(real)):
        start = time.perf_counter()
        losses.append(once(i))
        seconds.append(time.perf_counter() - start)
        if time.perf_counter() - began > CASE_SECONDS and i + 1 >= WARMUP + 3:
            break
    counted, done = seconds[WARMUP:], slice(WARMUP, len(seconds))
    return {
        "first_step_s": round(seconds[0], 3), "step_s": round(statistics.median(counted), 4),
        "step_s_min": round(min(counted), 4),
        "tokens_per_second": round(statistics.median(n / s for n, s in zip(real[done], counted)), 1),
        "fill": round(sum(real[done]) / sum(positions[done]), 4), "steps": len(counted),
        "loss0": round(losses[0], 4), "loss_end": round(losses[-1], 4),
    }  # fmt: skip


def cases(
    args: argparse.Namespace, wanted: list[str], run: Callable[[str], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A line for each case, whatever it raises: one that does not fit must not end the others."""
    began = time.monotonic()
    for case in wanted:
        if time.monotonic() - began > args.budget_seconds:
            yield {"case": case, "skipped": "no time left"}
            continue
        try:
            line = run(case)
        except Exception as error:
            line = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        yield {"case": case, **line}


def _gib(size: float | None) -> float | None:
    return None if size is None else round(size / 2**30, 2)


# jaxft.


def _jaxft(args: argparse.Namespace, wanted: list[str]) -> Iterator[dict[str, Any]]:
    import jax

    device = jax.devices()[0]
    with _folder(args) as folder:
        yield from cases(
            args,
            wanted,
            lambda case: _jax_matmul(args, device) if case == "matmul" else _jaxft_case(args, case, folder, device),
        )


def _jaxft_case(args: argparse.Namespace, case: str, folder: str, device: Any) -> dict[str, Any]:
    import jax

    from jaxft import config
    from jaxft.learn import recompute, step
    from jaxft.parallel.mesh import make_mesh, usable_bytes
    from jaxft.weights import model

    rows, policy, attention = case.split(":")
    shape = int(rows), _length(args)
    settings = config.Config(
        model=config.Model(name=folder, init="random", dtype="bfloat16", remat=policy, attention=attention),
        lora=config.Lora(rank=RANK, alpha=ALPHA, dropout=DROPOUT),
        optim=config.Optim(learning_rate=RATE, schedule="constant", warmup=0, weight_decay=DECAY, clip=None),
    )
    mesh = make_mesh(devices=[device])
    source = model.sketch(settings.model, settings.lora)
    compiled = recompute.compile_step(settings, source, mesh, 1000, shape, usable_bytes(mesh))
    frozen, state = _jaxft_arrays(source, compiled, mesh)
    placed = step.abstract_inputs(compiled.outlined, compiled.optimizer, mesh, shape)[2]
    batches = packed(args, int(rows))
    laid = [
        {name: jax.device_put(value, placed[name].sharding) for name, value in batch.items()} for batch, _ in batches
    ]
    key = jax.random.key(0)
    jax.block_until_ready((frozen, state, laid))

    def once(i: int) -> float:
        nonlocal state
        state, sums = jax.block_until_ready(compiled.executable(state, frozen, laid[i], key))
        return float(sums["nll"] / sums["weight"])

    line = timed(once, [real for _, real in batches], [shape[0] * shape[1]] * len(batches))
    return {
        "attention": compiled.outlined.attention, "remat": compiled.policy, "compile_s": round(compiled.seconds, 1),
        "too_large": [name for name, _ in compiled.too_large], **line, "compiled_GiB": _gib(compiled.bytes),
        "peak_GiB": _gib((device.memory_stats() or {}).get("peak_bytes_in_use")), "device": device.device_kind,
    }  # fmt: skip


def _jaxft_arrays(source: Any, compiled: Any, mesh: Any) -> tuple[dict[str, Any], Any]:
    """Frozen weights and step 0's state; drawn layer by layer in one program, so that no peak but the step's is seen."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    from jaxft.learn import step
    from jaxft.weights import load

    outlined = compiled.outlined

    def draw(row: Any, key: jax.Array) -> jax.Array:
        one = row.shape[1:] if row.stacked else row.shape
        if len(one) == 1:
            plain = row.names[0].endswith("bias") or source.arch.norm_plus_one
            return jnp.full(row.shape, 0 if plain else 1, row.dtype)
        keys = jax.random.split(key, row.shape[0] if row.stacked else 1)
        drawn = jax.lax.map(lambda key: (0.02 * jax.random.normal(key, one)).astype(row.dtype), keys)
        return drawn.reshape(row.shape)

    keys = jax.random.split(jax.random.key(0), len(outlined.rows))
    base = {
        row.path: jax.jit(lambda key, row=row: draw(row, key), out_shardings=row.sharding(mesh))(key)
        for row, key in zip(outlined.rows, keys)
        if not row.adapter
    }
    arrays = base | load.fresh_adapter(outlined.rows, base, mesh, 0)
    parts = {part: {path: arrays[path] for path in getattr(outlined, part)} for part in ("trainable", "frozen")}
    return parts["frozen"], step.initial_state(replace(outlined, **parts), compiled.optimizer, mesh)


def _jax_matmul(args: argparse.Namespace, device: Any) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    size, times = (256, 4) if args.toy else (8192, 100)
    x, y = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    y = y * jnp.asarray(size**-0.5, y.dtype)  # what it multiplies keeps its size
    chain = jax.jit(lambda x, y: jax.lax.fori_loop(0, times, lambda _, x: x @ y, x))
    jax.block_until_ready(chain(x, y))
    began = time.perf_counter()
    jax.block_until_ready(chain(x, y))
    return _rate(size, times, time.perf_counter() - began, device.device_kind)


def _rate(size: int, times: int, seconds: float, device: str) -> dict[str, Any]:
    return {
        "matmul": f"bfloat16 {size}³",
        "matmul_TFLOPs": round(2 * size**3 * times / seconds / 1e12, 2),
        "device": device,
    }


# PEFT.


def _peft(args: argparse.Namespace, wanted: list[str]) -> Iterator[dict[str, Any]]:
    import torch

    device = torch.device("cpu" if args.toy else "cuda")
    names = [] if args.toy else [torch.cuda.get_device_name()]
    first = [case for case in wanted if case == "matmul"]
    yield from cases(args, first, lambda _: _torch_matmul(args, device, *names))
    began = time.monotonic()
    model = _peft_model(args, device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    count = sum(weight.numel() for weight in model.parameters())
    built = {"parameters": count, "trained": sum(weight.numel() for weight in trained)}
    yield {"built_s": round(time.monotonic() - began, 1), **built, "weights_GiB": _gib(_allocated(device))}
    rest = [case for case in wanted if case != "matmul"]
    yield from cases(args, rest, lambda case: _peft_case(args, case, model, trained, device))


def _allocated(device: Any) -> int | None:
    import torch

    return torch.cuda.memory_allocated() if device.type == "cuda" else None


def _peft_model(args: argparse.Namespace, device: Any) -> Any:
    import peft
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    with _folder(args) as folder:
        config = transformers.AutoConfig.from_pretrained(folder)
    config.use_cache = False
    with device:
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=names, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(base, adapter).train()


def _peft_case(args: argparse.Namespace, case: str, model: Any, trained: list[Any], device: Any) -> dict[str, Any]:
    import torch

    attention, mode, rows, options = case.split(":")
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return {"skipped": "flash-attn is not installed"}
    chosen = set(filter(None, options.split("+")))
    _set_up(model, trained, attention, chosen)
    batches = _torch_batches(args, mode, int(rows), attention, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    once = _torch_step(model, trained, [inputs for inputs, _ in batches], chosen, device)
    line = timed(once, [real for _, real in batches], [inputs["input_ids"].numel() for inputs, _ in batches])
    return line | {"peak_GiB": _gib(torch.cuda.max_memory_allocated() if device.type == "cuda" else None)}


def _set_up(model: Any, trained: list[Any], attention: str, chosen: set[str]) -> None:
    """The model as a case wants it, with nothing left of the one before."""
    import torch

    model.zero_grad(set_to_none=True)
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    base = model.get_base_model()
    base.set_attn_implementation(attention)
    if "checkpoint" in chosen:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()
    for weight in trained:
        weight.data = weight.data.to(torch.bfloat16 if "half" in chosen else torch.float32)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # so that every case begins at the same loss
            weight.data.zero_()


def _torch_step(
    model: Any, trained: list[Any], batches: list[Any], chosen: set[str], device: Any
) -> Callable[[int], float]:
    import torch

    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY, fused=device.type == "cuda")
    forward = _chunked_loss if "chunked" in chosen else _whole_loss
    if "compile" in chosen:
        forward = torch.compile(forward)

    def once(i: int) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled="autocast" in chosen):
            loss = forward(model, batches[i])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return value

    return once


def _whole_loss(model: Any, batch: dict[str, Any]) -> Any:
    return model(**batch).loss


def _chunked_loss(model: Any, batch: dict[str, Any]) -> Any:
    """Cross-entropy of so many tokens at a time, their logits formed again in the backward pass."""
    import torch

    base = model.get_base_model()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = base.model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    cap = getattr(base.config, "final_logit_softcapping", None)

    def part(hidden: Any, labels: Any) -> Any:
        logits = base.lm_head(hidden).float()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    parts = zip(hidden.split(TOKENS_AT_ONCE), labels.split(TOKENS_AT_ONCE))
    sums = [torch.utils.checkpoint.checkpoint(part, h, wanted, use_reentrant=False) for h, wanted in parts]
    return sum(sums) / (labels != -100).sum()


def _torch_batches(
    args: argparse.Namespace, mode: str, rows: int, attention: str, device: Any
) -> list[tuple[dict[str, Any], int]]:
    """`(what the model takes, real tokens)` of every step, on the device."""
    import torch

    if mode == "padded":
        laid = [(_padded_inputs(tokens, mask), int(mask.sum())) for tokens, mask in padded(args, rows)]
    else:
        inputs = _flat_inputs if attention == "flash_attention_2" else _packed_inputs
        laid = [(inputs(batch), real) for batch, real in packed(args, rows)]
    moved = [({name: torch.from_numpy(x).to(device) for name, x in found.items()}, real) for found, real in laid]
    if mode == "packed" and attention in ("eager", "sdpa"):
        for inputs, _ in moved:
            inputs["attention_mask"] = _block_mask(inputs.pop("segments"), attention)
    for inputs, _ in moved:
        inputs.pop("segments", None)
    return moved


def _padded_inputs(tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": tokens, "attention_mask": mask.astype(np.int64), "labels": np.where(mask, tokens, -100)}


def _packed_inputs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Labels are tokens, which transformers moves by one; a row's first and filler have none."""
    tokens, positions, segments = (batch[name].astype(np.int64) for name in ("tokens", "positions", "segments"))
    labels = np.where((segments > 0) & (positions > 0), tokens, -100)
    return {"input_ids": tokens, "position_ids": positions, "labels": labels, "segments": segments}


def _flat_inputs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All rows end to end in one `[1,T]`, without filler: what transformers takes as packed for flash attention."""
    found = _packed_inputs(batch)
    kept = found["segments"].reshape(-1) > 0
    return {name: value.reshape(-1)[kept][None] for name, value in found.items()}


def _block_mask(segments: Any, attention: str) -> Any:
    """`[B,1,S,S]`: a token sees those of its own segment that are not after it; added to scores for eager."""
    import torch

    seen = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
    if attention == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=torch.bfloat16, device=seen.device).masked_fill_(
        ~seen, torch.finfo(torch.bfloat16).min
    )


def _torch_matmul(args: argparse.Namespace, device: Any, name: str = "cpu") -> dict[str, Any]:
    import torch

    size, times = (256, 4) if args.toy else (8192, 100)
    x, y = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    y *= size**-0.5  # what it multiplies keeps its size

    def chain(x: Any) -> float:
        for _ in range(times):
            x = x @ y
        return x[0, 0].item()

    chain(x)
    began = time.perf_counter()
    chain(x)
    return _rate(size, times, time.perf_counter() - began, name)


PEERS = {"jaxft": _jaxft, "peft": _peft}


if __name__ == "__main__":
    main()
