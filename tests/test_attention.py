"""Every kernel computes what the dense one does, on packed rows and in its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.attention import KERNELS, dense


def inputs(S, N=4, K=2, H=8, seed=0):
    """Random q, k, v `[2,S,·,H]`, and places: three packed rows and padding, cut differently in each sequence."""
    drawn = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(drawn.normal(size=(2, S, heads, H)), jnp.float32) for heads in (N, K, K))
    segments, positions = np.zeros((2, S), np.int32), np.zeros((2, S), np.int32)
    for row, ends in enumerate(((S // 5, S // 2, S - 3), (1, S - 9, S - 1))):
        start = 0
        for segment, end in enumerate(ends, 1):
            segments[row, start:end], positions[row, start:end] = segment, np.arange(end - start)
            start = end
    places = {"q_positions": positions, "kv_positions": positions, "q_segments": segments, "kv_segments": segments}
    return (q, k, v), {name: jnp.asarray(value) for name, value in places.items()} | {"scale": H**-0.5}


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "dense"])
@pytest.mark.parametrize("S", [37, 64, 200])
def test_a_kernel_equals_the_dense_one_with_gradients(name, S):
    qkv, rest = inputs(S)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, S, 4, 8)), jnp.float32)
    real = (rest["q_segments"] > 0)[..., None, None]

    def run(kernel):
        return jax.value_and_grad(lambda *x: jnp.sum(jnp.where(real, kernel(*x, **rest) * weights, 0.0)), (0, 1, 2))(*qkv)

    (found, found_gradients), (wanted, wanted_gradients) = run(KERNELS[name]), run(dense)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    for a, b in zip(found_gradients, wanted_gradients):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()) + 1e-6)  # sums of up to 200 fp32 terms


def test_a_query_sees_only_its_own_segment_and_nothing_after_itself():
    qkv, rest = inputs(40)
    out = dense(*qkv, **rest)
    q, k, v = qkv
    segments = np.asarray(rest["q_segments"])
    hidden = jnp.asarray((segments != 2) | (np.arange(40) > 14))[..., None, None]
    changed = dense(q, jnp.where(hidden, 9.0, k), jnp.where(hidden, -7.0, v), **rest)
    kept = (segments == 2) & (np.arange(40) <= 14)
    np.testing.assert_array_equal(np.asarray(out)[kept], np.asarray(changed)[kept])
    assert kept.any() and not np.array_equal(out, changed)
