"""Which categories are hard, which examples stand out, and what evaluation texts share with training texts."""

import json
import math
import time

import numpy as np
import pytest

from jaxft.analysis import contamination, hardness, instructions, outliers
from jaxft.analysis.gsm8k import categories
from jaxft.analysis.statistics import wilson
from jaxft.errors import UserError


def problems(n: int, seed: int = 0):
    """Made-up classes, where many steps and long questions go together, and answers that only the steps make wrong."""
    draw = np.random.default_rng(seed)
    steps = draw.integers(1, 6, n)
    long = draw.random(n) < np.where(steps == 5, 0.8, 0.2)
    classes = [
        {"steps": str(s), "length": "long" if w else "short", "percent": "yes" if p else "no"}
        for s, w, p in zip(steps, long, draw.random(n) < 0.2)
    ]
    return classes, draw.random(n) > np.where(steps == 5, 0.6, 0.2), draw.random(n) > 0.9


def test_a_hard_category_is_found_and_its_companion_is_not_blamed():
    classes, tuned, base = problems(1300)
    table = hardness.table(classes, tuned, base)
    assert (table[0].dimension, table[0].name, table[0].flag) == ("steps", "5", "hard")
    assert table[0].p_value < 1e-10 and 3 < table[0].odds_ratio < 12  # odds of 1.5 against 0.25
    assert [row.flag for row in table if row.dimension != "steps"] == [""] * 3
    rows = {(row.dimension, row.name): row for row in table}
    long = rows["length", "long"]
    plain = 1 - np.mean([t for t, c in zip(tuned, classes) if c["length"] == "long"])
    assert plain > 1.15 * (1 - np.mean(tuned)) and long.p_value > 0.05  # taken alone, long questions look harder
    of_five = [i for i, c in enumerate(classes) if c["steps"] == "5"]
    right = int(np.sum(tuned[of_five]))
    assert (table[0].documents, table[0].tuned) == (len(of_five), right / len(of_five))
    assert table[0].tuned_interval == wilson(right, len(of_five))
    assert table[0].difference == pytest.approx(np.mean(tuned[of_five]) - np.mean(base[of_five]))
    assert table[0].share_of_errors == pytest.approx(np.sum(~tuned[of_five]) / np.sum(~tuned))
    assert ("percent", "no") not in rows and ("percent", "yes") in rows


def test_chance_alone_flags_few_categories():
    """With no effect at all, a table has any flag in about 5 % of draws; 40 draws of 1 in 20 give 6 or fewer (98.6 %)."""
    flagged = 0
    for seed in range(40):
        classes, _, _ = problems(400, seed)
        flagged += any(row.flag for row in hardness.table(classes, np.random.default_rng(seed).random(400) > 0.4))
    assert flagged <= 6


def test_one_class_s_test_is_the_textbook_s():
    """With a single dimension nothing is held fixed: the odds ratio and the G test of a two-by-two table."""
    from scipy.stats import chi2_contingency

    classes = [{"kind": "yes"}] * 200 + [{"kind": "no"}] * 300
    tuned = [True] * 120 + [False] * 80 + [True] * 240 + [False] * 60
    (row,) = hardness.table(classes, tuned)
    expected = chi2_contingency([[120, 80], [240, 60]], correction=False, lambda_="log-likelihood")
    assert row.odds_ratio == pytest.approx((80 / 120) / (60 / 240), rel=1e-3)  # a ridge of 0.001
    assert row.p_value == pytest.approx(expected.pvalue, rel=1e-2)


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_gets_all_right_or_all_wrong_has_no_hard_category(right):
    classes, _, _ = problems(200)
    table = hardness.table(classes, [right] * 200)
    assert table and not any(row.flag for row in table) and all(math.isfinite(row.odds_ratio) for row in table)


def test_small_categories_are_hidden_and_losses_are_token_weighted():
    classes = [{"kind": "rare"}] * 29 + [{"kind": "common"}] * 71
    assert hardness.table(classes, [True] * 100) == []
    nll, tokens = np.arange(100.0), np.arange(1, 101)
    rows = {row.name: row for row in hardness.table(classes, [True, False] * 50, nll=nll, tokens=tokens, least=10)}
    assert rows["rare"].loss == pytest.approx(nll[:29].sum() / tokens[:29].sum())
    with pytest.raises(UserError, match="same documents in every column"):
        hardness.table(classes, [True])


def test_examples_are_evenly_spaced_errors_of_the_category():
    classes, tuned, _ = problems(1300)
    hard = hardness.table(classes, tuned)[0]
    wrong = [i for i, (c, right) in enumerate(zip(classes, tuned)) if c["steps"] == "5" and not right]
    shown = hardness.examples(hard, classes, tuned)
    assert len(shown) == 3 and shown == [wrong[len(wrong) // 6], wrong[len(wrong) // 2], wrong[5 * len(wrong) // 6]]


def test_the_table_of_the_real_test_set_takes_a_second(shared):
    rows = list(map(json.loads, (shared / "data" / "gsm8k_test.jsonl").read_text("utf-8").splitlines()))
    classes = categories.of_rows(rows)
    draw = np.random.default_rng(0)
    chance = [0.8 - 0.3 * (c["unit conversion"] == "yes") for c in classes]
    began = time.process_time()
    table = hardness.table(classes, draw.random(len(rows)) < chance, draw.random(len(rows)) < 0.1)
    assert time.process_time() - began < 5  # 0.5 s measured
    assert (table[0].dimension, table[0].flag) == ("unit conversion", "hard")


TRAIN = [
    "The quick brown fox jumps over the lazy dog and then it runs far away from here.",
    "A train travels 360 miles in 3 hours. At the same rate, how long does it take for 240 miles?",
    "Tom has 5 apples.",
]


def test_shared_texts_and_runs_are_counted():
    held = [
        "tom HAS 5 apples!",  # a duplicate but for case and punctuation
        "Tom has 1,500 apples",  # the same but for the number
        "Once the lazy dog and then it runs far away, all was well.",  # 9 words in a row
        "A plane travels 1200 miles in 3 hours. At the same rate, how long does it take for 2000 miles?",
        "Nothing in common.",
    ]
    found = contamination.check(TRAIN, held)
    offenders = {s.kind: [(o.evaluation, o.train) for o in s.offenders] for s in found.sharings}
    assert offenders == {
        "duplicate": [(0, 2)],
        "masked duplicate": [(0, 2), (1, 2)],
        "13-gram": [(3, 1)],
        "8-gram": [(2, 0), (3, 1)],
        "near": [(0, 2), (1, 2), (3, 1)],
    }
    eight = found.sharings[3]
    assert eight.offenders[0].shared == "the lazy dog and then it runs far"
    assert (eight.shared, eight.share, eight.share_interval) == (2, 0.4, wilson(2, 5))
    assert (found.nearest_similarity, found.nearest) == (1.0, (0, 2))
    told = contamination.with_and_without(found, [True, True, False, False, True])
    assert [told[3][part]["exact_match"] for part in ("all", "shared", "others")] == [0.6, 0.0, 1.0]
    assert told[2]["shared"]["documents"] == 1


def test_runs_and_similarities_agree_with_sets():
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(list("abc"), draw.integers(0, 30))) for _ in range(120)]
    train, held = texts[:80], texts[80:]
    found = contamination.check(train, held, (5,))

    def grams(text, n):
        words = text.split()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    shared = [i for i, h in enumerate(held) if any(grams(h, 5) & grams(t, 5) for t in train)]
    assert [o.evaluation for o in found.sharings[2].offenders] == shared and 0 < len(shared) < len(held)
    best = [
        max((len(a & b) / len(a | b) if a | b else 0) for a in [grams(h, 3)] for b in [grams(t, 3) for t in train])
        for h in held
    ]
    near = [i for i, similarity in enumerate(best) if similarity >= 0.6]
    assert [o.evaluation for o in found.sharings[3].offenders] == near
    assert found.nearest_similarity == pytest.approx(max(best))


def test_nothing_is_shared_with_nothing():
    for train, held in ((TRAIN, []), ([], TRAIN), ([""], [""])):
        found = contamination.check(train, held)
        assert [s.shared for s in found.sharings] == [0] * 5 and found.nearest is None
        assert contamination.with_and_without(found, [True] * len(held))[0]["shared"]["exact_match"] is None


def test_gsm8k_s_test_set_shares_little_with_its_training_set(shared):
    """Figures counted independently: no duplicates, 8, 10 and 13 words in a row, two near neighbours."""
    train, test = (
        [
            json.loads(line)["question"]
            for line in (shared / "data" / f"gsm8k_{part}.jsonl").read_text("utf-8").splitlines()
        ]
        for part in ("train", "test")
    )
    began = time.process_time()
    found = contamination.check(train, test, (13, 10, 8))
    assert time.process_time() - began < 10  # 0.9 s measured
    assert {s.kind: s.shared for s in found.sharings} == {
        "duplicate": 0, "masked duplicate": 0, "13-gram": 3, "10-gram": 9, "8-gram": 80, "near": 2,
    }  # fmt: skip
    assert found.nearest_similarity == pytest.approx(0.84)
    assert test[found.nearest[0]].startswith("A plane travels") and train[found.nearest[1]].startswith(
        "A train travels"
    )


def test_a_loss_is_an_outlier_beside_its_like():
    draw = np.random.default_rng(0)
    tokens = draw.integers(50, 400, 500)
    category = draw.choice(["poem", "sum"], 500)
    per_token = np.where(category == "poem", 3.0, 0.5) * (20 / tokens) ** 0.3 * np.exp(draw.normal(0, 0.1, 500))
    usual = int(np.flatnonzero(category == "sum")[7])
    per_token[usual] = 3.0  # usual for a poem of some length, not for a sum
    faults = [("duplicate",) if i == usual else () for i in range(500)]
    found = outliers.excess(per_token * tokens, tokens, category, faults)
    assert found[0].document == usual and found[0].outlier and found[0].faults == ("duplicate",)
    assert sum(e.outlier for e in found) <= 3
    assert found[0].loss == pytest.approx(3.0) and found[0].expected < 0.9
    blind = next(e for e in outliers.excess(per_token * tokens, tokens) if e.document == usual)
    assert blind.z < found[0].z  # without categories it hides among the poems
    with pytest.raises(UserError, match="at least one token"):
        outliers.excess([1.0, 2.0], [3, 0])


def test_examples_that_training_hurt_come_first():
    draw = np.random.default_rng(1)
    tokens = draw.integers(10, 50, 200)
    before = draw.normal(2.0, 0.1, 200) * tokens
    after = before - draw.normal(0.8, 0.1, 200) * tokens
    after[11] = before[11] + 0.5 * tokens[11]
    first, second, *_ = outliers.changes(before, after, tokens)
    assert (first.document, first.hurt, first.harmful, first.improvement) == (11, True, True, pytest.approx(-0.5))
    assert not second.hurt and not second.harmful


def test_an_instruction_that_does_not_help_is_a_mismatch():
    found = outliers.difficulty([5.0, 30.0, 3.0], [10.0, 20.0, 3.0])
    assert [(d.document, d.ratio, d.mismatch) for d in found] == [(1, 1.5, True), (2, 1.0, False), (0, 0.5, False)]


def test_examples_are_mapped_over_epochs():
    nll = [[9.0, 1.0, 9.0, 1.0, 9.0, 1.0], [9.0, 0.9, 1.0, 0.9, 9.0, 0.9], [9.0, 0.8, 9.0, 0.8, 8.9, 0.8]]
    right = [[0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 0, 1]]
    found = outliers.cartography(nll, [10] * 6, right)
    regions = [course.region for course in found]
    assert regions[2] == "ambiguous" and regions[0] == "hard to learn" and regions[1] == "easy to learn"
    assert [course.forgotten for course in found] == [0, 0, 1, 1, 0, 0]
    assert found[1].confidence == pytest.approx(np.mean(np.exp([-0.1, -0.09, -0.08])))
    with pytest.raises(UserError, match="at least two epochs"):
        outliers.cartography([[1.0]], [3])


def test_rows_with_faults_are_told_from_hard_ones():
    rows = [
        {"prompt": "Say hi", "answer": "Hi"},
        {"prompt": "Say hi", "answer": "Hi"},
        {"prompt": "Say hi", "answer": "Hello"},
        {"prompt": "Translate", "answer": ""},
        {"prompt": "Repeat", "answer": "Repeat"},
        {"prompt": "Name a town", "answer": "Москва"},
        {"prompt": "", "answer": "4"},
    ]
    found = outliers.faults(rows, [False] * 5 + [True, False])
    assert found == [
        ("same prompt",), ("duplicate",), ("same prompt",), ("empty answer",), ("answer repeats the prompt",),
        ("cut", "other script"), ("empty prompt",),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "answer", "kinds", "gradable"),
    [
        ("Write a haiku about rain", "Drops", ("creative",), None),
        ("Calculate 3 * 4", "12", ("arithmetic",), "the number"),
        ("Write a Python function that sorts", "def f", ("code",), "running it"),
        ("Describe rain without using the word 'water'.", "Wet.", ("negative constraint",), "the forbidden words"),
        ("Rewrite this: she go", "She goes", ("transformation",), None),
        ("Classify the animal", "cat", ("choice",), "the label"),
        ("Is it legal to park here?", "No", ("ethics or law",), None),
        ("What is rain?", "Water.", (), None),
    ],
)
def test_instructions_have_kinds(text, answer, kinds, gradable):
    found = instructions.instruction(text, answer)
    assert (found.kinds, found.gradable) == (kinds, gradable)


def test_a_broken_constraint_is_seen():
    ask = "Describe rain. Avoid the words \"wet\" and do not use 'Water'."
    assert instructions.instruction(ask, "Waterfall of drops").broken == ()
    found = instructions.instruction(ask, "Water makes it wet")
    assert found.forbidden == ("wet", "water") == found.broken


def test_refusals_lengths_and_verbs():
    rows = instructions.of_rows(
        [{"instruction": "Tell me", "input": " ", "output": "I’m sorry, as an AI I cannot."}] * 2
        + [{"instruction": "Name it", "input": "a thing", "output": "Yes"}]
    )
    assert instructions.classes(rows[0])["refusal"] == "yes" and instructions.classes(rows[0])["input"] == "no"
    assert instructions.classes(rows[2])["words of the answer"] == "very short" and rows[2].input_given
    assert instructions.verbs(rows, least=2) == ["tell", "tell", "other"]


def test_counts_on_real_instructions(shared):
    rows = json.loads((shared / "data" / "alpaca_gpt4_1k.json").read_text("utf-8"))
    found = instructions.of_rows(rows)
    faults = outliers.faults([{"prompt": r["instruction"] + r["input"], "answer": r["output"]} for r in rows])
    assert sum("duplicate" in f for f in faults) == 14
    assert np.median([row.answer_words for row in found]) == 81
    counts = {name: sum(name in row.kinds for row in found) for name in instructions.RULES}
    assert (counts["creative"], counts["code"], counts["arithmetic"]) == (61, 32, 31)
    assert sum(row.refusal for row in found) == 39
