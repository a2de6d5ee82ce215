"""Arrays stacked layer by layer on their devices, without holding more than one layer elsewhere."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

ALIGNMENT = 64  # bytes; JAX copies a host buffer that lies otherwise


class Stack:
    """An array `[L,…,columns]` in the making; `spans` are the columns `(start, stop)` that this process's devices hold."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding):
        self.shape, self.dtype, self.sharding = shape, dtype, sharding
        self._indices = sharding.addressable_devices_indices_map(shape)
        self.spans = sorted({index[-1].indices(shape[-1])[:2] for index in self._indices.values()})
        local = sharding.shard_shape(shape)
        if on_cpu(sharding):
            self._parts: dict[Any, Any] = {_key(index): aligned(local, dtype) for index in self._indices.values()}
        else:
            self._parts = {device: _empty(local, dtype, device) for device in self._indices}

    def put(self, layer: int, value: jax.Array, first: int) -> None:
        """One layer's columns from `first` on, of which each device takes its own."""
        host = np.asarray(value) if on_cpu(self.sharding) else None
        done = set()
        for device, index in self._indices.items():
            start, stop, _ = index[-1].indices(self.shape[-1])
            own = (*index[1:-1], slice(start - first, stop - first))
            if host is None:
                at = jax.device_put(np.int32(layer), device)
                self._parts[device] = set_layer(self._parts[device], jax.device_put(value[own], device), at)
            elif (key := _key(index)) not in done:
                self._parts[key][layer] = host[own]
                done.add(key)

    def array(self) -> jax.Array:
        """The whole, once every layer has been put."""
        if on_cpu(self.sharding):
            return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self._parts[_key(index)])
        shards = [self._parts[device] for device in self._indices]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)


def on_cpu(sharding: NamedSharding) -> bool:
    """Whether the devices take host buffers as they lie."""
    return sharding.mesh.devices.flat[0].platform == "cpu"


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that JAX on a CPU takes over as it lies."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _key(index: tuple[slice, ...]) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index)


def _empty(shape: tuple[int, ...], dtype: Any, device: jax.Device) -> jax.Array:
    with jax.default_device(device):
        return jnp.zeros(shape, dtype)


@functools.partial(jax.jit, donate_argnums=0)
def set_layer(stack: jax.Array, value: jax.Array, i: jax.Array) -> jax.Array:
    """`stack` with layer `i` replaced, in its place."""
    return jax.lax.dynamic_update_index_in_dim(stack, value.astype(stack.dtype), i, 0)
