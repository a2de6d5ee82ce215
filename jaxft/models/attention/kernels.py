"""Which kernel computes attention: by platform, by what the model needs, and as the user asks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError, one_line
from jaxft.models.arch import Arch, LayerSpec
from jaxft.models.attention import gpu, tpu, xla
from jaxft.models.attention.places import Places

KERNELS = {
    "dense": xla.dense,
    "blocked": xla.blocked,
    "splash": tpu.splash,
    "cudnn": gpu.cudnn,
    "tokamax": gpu.tokamax,
}
ONLY = {"splash": "tpu", "cudnn": "gpu", "tokamax": "gpu"}
# In order of preference; dense where none of them can.
PREFERRED = {"cpu": ("blocked",), "tpu": ("splash",), "gpu": ("cudnn", "tokamax")}


def kernel_for(device: Any, arch: Arch, dtype: Any, asked: str = "auto") -> str:
    """The kernel's name for a device (or a platform: cpu, gpu, tpu), a model and `model.attention`.

    A GPU's kernels must first agree with `dense` on this machine's GPU, on a small packed batch; where one asked for by
    auto does not, that is printed. Raises UserError where the kernel asked for cannot run here or for this model.
    """
    platform = getattr(device, "platform", device)
    if asked != "auto":
        why = _unfit(asked, platform, device, arch, dtype) or _fault(asked, arch, dtype)
        if why:
            raise UserError(f"model.attention: {asked} {why}; set it to auto or dense")
        return asked
    for name in PREFERRED.get(platform, ()):
        if _unfit(name, platform, device, arch, dtype):
            continue
        fault = _fault(name, arch, dtype)
        if fault is None:
            return name
        print(f"model.attention: {name} {fault}; going on without it", flush=True)
    return "dense"


def _unfit(name: str, platform: str, device: Any, arch: Arch, dtype: Any) -> str | None:
    """Why a kernel is not for this device or this model, as the end of a sentence; None where it is."""
    if ONLY.get(name, platform) != platform:
        return f"runs on a {ONLY[name].upper()}, and this is a {platform.upper()}"
    if name not in gpu.LIMITS:
        return None
    return gpu.lacks(name, _widest(arch).head_dim, arch.attention_cap, dtype, _capability(device))


def _widest(arch: Arch) -> LayerSpec:
    return max(arch.layers, key=lambda layer: layer.head_dim)


def _capability(device: Any) -> float:
    """NVIDIA's compute capability, such as 9.0; 0 of other makers' GPUs."""
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):
        return 0.0


def _fault(name: str, arch: Arch, dtype: Any) -> str | None:
    """How a GPU's kernel fails on this machine's own; None where it computes there what `dense` does."""
    if name not in gpu.LIMITS:
        return None
    layer = _widest(arch)
    scale = layer.head_dim**-0.5 if arch.query_scale is None else arch.query_scale
    return _disagreement(name, layer, scale, arch.attention_cap, jnp.dtype(dtype))


@functools.cache
def _disagreement(name: str, layer: LayerSpec, scale: float, cap: float | None, dtype: Any) -> str | None:
    # No test of this repository reaches a GPU, and a kernel that ignored segments would train without a word.
    try:
        found, wanted = (_sample(KERNELS[kernel], layer, scale, cap, dtype) for kernel in (name, "dense"))
    except Exception as error:  # whatever a driver, a compiler or a library raises, `dense` still works
        return f"fails on this GPU ({one_line(error):.200})"
    # Both round to 16 bits on the way; what sees a wrong key is off by a good part of the largest value.
    apart = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted))
    return None if apart < 0.05 else f"computes something else than dense on this GPU (off by {apart:.0%})"


def _sample(kernel: Any, layer: LayerSpec, scale: float, cap: float | None, dtype: Any) -> list[np.ndarray]:
    """Output and gradients of a kernel on two packed rows with a window, fp32 on the host."""
    B, S, lengths = 2, 256, (30, 150, 60, 16)
    segments = np.repeat(np.arange(len(lengths)), lengths)[None].repeat(B, axis=0).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(B, axis=0).astype(np.int32)
    places = Places(*(jnp.asarray(x) for x in (positions, positions, segments, segments)))
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (layer.heads, layer.kv_heads, layer.kv_heads, layer.heads)
    q, k, v, weights = (jax.random.normal(key, (B, S, n, layer.head_dim)).astype(dtype) for key, n in zip(keys, heads))

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = kernel(q, k, v, places, scale=scale, window=100, cap=cap)
        return jnp.sum((out * weights).astype(jnp.float32)), out

    gradients, out = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]
