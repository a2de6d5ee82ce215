"""Bins planned from lengths."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data import pack


def slow_plan(lengths, capacity):
    """Best fit, decreasing, by looking at every bin: the oracle for the number of bins and their loads."""
    loads = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, load in enumerate(loads) if load + length <= capacity]
        if fits:
            loads[max(fits, key=lambda i: loads[i])] += length
        else:
            loads.append(length)
    return sorted(loads)


@settings(deadline=None)
@given(st.integers(1, 80).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_every_row_is_in_one_bin_and_the_fit_is_the_best(case):
    capacity, lengths = case
    bins = pack.plan(np.array(lengths, np.int64), capacity)
    assert sorted(np.concatenate([[], *bins]).tolist()) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in members) for members in bins]
    assert sorted(loads) == slow_plan(lengths, capacity)
    assert pack.fill(bins, np.array(lengths), capacity) == (sum(loads) / (len(bins) * capacity) if bins else 0)


def test_a_length_that_fits_no_bin_is_refused():
    for lengths in ([3, 9], [0, 3]):
        with pytest.raises(ValueError, match="do not fit"):
            pack.plan(np.array(lengths), 8)


def test_52000_rows_are_planned_in_a_second_and_fill_nearly_everything():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.6, 52_000), 1, 1024).astype(np.int64)
    start = time.perf_counter()
    bins = pack.plan(lengths, 1024)
    assert time.perf_counter() - start < 1
    assert pack.fill(bins, lengths, 1024) > 0.99
