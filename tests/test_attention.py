"""Every kernel computes what the dense one does, on packed rows and in its gradient; a TPU's and GPUs' by stand-ins.

Splash runs in Pallas's interpreter. What cuDNN and Tokamax are asked is asked of the plain XLA implementations behind
the same public functions.
"""

import functools
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.config import Mesh
from jaxft.errors import UserError
from jaxft.models.arch import Arch, LayerSpec, Rope
from jaxft.models.attention import KERNELS, Places, blocked, dense, gpu, kernel_for, kernels, saved, tpu
from jaxft.models.attention.places import on_each_device
from jaxft.parallel.mesh import make_mesh

splash = functools.partial(tpu._splash, interpret=True)


def xla_cudnn(*args, cap=None, **settings):
    assert cap is None
    return gpu._cudnn(*args, **settings, implementation="xla")


RUN = {
    "blocked": blocked,
    "splash": splash,
    "cudnn": xla_cudnn,
    "tokamax": functools.partial(gpu._tokamax, implementation="xla"),
}
HERE = [name for name in RUN if name != "tokamax" or importlib.util.find_spec("tokamax")]
# S, query heads, kv heads, head_dim, window, cap: no S but 128 fills a TPU's lanes.
SHAPES = [
    (200, 4, 2, 64, None, None),
    (128, 3, 1, 256, 70, 2.0),  # as Gemma 2, with one kv head
    (37, 4, 4, 96, 11, None),
    (300, 4, 2, 128, None, 0.5),
    (600, 2, 1, 64, 130, None),  # two tiles of 384, and windows across them
]


@pytest.fixture
def lenient():
    """For what stands in for a GPU's kernels, which promotes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True)
def strict_but_for_stand_ins(request):
    parameters = getattr(request.node, "callspec", None)
    if parameters and parameters.params.get("name") in ("cudnn", "tokamax"):
        request.getfixturevalue("lenient")


def packed(S):
    """Places of two rows of three packed segments and padding, cut differently in each row."""
    segments, positions = np.zeros((2, S), np.int32), np.zeros((2, S), np.int32)
    for row, ends in enumerate(((S // 5, S // 2, S - 3), (1, S - 9, S - 1))):
        start = 0
        for segment, end in enumerate(ends, 1):
            segments[row, start:end], positions[row, start:end] = segment, np.arange(end - start)
            start = end
        positions[row, start:] = np.arange(S - start)
    return Places(*map(jnp.asarray, (positions, positions, segments, segments)))


def inputs(S, N=4, K=2, H=8, dtype=jnp.float32):
    """Random q, k, v `[2,S,·,H]`, what to weigh outputs by, and packed places."""
    drawn = np.random.default_rng(0)
    q, k, v, weights = (jnp.asarray(drawn.normal(size=(2, S, heads, H)), dtype) for heads in (N, K, K, N))
    return (q, k, v), weights, packed(S)


def run(kernel, qkv, weights, places, settings):
    """A kernel's output and gradients where tokens are real, fp32."""
    real = (places.q_segments > 0)[..., None, None]

    def weighed(*qkv):
        out = jnp.where(real, kernel(*qkv, places, **settings), jnp.zeros((), qkv[0].dtype))
        return jnp.sum((out * weights).astype(jnp.float32)), out

    gradients, out = jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))(*qkv)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def assert_same(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


def settings_for(H, window=None, cap=None):
    return {"scale": 0.8 * H**-0.5, "window": window, "cap": cap}  # not what a library would take where none is given


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", HERE)
def test_a_kernel_equals_the_dense_one_with_gradients(name, shape):
    S, N, K, H, window, cap = shape
    if name == "cudnn" and cap is not None:
        pytest.skip("cuDNN has no soft-cap")
    qkv, weights, places = inputs(S, N, K, H)
    settings = settings_for(H, window, cap)
    # Sums of up to 600 fp32 terms, in another order.
    assert_same(
        run(RUN[name], qkv, weights, places, settings), run(dense, qkv, weights, places, settings), tolerance=5e-6
    )


@pytest.mark.parametrize("name", HERE)
def test_a_kernel_in_bfloat16_is_as_near_to_fp32_as_the_dense_one(name):
    qkv, weights, places = inputs(128, 4, 2, 128, jnp.bfloat16)
    settings = settings_for(128, window=50)
    exact = run(dense, [x.astype(jnp.float32) for x in qkv], weights.astype(jnp.float32), places, settings)
    # bfloat16 has 8 bits: 0.4 % for each of a handful of roundings.
    assert_same(run(dense, qkv, weights, places, settings), exact, tolerance=0.02)
    assert_same(run(RUN[name], qkv, weights, places, settings), exact, tolerance=0.02)


@pytest.mark.parametrize("name", ["dense", *HERE])
def test_packed_rows_equal_separate_rows(name):
    kernel = jax.jit(functools.partial({"dense": dense, **RUN}[name], **settings_for(64, window=40)))
    (q, k, v), _, places = inputs(150, H=64)
    together = kernel(q, k, v, places)
    for segment in (1, 2, 3):
        here = np.flatnonzero(np.asarray(places.q_segments)[0] == segment)
        one = slice(here[0], here[-1] + 1)
        positions = jnp.arange(len(here), dtype=jnp.int32)[None]
        alone = Places(positions, positions, jnp.ones_like(positions), jnp.ones_like(positions))
        apart = kernel(q[:1, one], k[:1, one], v[:1, one], alone)
        np.testing.assert_allclose(together[:1, one], apart, atol=2e-6)  # fp32, and other blocks


@pytest.mark.parametrize("window,cap", [(None, None), (7, 0.8)])
def test_the_dense_kernel_is_the_formula(window, cap):
    (q, k, v), _, places = inputs(40, N=6, K=2, H=8)
    out = jax.jit(functools.partial(dense, scale=0.3, window=window, cap=cap))(q, k, v, places)
    out, q, k, v, segments, positions = map(np.asarray, (out, q, k, v, places.q_segments, places.q_positions))
    for b, s, n in np.ndindex(2, 40, 6):
        behind = positions[b, s] - positions[b]
        seen = (segments[b] == segments[b, s]) & (behind >= 0) & (behind < (window or 99))
        scores = 0.3 * k[b, seen, n // 3] @ q[b, s, n]
        odds = np.exp(scores if cap is None else cap * np.tanh(scores / cap))
        np.testing.assert_allclose(out[b, s, n], odds @ v[b, seen, n // 3] / odds.sum(), atol=2e-6)


def test_a_query_sees_only_its_own_segment_and_nothing_after_itself():
    (q, k, v), _, places = inputs(40)
    out = dense(q, k, v, places, scale=1.0)
    segments = np.asarray(places.q_segments)
    hidden = jnp.asarray((segments != 2) | (np.arange(40) > 14))[..., None, None]
    changed = dense(q, jnp.where(hidden, 9.0, k), jnp.where(hidden, -7.0, v), places, scale=1.0)
    kept = (segments == 2) & (np.arange(40) <= 14)
    np.testing.assert_array_equal(np.asarray(out)[kept], np.asarray(changed)[kept])
    assert kept.any() and not np.array_equal(out, changed)


def test_a_window_counts_the_query_itself_and_a_cap_comes_before_the_mask():
    (q, k, v), _, places = inputs(40)
    assert np.array_equal(dense(q, k, v, places, scale=1.0, window=40), dense(q, k, v, places, scale=1.0))
    alone = dense(q, k, v, places, scale=1.0, window=1)
    np.testing.assert_allclose(alone, np.repeat(np.asarray(v), 2, axis=2), rtol=1e-6)
    # Scores far beyond the cap are all the same, so that what is seen is averaged, and what is masked stays masked.
    same = dense(jnp.ones_like(q), 1e6 * jnp.ones_like(k), v, places, scale=1.0, cap=1.0)
    np.testing.assert_allclose(same[0, 7], np.repeat(np.asarray(v)[0, :8].mean(0), 2, axis=0), rtol=1e-5)


def test_splash_fills_up_to_the_fewest_and_smallest_tiles():
    assert [tpu.tiles(S) for S in (1, 128, 200, 512, 513, 640, 1024, 2176, 8192)] == [
        (128, 128), (128, 128), (256, 256), (512, 512), (768, 384), (768, 384), (1024, 512), (2560, 512), (8192, 512),
    ]  # fmt: skip


def test_splash_of_many_tiles_computes_the_same_without_its_one_kernel_backward_pass(monkeypatch):
    qkv, weights, places = inputs(300, H=64)
    settings = settings_for(64, window=130, cap=1.0)
    wanted = run(dense, qkv, weights, places, settings)
    monkeypatch.setattr(tpu, "MAX_TILE", 128)
    for partial_sums in (2, 3):  # three tiles: two kernels, and one
        monkeypatch.setattr(tpu, "MAX_PARTIAL_DQ", partial_sums)
        assert_same(run(splash, qkv, weights, places, settings), wanted, tolerance=5e-6)


@pytest.mark.parametrize("name", HERE[1:])
def test_a_mesh_of_eight_computes_what_one_device_does(name):
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    (q, k, v), weights, places = inputs(130, H=64)
    q, k, v, weights = (jnp.concatenate([x, x[::-1] * 0.5]) for x in (q, k, v, weights))  # four rows
    places = Places(*(jnp.concatenate([x, x[::-1]]) for x in places))
    settings = settings_for(64, window=50)
    wanted = run(dense, (q, k, v), weights, places, settings)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    spread = jax.device_put((q, k, v, weights), rows)

    def on_mesh(q, k, v, places, **settings):
        return on_each_device(functools.partial(RUN[name], **settings), mesh, q, k, v, places)

    assert_same(run(on_mesh, spread[:3], spread[3], places, settings), wanted, tolerance=5e-6)


def count(jaxpr, name):
    """How often a primitive is in a jaxpr and those within it."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += count(inner, name) if hasattr(inner, "eqns") else 0
    return found


def recomputed(kernel, policy, primitive, dtype=jnp.float32):
    """How often `primitive` is in the gradient of a checkpointed scan of two layers, without what nobody uses."""
    from jax.interpreters import partial_eval

    S, N, H = 128, 2, 64
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (4, S))
    places = Places(positions, positions, jnp.ones_like(positions), jnp.ones_like(positions))

    def layer(h, w):
        q = checkpoint_name((h @ w).reshape(4, S, N, H), "qkv")
        return h + kernel(q, q, q, places).reshape(4, S, N * H) @ w, None

    def loss(w, h):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), h, w)[0])

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, N * H, N * H), dtype), jnp.ones((4, S, N * H), dtype)).jaxpr
    return count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], primitive)


@pytest.mark.parametrize("meshed", [False, True])
def test_a_policy_of_what_is_saved_spares_splash_its_second_forward_pass(meshed):
    local = functools.partial(splash, **settings_for(64))
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2)) if meshed else None
    policies = jax.checkpoint_policies
    keep = policies.save_from_both_policies(policies.save_only_these_names("qkv"), saved)

    def kernel(*args):
        return on_each_device(local, mesh, *args)

    assert recomputed(kernel, keep, "pallas_call") == 2  # forward, and the one backward kernel
    assert recomputed(kernel, policies.nothing_saveable, "pallas_call") == 3


# --- which kernel -----------------------------------------------------------------------------------------------------


def arch(head_dim=64, cap=None):
    layer = LayerSpec(heads=4, kv_heads=2, head_dim=head_dim, ffn=8)
    rope = Rope(theta=1e4)
    return Arch("llama", 32, 256, (layer,), rope, norm_eps=1e-6, tied_head=True, max_positions=64, attention_cap=cap)


def nvidia(capability):
    return types.SimpleNamespace(platform="gpu", compute_capability=capability)


@pytest.fixture
def tokamax_installed(monkeypatch, lenient):
    """As if Tokamax were installed, and both GPU kernels did what XLA's do."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "tokamax" else find(name))
    monkeypatch.setitem(KERNELS, "cudnn", xla_cudnn)
    monkeypatch.setitem(KERNELS, "tokamax", dense)
    kernels._disagreement.cache_clear()
    yield
    kernels._disagreement.cache_clear()


def test_a_platform_has_its_kernel():
    chosen = [kernel_for(platform, arch(), jnp.float32) for platform in ("cpu", "tpu", "gpu", "elsewhere")]
    assert chosen == ["blocked", "splash", "dense", "dense"]
    assert kernel_for(jax.devices()[0], arch(), jnp.float32) == "blocked"
    assert kernel_for("tpu", arch(256, cap=50.0), jnp.bfloat16) == "splash"
    assert kernel_for("cpu", arch(), jnp.float32, "dense") == "dense"


@pytest.mark.parametrize(
    "capability,head_dim,cap,dtype,chosen",
    [
        ("9.0", 64, None, "bfloat16", "cudnn"),
        ("9.0", 256, None, "bfloat16", "cudnn"),
        ("9.0", 256, 50.0, "bfloat16", "tokamax"),
        ("9.0", 64, None, "float32", "dense"),
        ("9.0", 320, None, "bfloat16", "dense"),
        ("9.0", 100, None, "bfloat16", "dense"),
        ("8.0", 128, None, "bfloat16", "cudnn"),
        ("8.0", 256, None, "bfloat16", "dense"),
        ("8.0", 64, 50.0, "bfloat16", "dense"),
        ("10.0", 128, 50.0, "bfloat16", "dense"),
        ("7.5", 64, None, "float16", "dense"),
        ("gfx942", 64, None, "bfloat16", "dense"),
    ],
)
def test_a_gpu_has_the_fastest_kernel_that_can_compute_the_model(
    tokamax_installed, capability, head_dim, cap, dtype, chosen
):
    assert kernel_for(nvidia(capability), arch(head_dim, cap), dtype) == chosen


def ignores_segments(q, k, v, places, **settings):
    one = jnp.zeros_like(places.q_segments)
    order = jnp.broadcast_to(jnp.arange(one.shape[1], dtype=jnp.int32)[None], one.shape)
    return dense(q, k, v, Places(order, order, one, one), **settings)


def breaks(*args, **settings):
    raise RuntimeError("no such\nengine")


@pytest.mark.parametrize("kernel,why", [(ignores_segments, "something else than dense"), (breaks, "no such engine")])
def test_a_gpu_kernel_that_fails_on_this_gpu_is_not_used(tokamax_installed, monkeypatch, capsys, kernel, why):
    monkeypatch.setitem(KERNELS, "cudnn", kernel)
    assert kernel_for(nvidia("8.0"), arch(), "bfloat16") == "dense"
    assert why in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"model\.attention: cudnn .*{why}.*; set it to auto or dense"):
        kernel_for(nvidia("8.0"), arch(), "bfloat16", "cudnn")


@pytest.mark.parametrize(
    "asked,device,model,said",
    [
        ("splash", "cpu", arch(), "splash runs on a TPU, and this is a CPU"),
        ("cudnn", "tpu", arch(), "cudnn runs on a GPU, and this is a TPU"),
        ("cudnn", nvidia("9.0"), arch(cap=50.0), "cudnn cannot cap scores (here at 50)"),
        ("cudnn", nvidia("9.0"), arch(264), "of at most 256 and a multiple of 8, not of 264"),
        ("cudnn", nvidia("8.0"), arch(256), "heads of 256 from compute capability 9 on, not on 8"),
        ("cudnn", nvidia("7.5"), arch(), "is for GPUs of compute capability 8 or more, not 7.5"),
        ("tokamax", nvidia("9.0"), arch(), "pip install --no-deps tokamax"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_in_a_line(monkeypatch, asked, device, model, said):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tokamax" else find(name))
    with pytest.raises(UserError) as refused:
        kernel_for(device, model, "bfloat16", asked)
    assert str(refused.value).startswith(f"model.attention: {asked} ") and said in str(refused.value)


def test_gpu_kernels_refuse_what_they_cannot_compute(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tokamax" else find(name))
    qkv, _, places = inputs(16, H=64, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match="cannot cap scores"):
        KERNELS["cudnn"](*qkv, places, scale=1.0, cap=5.0)
    with pytest.raises(UserError, match="computes in bfloat16 or float16, not in float32"):
        KERNELS["cudnn"](*(x.astype(jnp.float32) for x in qkv), places, scale=1.0)
    with pytest.raises(UserError, match="is not installed"):
        KERNELS["tokamax"](*qkv, places, scale=1.0, cap=5.0)
