"""What a problem's text says about its difficulty, and why a generated solution is wrong."""

import json
import time
from collections import Counter
from fractions import Fraction

import pytest

from jaxft.analysis.gsm8k import arithmetic, categories, mistakes, units
from jaxft.analysis.gsm8k.categories import classes, problem


def rows_of(shared, part):
    return list(map(json.loads, (shared / "data" / f"gsm8k_{part}.jsonl").read_text("utf-8").splitlines()))


@pytest.mark.parametrize(
    ("text", "value"),
    [("2+3*4", 14), ("(2+3)*4", 20), ("80,000*1.5", 120_000), ("$5 × 3", 15), ("5 x 3", 15), ("20%*50", 10), ("-3+5", 2),
     ("10/4", Fraction(5, 2)), ("2*-3", -6), ("1 − 4", -3), (".5*8", 4)],
)  # fmt: skip
def test_expressions_are_evaluated_exactly(text, value):
    assert arithmetic.evaluate(text) == value


@pytest.mark.parametrize("text", ["5", "3x+2", "2+", "(2+3", "1/0", "2 3*4", "a+b", "", "12,34*2", "-5", "1,0000+1"])
def test_what_is_no_expression_of_numbers_has_no_value(text):
    assert arithmetic.evaluate(text) is None


@pytest.mark.parametrize(
    ("text", "true"),
    [
        ("17*23=391", [True]),
        ("17*23=390", [False]),  # off by 0.3 %, yet false
        ("10/3=3.33 and 10/3 = 3.34 and 10/3=3", [True, True, True]),
        ("10/3=3.5", [False]),
        ("7/2=3 7/2=4 7/2=5", [True, True, False]),
        ("2+3=5, 5+4=9. 9-1=7", [True, True, False]),
        ("<<16-3-4=9>>9", [True]),
        ("16 - 3 - 4 = <<16-3-4=8>>8", [False, False]),
        ("so $2 * $80,000 = $160,000.", [True]),
        ("5 - 8 = -3", [True]),
        ("5 - 8 = 3", [False]),
        ("is .4 * 2 = <<.4*2=.8>>.8", [True, True]),
        ("2 * 3 = 6 + 4 = 10", [True]),  # runs on: only 6 + 4 = 10 has a number alone on its right
        ("2 * 3 = 6 + 4 = 11", [False]),
        ("3 hours * 4 * 5 = 60", []),  # its left side is not all there
        ("2x + 20 = 50 and 22 - x = 16 and 7x+12=341", []),
        ("$2.50 - $2.24 = 26 cents", []),
        ("2^3*4=32", []),
        ("box 3*4=13", []),
        ("in 2 days 3 x 4 = 13", [False]),
        ("n = 5", []),
    ],
)
def test_equations_are_found_and_checked(text, true):
    assert [equation.true for equation in arithmetic.equations(text)] == true


@pytest.mark.parametrize("text", ["1" * 100_000, "1=" + " " * 100_000 + "x", "1 " * 50_000 + "=3", "1=" * 20_000])
def test_what_repeats_itself_for_long_is_read_in_linear_time(text):
    """A search that is quadratic or worse takes minutes."""
    began = time.process_time()
    arithmetic.equations(text)
    assert time.process_time() - began < 5


def test_a_long_sum_is_an_equation():
    (equation,) = arithmetic.equations("1+" * 20_000 + "1=20000")
    assert equation.computed == 20_001 and not equation.true


def test_every_annotation_of_gsm8k_holds(shared):
    """The references are nearly free of false equations, so that a false one in an output says something."""
    found = [
        e for part in ("train", "test") for row in rows_of(shared, part) for e in arithmetic.equations(row["answer"])
    ]
    annotated = [e for e in found if not e.text.startswith("$") and " = " not in e.text]
    assert len(annotated) == 27_562 and all(e.true for e in annotated)
    plain = [e for e in found if " = " in e.text]
    assert len(plain) == 22_973 and sum(not e.true for e in plain) == 27


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("He runs 3 miles in 20 minutes, twice an hour", {"length": {"mile"}, "time": {"minute", "hour"}}),
        ("$5 and 20 cents", {"money": {"dollar", "cent"}}),
        ("a quarter of the second yard", {}),
        ("5 yards, 30 seconds", {"length": {"yard"}, "time": {"second"}}),
        ("2 ounces", {"mass": {"ounce"}, "volume": {"ounce"}}),
        ("birthday party in daylight", {}),
    ],
)
def test_units_are_read_from_text(text, found):
    assert units.named(text) == found


def test_factors_convert_between_units_that_are_named():
    named = {"time": {"hour", "minute"}}
    assert units.factors(named, least=2) == {60, Fraction(1, 60)}
    assert {24, 7 * 24, 3600, Fraction(1, 1440)} <= units.factors(named) and 7 not in units.factors(named)


QUESTION = (
    "Every week, Ann jogs twenty-five minutes a day and Bo 1,200 seconds more than 50% of that. "
    "How many hours is it in 2 weeks?"
)
ANSWER = "Ann: 25*7=<<25*7=175>>175\nBoth: <<175*2=350>>350\nHours: 350/60=<<350/60=5.8>>5.8\n#### 5.8"


def test_features_of_a_problem():
    found = problem(QUESTION, ANSWER)
    assert (found.steps, found.operators, found.decimals, found.answer) == (3, frozenset("*/"), True, Fraction(29, 5))
    assert found.hidden == (7, 60) == found.conversions and found.mixed_units == ("time",)
    assert found.words == {"percent", "rate", "comparison"}
    assert (found.numbers, found.unused) == (4, 2)  # 25, 1,200, 50 and 2; no step uses 1,200 or 50
    assert not found.unannotated_end and not found.algebra
    told = classes(found)
    assert told["unit conversion"] == "yes" and told["steps"] == "3" and told["magnitude of the answer"] == "0–9"


def test_solutions_without_annotations_have_their_lines_as_steps():
    found = problem("How many?", "Let x be the number.\nx + 4 = 10\nx = 6\n#### 6")
    assert (found.steps, found.annotated, found.algebra) == (3, False, True)


def test_a_last_step_without_annotation_is_seen():
    assert problem("?", "<<2+2=4>>4\n4 + 1 = 5\n#### 5").unannotated_end
    assert not problem("?", "<<2-4=-2>>-2\n#### -2").unannotated_end


@pytest.mark.parametrize(
    ("text", "found"),
    [("two hundred and five", {205}), ("three thousand two hundred", {3200}), ("a dozen, twice", set()),
     ("twenty-five of 1,000", {25, 1000}), ("one. Two", {1, 2}), ("someone often", set())],
)  # fmt: skip
def test_numbers_are_read_in_digits_and_words(text, found):
    assert categories.numbers_of(text) == found


def test_counts_on_the_real_test_rows(shared):
    """Independently counted figures: steps, sizes of answers, operators, shares of kinds of question."""
    rows = rows_of(shared, "test")
    found = [problem(row["question"], row["answer"]) for row in rows]
    steps = Counter(min(8, p.steps) if p.annotated else 0 for p in found)
    assert [steps[i] for i in range(9)] == [18, 65, 357, 364, 290, 138, 57, 21, 9]
    sizes = Counter(classes(p)["magnitude of the answer"] for p in found)
    assert sizes == {"0–9": 253, "10–99": 639, "100–999": 296, "1,000–9,999": 84, "10,000+": 47}
    kinds = Counter(len(p.operators) for p in found)
    # One problem's (-3) is a sign and no operator, so that it has two kinds and not three: 620 and 399 with it.
    assert [kinds[i] for i in range(5)] == [31, 173, 621, 398, 96]
    share = {name: sum(name in p.words for p in found) for name in categories.WORDS}
    assert (share["percent"], share["rate"], share["age"], share["ratio"]) == (183, 677, 48, 6)
    assert sum(p.decimals for p in found) == 92 and sum(p.answer < 0 for p in found) == 2
    assert sum(p.unannotated_end for p in found) == 93
    assert sum(bool(p.conversions) for p in found) == 118 and sum(bool(p.hidden) for p in found) == 653


def test_real_training_rows_have_three_steps_on_average(shared):
    rows = rows_of(shared, "train")
    assert sum(len(arithmetic.ANNOTATION.findall(row["answer"])) for row in rows) / len(rows) == pytest.approx(
        3.17, abs=0.005
    )
    noisy = sum(problem(row["question"], row["answer"]).unannotated_end for row in rows[:1500])
    assert 0.03 < noisy / 1500 < 0.07


HOURS = "She works 120 minutes a day. How many hours is that in 10 days?"


@pytest.mark.parametrize(
    ("reference", "output", "truncated", "kind"),
    [
        ("#### 20", "120*10=1200\n1200/60=20\n#### 20", None, None),
        ("#### 20", "120 * 10 = 1200 and", True, "truncated"),
        ("#### 20", "120 * 10 = 1200 and", False, "format"),
        ("#### 20", "The answer is 20", None, "format"),
        ("#### 20", "120*10=1200\n#### 20.00", None, "notation"),
        ("#### 20", "120*10=1300\n1300/60=21.67\n#### 21", None, "arithmetic"),
        ("#### 20", "120*10=1200\n#### 1200", None, "unit_factor"),
        ("#### 20", "120*10=1200\n#### 240", None, "plan"),  # 12 converts no units that are named here
        ("#### 20", "10-30=-20\n#### -20", None, "sign"),
        ("#### 20", "1199/60=19.98\n#### 19.98", None, "rounding"),
        ("#### 20", "1140/60=19\n#### 19", None, "plan"),  # one whole number beside another is no rounding
        ("#### 20", "#### 35", None, "unchecked"),
        ("#### 0", "10-5=5\n#### 5", None, "plan"),
    ],
)
def test_kinds_of_mistake(reference, output, truncated, kind):
    found = mistakes.mistake(HOURS, reference, output, truncated=truncated)
    assert (found and found.kind) == kind


def test_mistakes_are_counted_with_examples():
    outputs = ["#### 20", *["2+2=5\n#### 5"] * 6, "x", "#### 20", "3+3=6\n#### 6"]
    found = [mistakes.mistake(HOURS, "#### 20", output) for output in outputs]
    table = mistakes.counts(found)
    assert [(row["kind"], row["count"]) for row in table] == [("arithmetic", 6), ("format", 1), ("plan", 1)]
    assert table[0]["share"] == 0.75 and table[0]["share_interval"][0] < 0.75 < table[0]["share_interval"][1]
    assert [e["document"] for e in table[0]["examples"]] == [2, 4, 6] and table[0]["examples"][0][
        "evidence"
    ] == "2+2 = 5"
    assert mistakes.counts([None, None]) == []


def test_no_reference_is_a_mistake(shared):
    for row in rows_of(shared, "test"):
        assert mistakes.mistake(row["question"], row["answer"], row["answer"]) is None
