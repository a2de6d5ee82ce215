"""Every kernel computes what the dense one does, on packed rows and in its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.attention import KERNELS, Places, dense


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
    places = Places(*map(jnp.asarray, (positions, positions, segments, segments)))
    return (q, k, v), places


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "dense"])
@pytest.mark.parametrize("S", [37, 64, 200])
@pytest.mark.parametrize("settings", [{}, {"window": 11}, {"cap": 0.5}, {"window": 70, "cap": 2.0}], ids=str)
def test_a_kernel_equals_the_dense_one_with_gradients(name, S, settings):
    qkv, places = inputs(S)
    rest = {"scale": 8**-0.5, **settings}
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, S, 4, 8)), jnp.float32)
    real = (places.q_segments > 0)[..., None, None]

    def run(kernel):
        return jax.value_and_grad(
            lambda *x: jnp.sum(jnp.where(real, kernel(*x, places, **rest) * weights, 0.0)), (0, 1, 2)
        )(*qkv)

    (found, found_gradients), (wanted, wanted_gradients) = run(KERNELS[name]), run(dense)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    for a, b in zip(found_gradients, wanted_gradients):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()) + 1e-6)  # sums of up to 200 fp32 terms


def test_a_query_sees_only_its_own_segment_and_nothing_after_itself():
    qkv, places = inputs(40)
    out = dense(*qkv, places, scale=1.0)
    q, k, v = qkv
    segments = np.asarray(places.q_segments)
    hidden = jnp.asarray((segments != 2) | (np.arange(40) > 14))[..., None, None]
    changed = dense(q, jnp.where(hidden, 9.0, k), jnp.where(hidden, -7.0, v), places, scale=1.0)
    kept = (segments == 2) & (np.arange(40) <= 14)
    np.testing.assert_array_equal(np.asarray(out)[kept], np.asarray(changed)[kept])
    assert kept.any() and not np.array_equal(out, changed)


def test_a_window_counts_the_query_itself_and_a_cap_comes_before_the_mask():
    (q, k, v), places = inputs(40)
    assert np.array_equal(dense(q, k, v, places, scale=1.0, window=40), dense(q, k, v, places, scale=1.0))
    alone = dense(q, k, v, places, scale=1.0, window=1)
    real = np.asarray(places.q_segments) > 0
    np.testing.assert_allclose(np.asarray(alone)[real], np.repeat(np.asarray(v), 2, axis=2)[real], rtol=1e-6)
    # Scores far beyond the cap are all the same, so that what is seen is averaged, and what is masked stays masked.
    same = dense(jnp.ones_like(q), 1e6 * jnp.ones_like(k), v, places, scale=1.0, cap=1.0)
    np.testing.assert_allclose(same[0, 7], np.repeat(np.asarray(v)[0, :8].mean(0), 2, axis=0), rtol=1e-5)
