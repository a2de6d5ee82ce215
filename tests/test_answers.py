"""Final answers: what counts as right, invalid and truncated."""

import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.analysis.gsm8k import answers
from jaxft.analysis.gsm8k.answers import COT_STRICT, COT_VOTE, FLEXIBLE, STRICT

TEXTS = st.text(alphabet="#-$.,0123459 aZ\n'İ" + string.punctuation, max_size=40) | st.from_regex(
    r"(#### |The answer is )-?\$?[0-9.,]{0,6}[.\n ]?", fullmatch=True
)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_extraction_and_comparison_are_the_harness_s(text, reference):
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    for extract in (STRICT, FLEXIBLE, COT_STRICT, COT_VOTE):
        filter = RegexFilter(extract.pattern, group_select=extract.pick)
        assert [[extract(text)]] == filter.apply([[text]], [{}])
        found = extract(text)
        theirs = exact_match_hf_evaluate([found], [reference], list(answers.IGNORED), ignore_case=True)["exact_match"]
        assert answers.exact_match(found, reference) == bool(theirs)


@pytest.mark.parametrize(
    ("text", "found", "right"),
    [
        ("#### 18", "18", True),
        ("#### 1,8", "18", True),
        ("#### 18.", "18", True),
        ("#### 18...", "18..", False),  # one full stop is forgiven, not three
        ("#### 18.00", "18.00", False),
        ("####18", None, False),
        ("#### $18", None, False),
        ("#### 18 #### 19", "18", True),
    ],
)
def test_a_final_answer_is_compared_as_text(text, found, right):
    (scored,) = answers.score(["?"], ["#### 18"], [text])
    assert (scored.found, scored.right) == (found, right)


@pytest.mark.parametrize(
    ("found", "reference", "same"),
    [("18.00", "#### 18", True), ("$1,000", "#### 1000", True), ("18...", "#### 18", False), ("-.5", "#### -0.50", True),
     ("[invalid]", "[invalid]", False), ("1/2", "#### 0.5", False), ("٣", "#### 3", False)],
)  # fmt: skip
def test_equal_numbers_are_right_in_the_lenient_column_alone(found, reference, same):
    assert answers.same_number(found, reference) == same


def test_truncated_answers_are_counted_where_somebody_looked():
    said = ["#### 4", "so far", "#### 5", "so far"]
    unknown = answers.summary(answers.score(["?"] * 4, ["#### 4"] * 4, said))
    assert "truncated" not in unknown and "truncated" not in unknown["examples"][0]
    known = answers.summary(answers.score(["?"] * 4, ["#### 4"] * 4, said, [False, True, False, False]))
    assert (known["truncated"], known["invalid"], known["exact_match"]) == (0.25, 0.5, 0.25)
    assert known["examples"][1]["truncated"] is True
    assert known | unknown == known | {"examples": unknown["examples"]}


def test_the_interval_is_wilson_s():
    from scipy.stats import binomtest

    told = answers.summary(answers.score(["?"] * 50, ["#### 4"] * 50, ["#### 4"] * 13 + ["#### 5"] * 37))
    expected = binomtest(13, 50).proportion_ci(method="wilson")
    np.testing.assert_allclose(told["exact_match_interval"], [expected.low, expected.high], atol=1e-7)
