"""Intervals and tests, against scipy, exact sums and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxft.analysis import comparison, statistics
from jaxft.analysis.comparison import Measured, compare, panel
from jaxft.analysis.statistics import bootstrap
from jaxft.errors import UserError


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (3, 7), (660, 1319), (1318, 1319)])
def test_wilson_is_scipy_s(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(statistics.wilson(right, n), (expected.low, expected.high), atol=1e-7)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 1), (0, 6), (3, 9), (9, 3), (40, 75), (5, 5), (200, 900)])
def test_mcnemar_is_twice_the_smaller_tail(lost, won):
    tail = sum(math.comb(lost + won, i) for i in range(min(lost, won) + 1))
    assert statistics.mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail / 2 ** (lost + won)), rel=1e-9)


def test_the_bootstrap_of_a_mean_is_the_normal_interval_for_many_documents():
    draw = np.random.default_rng(0)
    for values in (draw.integers(0, 2, 1319).astype(float), draw.normal(1.0, 2.0, 1319)):
        found = bootstrap(values)
        half = 1.96 * statistics.standard_error(values)
        assert found.value == pytest.approx(values.mean())
        np.testing.assert_allclose([found.low, found.high], [found.value - half, found.value + half], atol=0.08 * half)


def test_the_bootstrap_covers_the_truth():
    """A 95 % interval of a paired ratio holds the truth in 95 % of draws: 400 draws have a standard error of 1.1 %."""
    draw, held = np.random.default_rng(1), 0
    for seed in range(400):
        tokens = draw.integers(5, 60, 80)
        found = bootstrap(tokens * 0.3 + draw.normal(0, 4, 80), tokens, resamples=400, seed=seed)
        held += found.low <= 0.3 <= found.high
    assert 0.90 <= held / 400 <= 0.98


def test_few_distinct_values_are_drawn_as_documents_are():
    """The multinomial shortcut and plain resampling are the same distribution."""
    values = np.array([1.0] * 30 + [-1.0] * 10 + [0.0] * 60)
    quick = bootstrap(values, resamples=20_000)
    plain = bootstrap(values + np.arange(100) * 1e-9, resamples=20_000)
    np.testing.assert_allclose([quick.low, quick.high], [plain.low, plain.high], atol=0.011)


def test_documents_of_one_passage_are_drawn_together():
    values = np.repeat(np.random.default_rng(2).normal(size=50), 20)
    passages = np.repeat(np.arange(50), 20)
    alone, together = bootstrap(values), bootstrap(values, clusters=passages)
    assert alone.value == pytest.approx(together.value)
    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(math.sqrt(20), rel=0.15)  # 20 copies say no more than one


def test_a_bootstrap_repeats_bit_for_bit_and_says_nothing_of_nothing():
    values = np.random.default_rng(3).normal(size=100)
    assert bootstrap(values, seed=5) == bootstrap(values, seed=5) != bootstrap(values, seed=6)
    assert math.isnan(bootstrap([]).value)


def test_adjusted_p_values():
    p = [0.01, 0.04, 0.03, 0.005]
    assert statistics.holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.benjamini_hochberg(p) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert statistics.holm([]) == statistics.benjamini_hochberg([]) == []


def test_a_robust_z_is_not_moved_by_outliers():
    values = [*np.random.default_rng(4).normal(size=500).tolist(), 1e6, 1e6]
    expected = (np.array(values) - np.median(values)) / stats.median_abs_deviation(values, scale="normal")
    np.testing.assert_allclose(statistics.robust_z(values), expected, rtol=1e-4)
    assert statistics.robust_z([1.0, 1.0, 5.0]) == [0.0, 0.0, 0.0]


def test_two_models_on_the_same_documents():
    base = [True] * 20 + [False] * 80
    tuned = [True] * 15 + [False] * 5 + [True] * 30 + [False] * 50
    found = compare(base, tuned)
    assert (found.both_right, found.right_to_wrong, found.wrong_to_right, found.both_wrong) == (15, 5, 30, 50)
    assert (found.first, found.second, found.difference) == (0.20, 0.45, pytest.approx(0.25))
    assert found.first_interval == statistics.wilson(20, 100)
    assert found.p_value == pytest.approx(stats.binomtest(5, 35).pvalue)
    # Of a mean of -1, 0 and 1: sqrt((0.35 - 0.25 ** 2) / 100) is its standard error.
    np.testing.assert_allclose(found.difference_interval, [0.25 - 0.105, 0.25 + 0.105], atol=0.015)
    assert found.detectable == pytest.approx(2.8 * math.sqrt(0.35 / 100))


def test_the_same_answers_differ_by_nothing():
    found = compare([True, False] * 10, [True, False] * 10)
    assert (found.difference, found.difference_interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_other_documents_are_refused():
    with pytest.raises(UserError, match="same documents for both models; found 2 and 1"):
        compare([True, False], [True])


def test_the_panel_tells_loss_from_noise():
    draw = np.random.default_rng(5)
    tokens = draw.integers(50, 200, 300)
    base_nll = tokens * draw.normal(2.0, 0.1, 300)
    unchanged = draw.random(2000) < 0.6
    hurt = unchanged & (draw.random(2000) > 0.06)
    flipped = unchanged ^ (draw.random(2000) < 0.02)
    rows = panel(
        [
            Measured("MMLU", "0-shot", unchanged, hurt, chance=0.25),
            Measured("ARC-C", "0-shot", unchanged, flipped),
            Measured(
                "text", "NLL per token", base_nll, base_nll + 0.05 * tokens, weights=tokens, higher_is_better=False
            ),
            Measured("guessing", "0-shot", draw.random(400) < 0.25, draw.random(400) < 0.25, chance=0.25),
        ]
    )
    assert [row.verdict for row in rows] == ["worse", "no change shown", "worse", "no change shown"]
    assert [row.near_chance for row in rows] == [False, None, None, True]
    assert rows[2].difference == pytest.approx(0.05) and rows[2].tuned == pytest.approx(rows[2].base + 0.05)
    assert rows[0].difference == pytest.approx(np.mean(hurt) - np.mean(unchanged))
    p = [stats.binomtest(0, int(np.sum(unchanged & ~hurt))).pvalue, rows[1].p_value]
    assert rows[0].p_value == pytest.approx(min(1, 4 * p[0])) and comparison.LEVEL == 0.05
