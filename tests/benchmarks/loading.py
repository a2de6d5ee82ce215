"""How fast a checkpoint loads, against reading its files, and how much host memory that takes beyond the arrays.

`python -m tests.benchmarks.loading [--gigabytes 2] [--devices 1] [--dtype auto]` writes a synthetic bfloat16 Llama checkpoint
into a temporary folder. Both sides read warm files. Peak memory is what the process held above its start, less the arrays.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DIM, FFN, VOCAB, KV = 2048, 8192, 32000, 512
LAYER_BYTES = 2 * (2 * DIM * DIM + 2 * DIM * KV + 3 * DIM * FFN)


def write_checkpoint(folder: Path, size_bytes: float) -> int:
    """A checkpoint of about `size_bytes`, in shards of a few layers; its exact size in bytes."""
    import ml_dtypes
    import numpy as np

    from jaxft.weights.shards import write_file

    layers = max(1, round((size_bytes - 4 * VOCAB * DIM) / LAYER_BYTES))
    draw = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    shards: list[dict[str, np.ndarray]] = []
    for i in range(layers):
        shapes = {"self_attn.q_proj": (DIM, DIM), "self_attn.k_proj": (KV, DIM), "self_attn.v_proj": (KV, DIM),
                  "self_attn.o_proj": (DIM, DIM), "mlp.gate_proj": (FFN, DIM), "mlp.up_proj": (FFN, DIM),
                  "mlp.down_proj": (DIM, FFN), "input_layernorm": (DIM,), "post_attention_layernorm": (DIM,)}  # fmt: skip
        tensors = {f"model.layers.{i}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        shards.append(tensors)
    ends = {"model.embed_tokens.weight": random(VOCAB, DIM), "lm_head.weight": random(VOCAB, DIM)}
    shards.append(ends | {"model.norm.weight": random(DIM)})
    places = {}
    for i, tensors in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, tensors)
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = dict(
        model_type="llama", hidden_size=DIM, intermediate_size=FFN, num_attention_heads=16, num_key_value_heads=4,
        num_hidden_layers=layers, vocab_size=VOCAB, tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def read_seconds(folder: Path) -> float:
    """Seconds to read every shard into one buffer."""
    buffer = memoryview(bytearray(1 << 26))
    began = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - began


def touch_memory(size_bytes: int) -> None:
    """Writes to fresh memory once and gives it back: a virtual machine's host hands out pages at a tenth of the speed."""
    import numpy as np

    np.empty(size_bytes, np.uint8)[::4096] = 1


def resident_bytes(what: str) -> int:
    """A figure of /proc/self/status: VmRSS, or VmHWM for its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def load(folder: Path, dtype: str) -> dict[str, float]:
    """Seconds, bytes of arrays and peak bytes beyond them of one load in this process."""
    import jax
    import numpy as np

    from jaxft import config
    from jaxft.parallel.mesh import make_mesh
    from jaxft.weights.model import find, materialise

    mesh = make_mesh()
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    began = time.perf_counter()
    loaded = materialise(find(config.Model(str(folder), dtype=dtype)), mesh)
    jax.block_until_ready(loaded.frozen)
    seconds = time.perf_counter() - began
    held = sum(shard.data.nbytes for a in loaded.frozen.values() for shard in a.addressable_shards)
    largest = max(np.prod(row.hub_shape) * row.dtype.itemsize for row in loaded.rows)
    peak = resident_bytes("VmHWM") - before - held
    return {"seconds": seconds, "array_bytes": held, "beyond_bytes": peak, "tensors": peak / largest}


def main() -> None:
    """Prints one line of JSON per repetition."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gigabytes", type=float, default=2.0)
    options.add_argument("--devices", type=int, default=1)
    options.add_argument("--dtype", default="auto")
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--folder", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.folder:
        print(json.dumps(load(Path(asked.folder), asked.dtype)))
        return
    with tempfile.TemporaryDirectory() as name:
        size = write_checkpoint(Path(name), asked.gigabytes * 1e9)
        flags = f"--xla_force_host_platform_device_count={asked.devices}"
        for _ in range(asked.repeat):
            touch_memory(4 * size)
            reading = read_seconds(Path(name))
            child = [sys.executable, "-m", "tests.benchmarks.loading", "--folder", name, "--dtype", asked.dtype]
            said = subprocess.run(
                child, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, check=True
            )
            found = json.loads(said.stdout.splitlines()[-1])
            speed = reading / found["seconds"]
            print(json.dumps({"file_bytes": size, "read_seconds": reading, **found, "share_of_reading_speed": speed}))


if __name__ == "__main__":
    main()
