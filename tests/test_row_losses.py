"""What losses per row and long numbers give: categories by loss, token accuracy from counts, six tokens without a network."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy.stats import ttest_ind

from jaxft.analysis import hardness, token_accuracy
from jaxft.analysis.gsm8k import answers, arithmetic, categories
from jaxft.analysis.gsm8k.mistakes import mistake
from jaxft.errors import UserError


def rows(n: int = 400, hard: float = 1.4, seed: int = 0):
    """Losses that fall with length, and a class of long rows whose losses are `hard` times what their length lets expect."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(10, 200, n)
    poem = draw.random(n) < 0.2
    loss = 3.0 * tokens**-0.3 * np.exp(draw.normal(0, 0.1, n)) * np.where(poem, hard, 1.0)
    return (
        [{"creative": "yes" if p else "no", "length": "long" if t > 100 else "short"} for p, t in zip(poem, tokens)],
        loss * tokens,
        tokens,
    )


def test_a_category_with_losses_above_its_length_is_found_and_length_is_not_blamed():
    classes, nll, tokens = rows()
    table = {(row.dimension, row.name): row for row in hardness.by_loss(classes, nll, tokens, nll * 2)}
    poems = table["creative", "yes"]
    assert poems.flag == "hard" and poems.factor_interval[0] < 1.4 < poems.factor_interval[1] * 1.03
    assert ("creative", "no") not in table
    member = np.array([c["creative"] == "yes" for c in classes])
    assert poems.loss == pytest.approx(nll[member].sum() / tokens[member].sum()) and poems.base == pytest.approx(
        2 * poems.loss
    )
    plain = nll / tokens
    lengths = np.array([c["length"] == "long" for c in classes])
    assert (
        ttest_ind(np.log(plain[lengths]), np.log(plain[~lengths])).pvalue < 1e-10
    )  # without regard to length they differ
    assert table["length", "long"].flag == ""


def test_no_category_is_flagged_by_chance_more_often_than_promised():
    flagged = sum(any(row.flag for row in hardness.by_loss(*rows(hard=1.0, seed=seed))) for seed in range(40))
    assert flagged <= 6  # of 40 draws at 5 %: 6 or fewer in 98.6 %


def test_categories_by_loss_need_equal_columns_and_bear_equal_losses():
    with pytest.raises(UserError, match="same documents"):
        hardness.by_loss([{"a": "b"}], [1.0, 2.0], [1, 1])
    classes = [{"kind": "x" if i % 2 else "y"} for i in range(80)]
    table = hardness.by_loss(classes, [5.0] * 80, [5] * 80)
    assert {row.p_value for row in table} == {1.0} and {row.factor for row in table} == {1.0}


def test_token_accuracy_from_counts_is_that_from_tokens():
    draw = np.random.default_rng(0)
    start, end = ([(draw.random(n) < share).tolist() for n in range(1, 60)] for share in (0.3, 0.7))
    counts = [[sum(row) for row in side] for side in (start, end)]
    assert token_accuracy.of_counts(*counts, list(range(1, 60))) == token_accuracy.measure(start, end)
    with pytest.raises(UserError):
        token_accuracy.of_counts([1], [1, 2], [3, 4])


def test_numbers_of_thousands_of_digits_are_read():
    """A model that repeats itself writes them; Python reads and prints no more than 4,300 digits at once."""
    long = "9" * 5000
    assert arithmetic.value(long) == 10**5000 - 1 and arithmetic.value("1,234.50") == 1234.5
    assert answers.number(f"-{long}.5") == -(10**5000 - 1) - arithmetic.value(".5")
    assert (
        categories.classes(categories.problem(f"What is {long}?", f"<<1+1=2>>2\n#### {long}"))[
            "magnitude of the answer"
        ]
        == "10,000+"
    )
    wrong = [
        mistake("q", "#### 5", f"{said}#### {long}")
        for said in ("", "1 + 1 = 2\n", f"{long} + 1 = 3\n", "4 days and a week\n")
    ]
    assert [each.kind for each in wrong] == ["unchecked", "plan", "arithmetic", "unchecked"]
    for text in ("+", "x", "", "1-2"):
        with pytest.raises(ValueError):
            arithmetic.value(text)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("llama2", 0.411), ("llama3", 0.392)])
def test_counts_of_six_tokens_guess_two_of_five_next_tokens_of_gsm8k(shared, name, expected):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared / f"tokenizers/{name}/tokenizer.json"))
    train, test = (
        [
            [-1] * 5 + encoded.ids + [-2]
            for encoded in tokenizer.encode_batch(
                [
                    json.loads(line)["answer"]
                    for line in (shared / f"data/gsm8k_{split}.jsonl").read_text().splitlines()
                ],
                add_special_tokens=False,
            )
        ]
        for split in ("train", "test")
    )
    best = []
    for context in range(6):
        counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for row in train:
            for i in range(5, len(row)):
                counts[tuple(row[i - context : i])][row[i]] += 1
        best.append({key: found.most_common(1)[0][0] for key, found in counts.items()})

    def guess(row: list[int], i: int) -> int:
        contexts = (tuple(row[i - n : i]) for n in range(5, -1, -1))
        return next(best[len(key)][key] for key in contexts if key in best[len(key)])

    right = [guess(row, i) == row[i] for row in test for i in range(5, len(row))]
    assert np.mean(right) == pytest.approx(expected, abs=0.002)
    assert expected == pytest.approx(token_accuracy.NGRAM_ACCURACY, abs=0.015)
