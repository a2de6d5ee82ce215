"""Self-consistency: several sampled solutions per problem vote for the final answer (arXiv 2203.11171)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.analysis.gsm8k.answers import COT_VOTE, INVALID, Extractor, exact_match, number, same_number
from jaxft.analysis.statistics import wilson
from jaxft.errors import UserError


def majority(votes: Sequence[str]) -> str:
    """The most frequent vote; of equally frequent ones the first seen. Votes are strings, and [invalid] votes too."""
    return Counter(votes).most_common(1)[0][0]


def majority_number(votes: Sequence[str]) -> str:
    """As `majority`, but votes of one value ($18, 18.00) count together, and the first of them stands for it."""
    values = [vote if (value := number(vote)) is None else value for vote in votes]
    return votes[values.index(Counter(values).most_common(1)[0][0])]


@dataclass(frozen=True)
class Majority:
    """maj@k over all problems.

    `exact_match`: the majority of each problem's first k samples is the reference's answer as text (the harness's
    maj@k), with its 95 % Wilson interval. `equal_number`: the same with votes and comparison as numbers.
    `expected`: the mean of `exact_match` over draws of k of the problem's n samples, which does not hang on which
    samples came first; n = k has one draw. `first`: the share of problems whose first sample is right.
    `invalid`: the share of the k votes that are [invalid].
    """

    k: int
    samples: int
    problems: int
    exact_match: float
    exact_match_interval: tuple[float, float]
    equal_number: float
    expected: float
    first: float
    invalid: float
    right: tuple[bool, ...]


def majority_vote(
    samples: Sequence[Sequence[str]],
    references: Sequence[str],
    k: int,
    *,
    extract: Extractor = COT_VOTE,
    draws: int = 100,
    seed: int = 0,
) -> Majority:
    """Grades sampled outputs, at least k for every problem and as many for each, against `references`."""
    sizes = {len(of_problem) for of_problem in samples}
    if len(samples) != len(references) or len(sizes) != 1 or k < 1 or min(sizes) < k:
        raise UserError(
            f"maj@{k}: expected the same number of samples, at least {max(1, k)}, for each of {len(references)} problems; "
            f"found {len(samples)} problems with {sorted(sizes)} samples"
        )
    votes = [list(map(extract, of_problem)) for of_problem in samples]
    chosen = [majority(v[:k]) for v in votes]
    numeric = [majority_number(v[:k]) for v in votes]
    right = tuple(map(exact_match, chosen, references))
    n = len(samples)
    return Majority(
        k=k,
        samples=sizes.pop(),
        problems=n,
        exact_match=sum(right) / n,
        exact_match_interval=wilson(sum(right), n),
        equal_number=sum(map(same_number, numeric, references)) / n,
        expected=sum(_expected(v, r, k, draws, (seed, i)) for i, (v, r) in enumerate(zip(votes, references))) / n,
        first=sum(exact_match(v[0], r) for v, r in zip(votes, references)) / n,
        invalid=sum(v[:k].count(INVALID) for v in votes) / (n * k),
        right=right,
    )


def _expected(votes: list[str], reference: str, k: int, draws: int, seed: tuple[int, int]) -> float:
    """How often the majority of k of the votes is right; the draws hang on the problem's number, not on the others."""
    right = {vote: exact_match(vote, reference) for vote in set(votes)}
    if k == len(votes) or len(right) == 1:
        return float(right[majority(votes)])
    rng = np.random.default_rng(seed)
    picked = [sorted(rng.permutation(len(votes))[:k].tolist()) for _ in range(draws)]
    return sum(right[majority([votes[i] for i in indices])] for indices in picked) / draws
