"""Lengths -> bins of a fixed capacity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plan(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Best-fit-decreasing bins: each an int64 array of indices into `lengths` `[n]` whose lengths sum to ≤ `capacity`.

    Every index is in exactly one bin. Raises ValueError for a length outside 1 to `capacity`.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()} do not fit bins of 1 to {capacity}")
    order = np.argsort(-lengths, kind="stable")
    bins: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # Bins by the space they have left.
    spaces = 0  # Bit s is set where a bin has space s left, so the best fit is the lowest bit from `length` on.
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            number = with_space[space].pop()
            spaces ^= 0 if with_space[space] else 1 << space
        else:
            space, number = capacity, len(bins)
            bins.append([])
        bins[number].append(row)
        with_space[space - length].append(number)
        spaces |= 1 << (space - length)
    return [np.array(members) for members in bins]


def fill(bins: Sequence[np.ndarray], lengths: np.ndarray, capacity: int) -> float:
    """Share of the bins' positions that rows occupy, 0 to 1."""
    used = sum(int(lengths[members].sum()) for members in bins)
    return used / (len(bins) * capacity) if bins else 0.0
