"""Batches: what they hold, in which order, and that a step number is all their state."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.config import Mesh
from jaxft.data.chat import Example
from jaxft.data.loader import LENGTH_MULTIPLE, LENGTHS, Loader
from jaxft.errors import UserError
from jaxft.learn.step import place_batch
from jaxft.parallel.mesh import make_mesh


def examples(lengths):
    """Rows whose first token is their number; the rest count up from 1000, the later half trained."""
    made = []
    for i, length in enumerate(lengths):
        tokens = np.arange(1000, 1000 + length, dtype=np.int32)
        tokens[0] = i + 1
        made.append(Example(tokens, np.arange(length) >= max(1, length // 2), f"rows:{i + 1}"))
    return made


def some(count=300, seed=0):
    return examples(np.random.default_rng(seed).integers(2, 33, count))


def segments(batch):
    """(tokens, targets, weights, positions) of each packed row, in order."""
    for b in range(len(batch.tokens)):
        for segment in range(1, batch.segments[b].max() + 1):
            at = batch.segments[b] == segment
            yield tuple(part[b][at] for part in (batch.tokens, batch.targets, batch.weights, batch.positions))


def same(one, two):
    return all(np.array_equal(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(one))


OPTIONS = [(packing, shuffle) for packing in (True, False) for shuffle in (True, False)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(2, 17), min_size=1, max_size=40), st.integers(1, 5), st.sampled_from(OPTIONS))
def test_an_epoch_holds_every_row_once_and_each_as_it_is(lengths, batch_size, options):
    made, (packing, shuffle) = examples(lengths), options
    loader = Loader(made, batch_size=batch_size, length=16, packing=packing, shuffle=shuffle)
    for epoch in range(2):
        first = sum(loader.steps_in_epoch(e) for e in range(epoch))
        seen = []
        for step in range(loader.steps_in_epoch(epoch)):
            batch = loader.batch_at(first + step)
            assert batch.tokens.shape == (batch_size, 16)
            for tokens, targets, weights, positions in segments(batch):
                example = made[tokens[0] - 1]
                seen.append(int(tokens[0]))
                np.testing.assert_array_equal(tokens, example.tokens[:-1])
                np.testing.assert_array_equal(targets, example.tokens[1:])
                np.testing.assert_array_equal(weights, example.loss_mask[1:])
                np.testing.assert_array_equal(positions, np.arange(len(tokens)))
        assert sorted(seen) == list(range(1, len(lengths) + 1))


def test_padding_is_segment_zero_without_weight():
    batch = Loader(examples([5]), batch_size=2, length=8, seed=1).batch_at(0)
    np.testing.assert_array_equal(batch.segments, [[1] * 4 + [0] * 4, [0] * 8])
    np.testing.assert_array_equal(batch.weights, [[0, 1, 1, 1] + [0] * 4, [0] * 8])
    for part in (batch.tokens, batch.targets, batch.positions):
        assert part.dtype == np.int32 and not part[batch.segments == 0].any()
    assert batch.segments.dtype == np.int32 and batch.weights.dtype == np.float32


def test_segments_are_contiguous_and_count_from_one():
    batch = Loader(some(), batch_size=4, length=64).batch_at(0)
    for row in batch.segments:
        real = row[row > 0]
        assert real.tolist() == sorted(real) and set(real) == set(range(1, real.max() + 1))
        assert not row[len(real) :].any()


def test_a_batch_does_not_depend_on_what_was_asked_before():
    steps = [0, 1, 37, 12, 90, 3, 37]
    loader = Loader(some(), batch_size=4, length=64)
    for step in steps:
        assert same(loader.batch_at(step), Loader(some(), batch_size=4, length=64).batch_at(step))


def test_seed_and_epoch_change_the_order_and_no_shuffle_keeps_it():
    made = some()
    one, two = (Loader(made, batch_size=4, length=64, seed=seed) for seed in (0, 1))
    assert not same(one.batch_at(0), two.batch_at(0))
    assert not same(one.batch_at(0), one.batch_at(one.steps_in_epoch(0)))
    still = Loader(made, batch_size=4, length=64, shuffle=False, packing=False)
    assert same(still.batch_at(0), still.batch_at(still.steps_in_epoch(0)))
    assert still.batch_at(0).tokens[:, 0].tolist() == [1, 2, 3, 4]


def test_the_shuffled_order_is_the_same_on_every_machine_and_numpy():
    loader = Loader(examples([2] * 10), batch_size=10, length=1, seed=3)
    assert loader.batch_at(0).tokens[:, 0].tolist() == [1, 5, 4, 6, 8, 10, 3, 7, 9, 2]


def test_steps_are_located_by_arithmetic_over_epochs():
    loader = Loader(some(), batch_size=4, length=64)
    walked = [(epoch, step) for epoch in range(3) for step in range(loader.steps_in_epoch(epoch))]
    assert [loader.locate(step) for step in range(len(walked))] == walked
    assert loader.total_steps(3) == len(walked)


def test_a_fractional_epoch_takes_its_share_of_steps_rounded_up():
    loader = Loader(examples([9] * 60), batch_size=2, length=8, packing=False)
    assert [loader.total_steps(e) for e in (0.1, 0.11, 0.5, 1, 1.1, 2.5, 1e-6)] == [3, 4, 15, 30, 33, 75, 1]


def test_packed_rows_fill_the_sequences_and_separate_rows_do_not():
    made = some(3000)
    assert Loader(made, batch_size=8, length=128).fill > 0.98
    assert Loader(made, batch_size=8, length=128, packing=False).fill < 0.3


def test_evaluation_is_one_pass_over_all_rows_whatever_the_seed():
    made = some()
    one, two = (Loader(made, batch_size=4, length=64, seed=seed) for seed in (0, 1))
    passes = [list(loader.evaluation_batches()) for loader in (one, two)]
    assert all(same(a, b) for a, b in zip(*passes, strict=True))
    assert sorted(int(tokens[0]) for batch in passes[0] for tokens, *_ in segments(batch)) == list(range(1, 301))
    assert sum(b.weights.sum() for b in passes[0]) == sum(e.loss_mask.sum() for e in made)
    apart = Loader(made, batch_size=4, length=64, packing=False)
    assert len(list(apart.evaluation_batches())) == math.ceil(300 / 4)


def test_the_fingerprint_changes_with_everything_that_decides_a_batch():
    made, settings = some(20), {"batch_size": 4, "length": 64, "packing": True, "shuffle": True, "seed": 0}
    other_mask = dataclasses.replace(made[0], loss_mask=~made[0].loss_mask)
    other_token = dataclasses.replace(made[0], tokens=made[0].tokens + 1)
    changed = [{"batch_size": 8}, {"length": 65}, {"packing": False}, {"shuffle": False}, {"seed": 1}]
    prints = [Loader(made, **(settings | change)).fingerprint for change in changed]
    prints += [Loader(rows, **settings).fingerprint for rows in ([other_mask, *made[1:]], [other_token, *made[1:]])]
    prints += [Loader(rows, **settings).fingerprint for rows in (made, made[::-1], made[1:])]
    assert len(set(prints)) == 10 and Loader(some(20), **settings).fingerprint == prints[7]


def test_no_examples_and_rows_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="no examples"):
        Loader([], batch_size=1, length=8)
    for lengths in ([4, 10], [4, 1]):
        with pytest.raises(UserError, match=r"rows:2: row of (10|1) tokens; sequences of 8 .* take rows of 2 to 9"):
            Loader(examples(lengths), batch_size=1, length=8)


def apart(lengths, batch_size=8, **options):
    """A loader of rows that take sequences of their own."""
    length = -(-(max(lengths) - 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return Loader(examples(lengths), batch_size=batch_size, length=length, packing=False, **options)


def numbers(batch):
    """The rows' numbers, in order."""
    return [int(tokens[0]) for tokens, *_ in segments(batch)]


LONG = np.random.default_rng(0).lognormal(5, 0.5, 501).astype(int).clip(2, 700).tolist()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(2, 700), min_size=1, max_size=60), st.integers(1, 5), st.booleans(), st.integers(0, 9))
def test_unpacked_rows_are_padded_to_one_of_four_lengths_each_once_an_epoch(lengths, batch_size, shuffle, seed):
    loader, shapes = apart(lengths, batch_size, shuffle=shuffle, seed=seed), set()
    for epoch in range(2):
        batches = [loader.batch_at(epoch * loader.steps_in_epoch(0) + i) for i in range(loader.steps_in_epoch(epoch))]
        assert sorted(itertools.chain(*map(numbers, batches))) == list(range(1, len(lengths) + 1))
        for batch in batches:
            shapes.add(batch.tokens.shape)
            longest = max(len(tokens) for tokens, *_ in segments(batch))
            assert batch.tokens.shape[1] == min(n for n in loader.lengths_padded if n >= longest)
            assert all((batch.tokens[:, :1] == number).any() for number in numbers(batch))
            assert batch.segments.max() == 1
    assert len(shapes) <= len(loader.lengths_padded) <= LENGTHS
    assert all(rows == batch_size and n % LENGTH_MULTIPLE == 0 and n <= loader.length for rows, n in shapes)


def test_the_longest_of_the_lengths_may_be_no_multiple():
    made = examples([100, 130, 230, 231])
    loader = Loader(made, batch_size=1, length=230, packing=False)
    assert loader.lengths_padded[-1] == 230 and all(n % LENGTH_MULTIPLE == 0 for n in loader.lengths_padded[:-1])


def test_unpacked_batches_are_the_same_in_any_order_and_after_resuming():
    loader = apart(LONG, seed=5)
    per_epoch = loader.steps_in_epoch(0)
    expected = [apart(LONG, seed=5).batch_at(step) for step in range(3 * per_epoch)]
    for step in np.random.default_rng(1).permutation(len(expected)):
        assert same(loader.batch_at(int(step)), expected[step])
    list(loader.evaluation_batches())
    resumed = apart(LONG, seed=5)
    assert all(same(resumed.batch_at(step), expected[step]) for step in range(per_epoch + 7, len(expected)))
    assert loader.locate(per_epoch + 7) == (1, 7) and loader.total_steps(3) == len(expected)
    assert not same(loader.batch_at(0), apart(LONG, seed=6).batch_at(0))
    orders = [[numbers(batch) for batch in expected[i * per_epoch : (i + 1) * per_epoch]] for i in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_unpacked_batches_of_each_length_come_in_no_order_and_the_partial_one_last():
    loader = apart(LONG)
    widths = [loader.batch_at(step).tokens.shape[1] for step in range(loader.steps_in_epoch(0))]
    assert widths != sorted(widths) and len(set(widths)) == LENGTHS
    assert [len(numbers(loader.batch_at(step))) for step in range(len(widths))] == [8] * 62 + [5]


def test_four_lengths_fill_better_than_one():
    loader = apart(LONG)
    real, steps = sum(LONG) - len(LONG), loader.steps_in_epoch(0)
    assert loader.fill == real / sum(loader.batch_at(step).tokens.size for step in range(steps))
    assert loader.fill > 1.5 * real / (steps * 8 * loader.length)


def test_evaluation_of_unpacked_rows_is_one_pass_in_the_same_order_whatever_the_seed():
    loader = apart(LONG, 7)
    passes = [list(loader.evaluation_batches()), list(apart(LONG, 7, seed=3).evaluation_batches())]
    assert all(same(a, b) for a, b in zip(*passes, strict=True)) and len(passes[0]) == math.ceil(len(LONG) / 7)
    assert sorted(itertools.chain(*map(numbers, passes[0]))) == list(range(1, len(LONG) + 1))
    assert sum(b.weights.sum() for b in passes[0]) == sum(e.loss_mask.sum() for e in loader.examples)
    assert len({batch.tokens.shape for batch in passes[0]}) <= LENGTHS


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_the_rows_that_hosts_take_of_a_batch_are_together_the_batch(packing, hosts):
    """Each host has a loader of its own; a device gets the rows of its place, whichever host makes them."""
    mesh = make_mesh(Mesh(data=hosts, fsdp=-1))
    for step in (0, 3, 70):
        whole = Loader(examples(LONG), batch_size=16, length=704, packing=packing).batch_at(step)
        slices = []
        for host in range(hosts):
            batch = Loader(examples(LONG), batch_size=16, length=704, packing=packing).batch_at(step)
            rows = slice(host * 16 // hosts, (host + 1) * 16 // hosts)
            slices.append({f.name: getattr(batch, f.name)[rows] for f in dataclasses.fields(batch)})
        for name, placed in place_batch(whole, mesh).items():
            expected = getattr(whole, name)
            np.testing.assert_array_equal(np.concatenate([part[name] for part in slices]), expected)
            shards = sorted(placed.addressable_shards, key=lambda shard: shard.device.id)
            np.testing.assert_array_equal(np.concatenate([shard.data for shard in shards]), expected)


@pytest.mark.parametrize("packing", [True, False])
def test_a_host_fills_the_rows_it_is_asked_for_alone_and_knows_the_tokens_of_all(packing):
    loader = Loader(examples(LONG), batch_size=8, length=704, packing=packing)
    for step in (0, 3, 70):
        whole, mine = loader.batch_at(step), loader.batch_at(step, rows={2, 5})
        assert loader.tokens_at(step) == (whole.segments > 0).sum()
        for field in dataclasses.fields(whole):
            ours, theirs = getattr(mine, field.name), getattr(whole, field.name)
            np.testing.assert_array_equal(ours[[2, 5]], theirs[[2, 5]])
            assert ours.shape == theirs.shape and not ours[[0, 1, 3, 4, 6, 7]].any()
    passes = zip(loader.evaluation_batches(), loader.evaluation_batches(rows=range(4)), strict=True)
    assert all(
        np.array_equal(ours.tokens[:4], whole.tokens[:4]) and not ours.tokens[4:].any() for whole, ours in passes
    )
