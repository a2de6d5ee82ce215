"""How losses moved, whether a run overfitted, and what a report prints of both."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from jaxft.analysis import overfitting, published, quantities, token_accuracy, trends
from jaxft.analysis.overfitting import Losses
from jaxft.errors import UserError


def test_the_slope_is_theil_and_sen_s():
    draw = np.random.default_rng(0)
    steps, loss = np.cumsum(draw.integers(1, 5, 60)), draw.normal(1.0, 0.1, 60)
    assert trends.trend(steps, loss).slope == pytest.approx(stats.theilslopes(loss, steps).slope)


def test_an_outlier_does_not_move_the_slope():
    steps = np.arange(50)
    loss = 2.0 - 0.01 * steps
    loss[40] = 30.0
    assert trends.trend(steps, loss).slope == pytest.approx(-0.01)


def test_the_interval_covers_the_slope_of_neighbours_alike():
    """Noise with a correlation of 0.5 between neighbours, which intervals for independent noise take for a trend."""
    draw, held, naive = np.random.default_rng(1), 0, 0
    for seed in range(60):
        noise = draw.normal(size=48)
        for i in range(1, 48):
            noise[i] += 0.5 * noise[i - 1]
        loss = 5.0 - 0.01 * np.arange(48) + 0.1 * noise
        low, high = trends.trend(np.arange(48), loss, seed=seed).slope_interval
        held += low <= -0.01 <= high
        other = stats.theilslopes(loss, np.arange(48))
        naive += other.low_slope <= -0.01 <= other.high_slope
    assert held >= 45 and held > naive  # of 60


def test_the_final_tenth_of_steps():
    steps = np.arange(10, 2001, 10)
    loss = 1.0 + np.exp(-steps / 200) + np.random.default_rng(2).normal(0, 0.02, 200)
    found = trends.final_steps(steps, loss)
    assert (found.first_step, found.last_step, found.points) == (1810, 2000, 20) and not found.falling
    loss[-20:] -= 0.002 * (steps[-20:] - 1800)
    falling = trends.final_steps(steps, loss)
    assert falling.falling and falling.slope == pytest.approx(-0.002, rel=0.2)
    assert falling.change == pytest.approx(falling.slope * 190 / loss[-20:].mean())
    assert trends.final_steps(steps[:70], loss[:70]) is None  # seven points


def test_long_series_are_averaged_first():
    steps = np.arange(5000)
    found = trends.trend(steps, 3.0 - 1e-4 * steps + np.random.default_rng(3).normal(0, 0.1, 5000))
    assert found.points == 5000 and found.slope == pytest.approx(-1e-4, rel=0.1)


def test_still_improving_needs_validation_too():
    steps = np.arange(1, 101)
    falling = trends.trend(steps + 40, 2.0 - 0.01 * steps)
    assert trends.still_improving(falling, [0, 40, 140], [3.0, 2.0, 1.9]) is True
    assert trends.still_improving(falling, [0, 40, 140], [3.0, 2.0, 2.1]) is False  # overfits while train loss falls
    late = trends.trend(steps + 100, 2.0 - 0.01 * steps)
    assert trends.still_improving(late, [0, 100, 200], [5.0, 2.0, 2.1]) is False  # the first is long before the window
    assert (
        trends.still_improving(None, [0, 100], [3.0, 2.0]) is None
        and trends.still_improving(late, [300], [1.0]) is None
    )


def test_the_logged_decrease_compares_named_windows():
    steps, loss = np.arange(1, 2001), np.linspace(2.0, 1.0, 2000)
    found = trends.of_log(steps, loss)
    assert found.before == pytest.approx(loss[:20].mean()) and found.after == pytest.approx(loss[-20:].mean())
    assert found.percent == pytest.approx(100 * (found.before - found.after) / found.before)
    assert "first 20 steps against the last 20" in found.definition and found.percent_interval is None
    weighted = trends.of_log([5, 10, 100], [4.0, 2.0, 1.0], [3, 1, 7])
    assert weighted.before == 3.5 and weighted.after == 1.0
    sparse = trends.of_log([50, 100, 1000], [4.0, 2.0, 1.0])
    assert (sparse.before, sparse.after) == (4.0, 1.0)
    assert "overlap" in trends.of_log([3, 6], [2.0, 1.0]).definition


def test_the_decrease_of_examples_is_token_weighted_and_paired():
    draw = np.random.default_rng(4)
    tokens = draw.integers(5, 100, 300)
    before = tokens * draw.normal(2.0, 0.5, 300)
    after = 0.7 * before
    found = trends.of_examples(before, after, tokens, "validation")
    assert found.before == pytest.approx(before.sum() / tokens.sum()) and found.percent == pytest.approx(30.0)
    assert found.percent_interval == pytest.approx((30.0, 30.0))  # each fell by as much: pairing leaves no noise
    noisy = trends.of_examples(before, after + draw.normal(0, 40, 300), tokens, "validation")
    assert noisy.percent_interval[0] < 30 < noisy.percent_interval[1] and noisy.p_above_zero < 0.001
    with pytest.raises(UserError, match="same examples"):
        trends.of_examples(before, after[:-1], tokens, "validation")


def test_a_staircase_at_epoch_ends_is_seen():
    steps = np.arange(1, 301)
    noise = np.random.default_rng(5).normal(0, 0.03, 300)
    smooth = 2.0 - 0.001 * steps + noise
    stairs = smooth - 0.3 * (steps > 100) - 0.3 * (steps > 200)
    assert not any(drop.sudden for drop in trends.epoch_drops(steps, smooth, [100, 200, 300]))
    drops = trends.epoch_drops(steps, stairs, [100, 200, 300])
    assert [(drop.step, drop.sudden) for drop in drops] == [(100, True), (200, True)]
    assert drops[0].nats == pytest.approx(0.31, abs=0.04)
    assert trends.epoch_drops([1, 2], [1.0, 1.0], [1]) == []


def test_bits_per_byte_count_utf_8():
    assert trends.bits_per_byte(8 * math.log(2), ["é", "ab"]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("steps", "loss"), [([], []), ([1, 1], [2.0, 1.0]), ([1, 2], [math.nan, 1.0]), ([1], [1.0, 2.0])]
)
def test_a_series_that_is_none_is_refused(steps, loss):
    with pytest.raises(UserError, match="rising steps"):
        trends.of_log(steps, loss)


# Falls of train and validation loss, in percent, that reports of five fine-tuning runs printed.
REPORTED = {"OpenELM 3B": (69, 24, True), "Qwen2 1.5B": (82, 23, True), "Gemma 2B": (59, 19, True),
            "Llama 3.2 3B": (20, 19, False), "Gemma 2 9B": (22, 27, False)}  # fmt: skip


@pytest.mark.parametrize(("train", "held", "raised"), REPORTED.values(), ids=REPORTED)
def test_the_gap_rule_on_reported_runs(train, held, raised):
    assert overfitting.gap(1.0, 1 - train / 100, 1.0, 1 - held / 100).raised is raised


def losses(start: float, best: float, end: float, noise: float = 0.05, seed: int = 0) -> Losses:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(20, 80, 300)
    hardness = draw.normal(1.0, 0.3, 300)
    around = draw.normal(0, noise, (3, 300))
    around -= np.average(around, axis=1, weights=tokens)[:, None]  # the levels are what the mean over tokens is
    hardness /= np.average(hardness, weights=tokens)
    return Losses(*(tokens * (level * hardness + n) for level, n in zip((start, best, end), around)), tokens)


def test_a_run_whose_validation_loss_rises_overfitted():
    found = overfitting.verdict(losses(2.0, 1.0, 1.05), losses(2.0, 1.0, 0.95, seed=1), ([True] * 50, [True] * 50))
    assert found.flag is True and [sign.raised for sign in found.signs] == [True, False, False]
    assert found.signs[0].figures.startswith("+0.0")


def test_a_rise_within_the_noise_of_examples_is_none():
    found = overfitting.verdict(losses(2.0, 1.0, 1.0005, noise=0.2), losses(2.0, 1.0, 0.95, seed=1), ([True], [True]))
    assert found.flag is False and found.signs[0].raised is False


def test_memorising_shows_in_the_gap_and_in_exact_match():
    remembered = [True] * 180 + [False] * 20, [True] * 100 + [False] * 100
    found = overfitting.verdict(losses(2.0, 1.5, 1.5), losses(2.0, 1.0, 0.5, seed=1), remembered)
    assert [sign.raised for sign in found.signs] == [False, True, True] and found.flag is True
    few = [True] * 9 + [False], [True] * 7 + [False] * 3
    assert overfitting.verdict(exact=few).signs[2].raised is False  # 20 points of ten answers are noise


def test_what_was_not_measured_gives_no_verdict():
    found = overfitting.verdict(losses(2.0, 1.0, 1.0))
    assert found.flag is None and [sign.figures for sign in found.signs][1:] == ["not measured"] * 2
    same = losses(2.0, 1.0, 1.0)
    assert (
        overfitting.verdict(Losses(same.start, same.end, same.end, same.tokens)).signs[0].figures
        == "the last step is the best one"
    )
    assert "0.15 nats" in found.rule and "30 percentage points" in found.rule


def test_token_accuracy_from_start_to_end():
    start = [[True, False, False], [False] * 5, []]
    end = [[True] * 3, [True, False, False, False, False], []]
    found = token_accuracy.measure(start, end)
    assert (found.rows, found.tokens, found.start, found.end) == (2, 8, 1 / 8, 4 / 8)
    assert found.change == pytest.approx(3 / 8) and found.change_interval[0] <= found.change <= found.change_interval[1]
    assert (found.rows_end, found.all_right_start, found.all_right_end) == (pytest.approx((1 + 1 / 5) / 2), 0.0, 0.5)
    with pytest.raises(UserError, match="same rows and tokens"):
        token_accuracy.measure(start, end[:2])


def test_tokens_of_annotations_and_final_answers_are_told_apart():
    answer = "4+4=<<4+4=8>>8\n#### 8"
    offsets = [(i, i + 1) for i in range(len(answer))]
    kept = token_accuracy.masks(answer, offsets)
    assert "".join(c for c, k in zip(answer, kept["no annotations"]) if k) == "4+4=8\n#### 8"
    assert [i for i, k in enumerate(kept["final answer"]) if k] == [len(answer) - 1]
    # A token that crosses the edge of an annotation belongs to it.
    assert token_accuracy.masks(answer, [(3, 6), (0, 3)])["no annotations"] == [False, True]
    without = token_accuracy.masks("no answer", [(0, 2)])
    assert without == {"no annotations": [True], "final answer": [False]}
    counted = [kept["final answer"]]
    assert token_accuracy.measure([[False] * len(answer)], [[True] * len(answer)], counted).tokens == 1


def lines(steps: int = 200):
    train = [
        {"step": s, "loss": 1.0 + math.exp(-s / 40), "num_tokens": 100 * s, "learning_rate": 1e-4}
        for s in range(1, steps + 1)
    ]
    evaluations = [
        {"step": s, "eval_loss": loss, "eval_mean_token_accuracy": right}
        for s, loss, right in ((0, 2.0, 0.4), (100, 1.4, 0.6), (200, 1.5, 0.65))
    ]
    return train, evaluations


def test_quantities_of_a_run_s_lines():
    train, evaluations = lines()
    told = quantities.of_lines(train, evaluations, 100)
    json.dumps(told, allow_nan=False)
    assert all(part["definition"] for part in told.values())
    assert told[quantities.VALIDATION]["value"] == pytest.approx(30.0)
    assert told[quantities.VALIDATION]["to_end"] == pytest.approx(25.0)
    first, last = (np.mean([line["loss"] for line in part]) for part in (train[:10], train[-10:]))
    assert told[quantities.TRAIN]["value"] == pytest.approx(100 * (first - last) / first)
    final = told[quantities.FINAL]
    assert final["value"] < 0 and final["still_improving"] is False and final["learning_rate_at_end"] == 1e-4
    accuracy = told[quantities.ACCURACY]
    assert [accuracy[key] for key in ("start", "best", "end")] == [0.4, 0.6, 0.65] and "not task accuracy" in accuracy[
        "definition"
    ]


def test_quantities_of_an_unfinished_run_are_unknown():
    told = quantities.of_lines([], [], None)
    assert all(part["value"] is None and part["why"] for part in told.values())
    train, evaluations = lines(5)
    part = quantities.of_lines(train, evaluations[1:], 100)
    assert part[quantities.TRAIN]["value"] is not None and part[quantities.VALIDATION]["value"] is None
    assert part[quantities.FINAL]["value"] is None and part[quantities.ACCURACY]["value"] is None


def test_published_scores_have_protocols_and_sources():
    for score in published.SCORES:
        assert score.protocol and score.source and 0 < score.value < 100 and score.benchmark in published.BENCHMARKS
        assert score.base is None or published.of_model(score.base)
    keys = [(s.model, s.benchmark, s.protocol, s.source) for s in published.SCORES]
    assert len(set(keys)) == len(keys)
    bases = {"google/gemma-2-9b", "google/gemma-2b", "meta-llama/Llama-3.2-3B", "Qwen/Qwen2-1.5B"}
    assert all(published.of_model(base, "GSM8K") for base in bases)
    assert {s.value for s in published.of_model("Meta-Llama/llama-3.2-3b", "GSM8K")} == {28.35, 29.87}
    assert published.of_model("apple/OpenELM-3B", "GSM8K") == []
    assert published.unpublished("apple/openelm-3b", "GSM8K").startswith("none published")
    assert published.unpublished("google/gemma-2b", "GSM8K") is None
    tuned = {s.benchmark: s.value for s in published.of_base("google/gemma-2b") if s.model == "mlabonne/Gemmalpaca-2B"}
    base = {s.benchmark: s.value for s in published.of_model("google/gemma-2b") if "Leaderboard" in s.source}
    # The averages that the leaderboard itself printed of the six.
    assert np.mean(list(tuned.values())) == pytest.approx(45.65, abs=0.006)
    assert np.mean(list(base.values())) == pytest.approx(46.37, abs=0.1)
