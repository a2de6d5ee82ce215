"""The kernels of other machines, compiled for a TPU and lowered for a GPU on this one."""

import functools
import importlib.util
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from marked import exhaustive, slow

from jaxft.models.attention import KERNELS, Places, gpu, saved
from jaxft.parallel.mesh import AXES

# Query heads, kv heads, head_dim, window, cap and dtype; half of the heads are on a device.
FAMILIES = [
    (32, 8, 64, None, None, "bfloat16"),  # Llama 1B
    (12, 4, 128, None, None, "bfloat16"),  # Llama 8B, Qwen 2
    (16, 2, 256, None, None, "bfloat16"),  # Gemma 2B: one kv head on a device
    (16, 8, 256, 600, 50.0, "bfloat16"),  # Gemma 2 9B
]
OTHERS = [
    (20, 4, 96, None, None, "float32"),  # OpenELM
    (16, 8, 256, 600, 50.0, "float32"),
    (4, 2, 20, 100, None, "bfloat16"),
]


@pytest.fixture
def tpu_mesh(monkeypatch):
    """A mesh of eight devices of a TPU that is not here, by the name of its topology."""
    # libtpu otherwise asks the machine's metadata server, and takes a lock that only one process may hold.
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    def mesh(name):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        return Mesh(np.array(devices).reshape(2, 2, 2), AXES)

    return mesh


def traced(name, shapes, mesh=None, S=1000):
    """The gradient of a kernel of each of `shapes`, each under a checkpoint that keeps what is `saved`."""
    place = (lambda *axes: None) if mesh is None else lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    rows, heads = place(("data", "fsdp")), place(("data", "fsdp"), None, "tensor")
    tokens = [jax.ShapeDtypeStruct((8, S), jnp.int32, sharding=rows)] * 4
    qkvs = [
        [jax.ShapeDtypeStruct((8, S, n, H), dtype, sharding=heads) for n in (N, K, K)]
        for N, K, H, _, _, dtype in shapes
    ]

    def loss(qkvs, tokens):
        total = jnp.zeros(())
        for qkv, (_, _, H, window, cap, _) in zip(qkvs, shapes):
            kernel = functools.partial(KERNELS[name], scale=H**-0.5, window=window, cap=cap, mesh=mesh)
            out = jax.checkpoint(kernel, policy=saved)(*qkv, Places(*tokens))
            total += jnp.sum(jnp.square(out.astype(jnp.float32)))
        return total

    return jax.jit(jax.grad(loss)).trace(qkvs, tokens)


def test_splash_compiles_for_a_v5e_and_runs_its_forward_pass_once(tpu_mesh):
    program = traced("splash", FAMILIES, tpu_mesh("v5e:2x4")).lower().compile().as_text()
    assert program.count("tpu_custom_call") == 2 * len(FAMILIES)
    calls = re.findall(r"%splash_mha_(fwd|dkv|dq)\S* = ", program)
    assert sorted(calls) == ["dkv"] * len(FAMILIES) + ["fwd"] * len(FAMILIES)
    assert not re.search(r"all-(gather|reduce|to-all)|collective-permute", program)


@pytest.mark.slow
def test_splash_compiles_for_a_v6e(tpu_mesh):
    traced("splash", FAMILIES[::3], tpu_mesh("v6e:2x4")).lower().compile()


@pytest.mark.parametrize(
    "topology", [slow("v5e:2x4"), exhaustive("v6e:2x4"), exhaustive("v5p:2x2x2"), exhaustive("v4:2x2x1")]
)
def test_splash_compiles_for_every_shape_and_long_rows(tpu_mesh, topology):
    mesh = tpu_mesh(topology)
    traced("splash", FAMILIES + OTHERS, mesh).lower().compile()
    traced("splash", FAMILIES[1:], mesh, S=8192).lower().compile()


def test_splash_of_a_long_row_is_traced_quickly_and_holds_no_mask(tpu_mesh):
    began = time.process_time()
    lowered = traced("splash", FAMILIES[-1:], tpu_mesh("v5e:2x4"), S=16384).lower()
    assert time.process_time() - began < 10  # 1.5 s: each pair of tiles is looked at, once per kernel
    assert len(lowered.as_text()) < 2**20  # a bit for each of 16384² pairs would be 32 MiB


def operands(text, call):
    """The types of the operands of each custom call to `call`, in StableHLO."""
    found = re.findall(rf"custom_call @{re.escape(call)}\(.*?\) \{{.*\}} : \((.*?)\) ->", text)
    return [re.findall(r"tensor<(.*?)>", types) for types in found]


def gpu_mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 2, 2), AXES)


@pytest.mark.parametrize("meshed", [False, True])
def test_cudnn_is_given_the_mask_in_both_directions_and_runs_its_forward_pass_once(monkeypatch, meshed):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    # As on a Hopper GPU with cuDNN 9.13.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: float(capability) <= 9.0)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    shapes = [*FAMILIES[:3], (16, 8, 96, 600, None, "bfloat16")]
    text = traced("cudnn", shapes, gpu_mesh() if meshed else None).lower(lowering_platforms=("cuda",)).as_text()
    B, ways = (2, 2) if meshed else (8, 1)
    mask = f"{B}x1x1024x1024xbf16"
    forward = operands(text, "__cudnn$fmhaScaleBiasSoftmax")
    backward = operands(text, "__cudnn$fmhaScaleBiasSoftmaxBackward")
    wanted = [[f"{B}x1024x{n // ways}x{H}xbf16" for n in (N, K, K)] for N, K, H, *_ in shapes]
    assert sorted(forward) == sorted([*qkv, mask] for qkv in wanted)
    assert sorted(types[:3] for types in backward) == sorted(wanted)
    assert all(mask in types for types in backward)
    assert text.count("CAUSAL") == 2 * len(shapes)


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its use of Pallas
def test_tokamax_lowers_its_kernels_for_hopper(monkeypatch):
    gpu._library()
    from tokamax._src import gpu_utils

    monkeypatch.setattr(gpu_utils, "_compute_capability", lambda device=None: 9.0)
    monkeypatch.setattr(gpu_utils, "has_mosaic_gpu_support", lambda device=None: True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        text = traced("tokamax", FAMILIES[3:], gpu_mesh()).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @mosaic_gpu_v2\(", text)
    assert len(calls) == 4  # forward twice, since what it computed cannot be kept, dq, and dk with dv
