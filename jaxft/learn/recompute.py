"""The training step compiled, with what the backward pass computes again chosen by the memory that is there."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jaxft import config
from jaxft.errors import OutOfResources
from jaxft.learn import optim, step
from jaxft.models.arch import Arch, LayerSpec, inputs_held
from jaxft.parallel.compilation import kept_only_for, return_memory
from jaxft.parallel.sharding import batch_ways
from jaxft.weights.model import Loaded, Source, outline

# From the least arithmetic to the least memory.
POLICIES = ("dots", "qkv", "full", "nested")
HOPELESS = 1.1  # times a device's memory; what must be held at least is an estimate


class DoesNotFit(OutOfResources):
    """No policy fits a device. `tried` are the policies, with the bytes that each needs where they are known."""

    def __init__(self, tried: Sequence[tuple[str, int | None]], device_bytes: int | None):
        super().__init__(_too_large(tried, device_bytes))
        self.tried, self.device_bytes = tuple(tried), device_bytes


@dataclass(frozen=True)
class Compiled:
    """The step under one policy. `bytes` are what it takes of each device while it runs, arguments included.

    `too_large` are the policies tried before, with their bytes where the compiler gave them.
    """

    policy: str
    outlined: Loaded
    optimizer: optax.GradientTransformation
    executable: jax.stages.Compiled
    bytes: int
    seconds: float  # of tracing and compiling this policy
    shape: tuple[int, int]
    too_large: tuple[tuple[str, int | None], ...]

    def said(self) -> str:
        """What was compiled and chosen, in a line."""
        rows, length = self.shape
        line = f"compiled the training step for {rows} × {length} in {self.seconds:.1f} s; attention {self.outlined.attention}"
        line += f", remat {self.policy}, {self.bytes / 2**30:.2f} GiB per device"
        return line + "".join(f"; {_tried(name, size)} does not fit" for name, size in self.too_large)


def policies(asked: str, platform: str) -> Sequence[str]:
    """Those to try in turn. On a CPU no matmul is repeated; the rest is repeated faster than it is stored."""
    if asked != "auto":
        return (asked,)
    return POLICIES[:1] if platform == "cpu" else POLICIES


class Traceable(NamedTuple):
    """A training step before it is compiled, and what it is called with, as shapes."""

    outlined: Loaded
    optimizer: optax.GradientTransformation
    step: Any  # a jitted function
    inputs: tuple[Any, ...]
    policy: str


def traceable(
    settings: config.Config, source: Source, mesh: Mesh, steps: int, shape: tuple[int, int], policy: str
) -> Traceable:
    """The step of a run of so many `steps` for batches of `[B,S]` = `shape` on `mesh`, without any array."""
    outlined = outline(source, mesh, policy, settings.model.attention)
    optimizer = optim.optimizer(settings.optim, steps, outlined.rows)
    parts = settings.optim.accumulation_steps
    train_step = step.make_train_step(outlined, optimizer, mesh, accumulation_steps=parts)
    inputs = step.abstract_inputs(outlined, optimizer, mesh, shape)
    return Traceable(outlined, optimizer, train_step, inputs, policy)


def compile_step(
    settings: config.Config, source: Source, mesh: Mesh, steps: int, shape: tuple[int, int], device_bytes: int | None
) -> Compiled:
    """That step compiled, under the first policy that fits `device_bytes`; any fits None.

    Raises DoesNotFit where none does.
    """
    tried: list[tuple[str, int | None]] = []
    for policy in policies(settings.model.remat, mesh.devices.flat[0].platform):
        began = time.monotonic()
        found = traceable(settings, source, mesh, steps, shape, policy)
        least = least_bytes(found, source, mesh, settings.optim.accumulation_steps)
        if device_bytes is not None and least > HOPELESS * device_bytes:  # compiling would take minutes to say the same
            tried.append((policy, least))
            continue
        with kept_only_for(mesh.devices.flat):
            executable = _executable(found)
        return_memory()
        if isinstance(executable, int) or executable is None:
            tried.append((policy, executable))
            continue
        needed = device_memory(executable)
        if device_bytes is None or needed <= device_bytes:
            seconds = time.monotonic() - began
            return Compiled(policy, found.outlined, found.optimizer, executable, needed, seconds, shape, tuple(tried))
        tried.append((policy, needed))
    raise DoesNotFit(tried, device_bytes)


def _executable(found: Traceable) -> jax.stages.Compiled | int | None:
    """The bytes needed, or None, where the compiler says that the program does not fit."""
    try:
        return found.step.lower(*found.inputs).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "vmem" in str(error):
            raise
        said = re.search(r"Used ([\d.]+)([KMGT]) of \S+ hbm", str(error))  # a TPU's
        return int(float(said[1]) * 2 ** (10 * (1 + "KMGT".index(said[2])))) if said else None


def least_bytes(found: Traceable, source: Source, mesh: Mesh, accumulation_steps: int = 1) -> int:
    """Bytes that the step must hold on a device: its arguments, and what its policy keeps for each token of each layer from
    the lowest trained one up."""
    arrays = [x for x in jax.tree.leaves(found.inputs) if x.sharding is not None]
    arguments = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
    rows, length = found.inputs[2]["tokens"].shape
    tokens = rows * length // (accumulation_steps * batch_ways(mesh))
    trained = {path for row in found.outlined.rows if row.trainable for path in row.names}
    names = [source.arch.names.layer.format(i) + "." for i in range(len(source.arch.layers))]
    lowest = next((i for i, name in enumerate(names) if any(path.startswith(name) for path in trained)), len(names))
    kept = sum(
        kept_per_token(layer, source.arch, found.policy, mesh.shape["tensor"]) for layer in source.arch.layers[lowest:]
    )
    return arguments + tokens * kept * source.dtype.itemsize


def kept_per_token(layer: LayerSpec, arch: Arch, policy: str, tensor: int = 1) -> int:
    """Elements of one layer kept for one token: as `models.stage.KEPT` names them, and the layer's input or, of nested, its
    share of those that are held at once."""
    q, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    narrow = arch.dim * (1 if arch.names.mlp_output_norm is None else 2)
    attention = (2 * q + 2 * kv) // tensor  # queries, keys, values and what comes of them
    if policy == "nested":
        return arch.dim * inputs_held(len(arch.layers)) // len(arch.layers)
    return (
        arch.dim
        + {
            "none": attention + narrow + 2 * layer.ffn // tensor,
            "dots": attention + narrow + 2 * layer.ffn // tensor,
            "qkv": attention + narrow,
            "full": 0,
        }[policy]
    )


def device_memory(executable: Any) -> int:
    """Bytes of one device while a program runs: arguments, outputs that take no argument's place, and temporaries."""
    found = executable.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + outputs + found.temp_size_in_bytes + found.generated_code_size_in_bytes


def _too_large(tried: Sequence[tuple[str, int | None]], device_bytes: int | None) -> str:
    needs = ", ".join(_tried(*each) for each in tried)
    free = "the device's memory" if device_bytes is None else f"the {device_bytes / 2**30:.1f} GiB of a device"
    return (
        f"the training step does not fit {free} under any recomputation policy (model.remat: {needs}); lower "
        "optim.batch_size, raise optim.accumulation_steps, lower data.max_length, or use more devices"
    )


def _tried(policy: str, size: int | None) -> str:
    return policy if size is None else f"{policy} ({size / 2**30:.1f} GiB)"
