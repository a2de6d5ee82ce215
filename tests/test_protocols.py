"""GSM8K's prompts, filters and votes are those of lm-evaluation-harness, byte for byte."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from jaxft.errors import UserError
from jaxft.evals import protocols
from jaxft.evals.protocols import PROTOCOLS
from jaxft.evals.self_consistency import majority, majority_vote

# Prompts of the 1,319 test rows joined by NUL, made by lm-evaluation-harness 0.4.13 with seed 1234.
GOLDEN = {
    ("gsm8k", None): "84119a05b6c77e92415182c7963444e153dd2df04e05e238744f26b105c0a8b6",
    ("gsm8k", 0): "03662a84e74ee4b7cef753728408c9192d39ccbd3a78859d2873712e3ca57e5a",
    ("gsm8k_cot", None): "9a08edd9368fad0c8e3a7d85f65d607fcbc6566b30b3ef3e479a4d6c11eaf204",
    ("gsm8k_cot_zeroshot", None): "d178f26dfbf4eb9ee747b44d24accab731661a06c7cb08d7e236b5aab4d6fb94",
}
FILES = {
    "gsm8k": "gsm8k.yaml",
    "gsm8k_cot": "gsm8k-cot.yaml",
    "gsm8k_cot_zeroshot": "gsm8k-cot-zeroshot.yaml",
    "gsm8k_cot_self_consistency": "gsm8k-cot-self-consistency.yaml",
}
# Answers with numbers in every shape that the filters treat differently.
OUTPUTS = [
    "#### 18", "####18", "#### $18", "#### 18.00", "#### 18.", "#### 18...", "#### -3", "#### 1,000", "#### 1\n#### 2",
    "so 18 (for 2 days)", "The answer is 18.", "The answer is 18", "The answer is 8", "The answer is $18.", "3-5", "none",
    "The answer is 1,234.5 dollars. The answer is 7.",
    "", "#### ", "#### .", "...", "$", "-", "18,", "#### 18\u0660", "####  18",
    "The answer is -0.5.", "#### 5 apples and 7",
    "a #### #### 6", "The answer is 3,.", "$1,000.00", "1.2.3", "#### --4", "<<2+2=4>>4",
]  # fmt: skip


def made_up(count: int, name: str) -> list[dict[str, str]]:
    """Rows in GSM8K's format, with characters that templates and filters could trip over."""
    draw = random.Random(name)
    rows = []
    for i in range(count):
        a, b = draw.randrange(2, 2000), draw.randrange(2, 9)
        question = f" {name} {i}: {{{{a}}}} has {a} “eggs” & {b} <b>#### 5</b> 多\n\nHow many?  "
        rows.append({"question": question, "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b:,}\n#### {a + b:,}"})
    return rows


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Name -> the harness's own task, with its prompts made from made-up rows."""
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    folder, files = tmp_path_factory.mktemp("rows"), {}
    for part, count in (("train", 40), ("test", len(OUTPUTS))):
        files[part] = str(folder / f"{part}.jsonl")
        Path(files[part]).write_text("\n".join(map(json.dumps, made_up(count, part))))
    made = {}
    for name, file in FILES.items():
        settings = load_yaml(Path(tasks.__file__).parent / "gsm8k" / file, resolve_func=True)
        settings |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        if name == "gsm8k_cot_self_consistency":
            settings["repeats"] = 4
            settings["filter_list"] = settings["filter_list"][:2]
        made[name] = ConfigurableTask(config=settings)
        made[name].set_fewshot_seed(seed=protocols.SHOT_SEED)
        made[name].build_all_requests(limit=None, rank=0, world_size=1)
    return made


@pytest.mark.parametrize("name", FILES)
def test_prompts_and_settings_are_the_harness_s(harness, name):
    protocol, task = PROTOCOLS[name], harness[name]
    once = [instance for instance in task.instances if instance.idx == 0]
    ours = protocols.prompts(protocol, made_up(len(OUTPUTS), "test"), pool=made_up(40, "train"))
    assert ours == [instance.args[0] for instance in once]
    asked = once[0].args[1]
    assert list(protocol.stops) == asked["until"]
    assert protocol.temperature == asked.get("temperature", 0.0) and asked["do_sample"] == (protocol.temperature > 0)
    assert protocol.version == task.VERSION == task.config.metadata["version"]


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_cot", "gsm8k_cot_zeroshot"])
def test_filters_and_scores_are_the_harness_s(harness, name):
    protocol, task = PROTOCOLS[name], harness[name]
    rows = made_up(len(OUTPUTS), "test")
    outputs = [text.replace("18", row["answer"].split("#### ")[1]) for text, row in zip(OUTPUTS, rows)]
    for instance, output in zip(task.instances, outputs):
        instance.resps = [output]
    task.apply_filters()
    grades = protocols.grade(protocol, rows, outputs)
    for grade in grades:
        theirs = [instance.filtered_resps[grade.extractor] for instance in task.instances]
        assert list(grade.found) == theirs
        scores = [task.process_results(i.doc, [found])["exact_match"] for i, found in zip(task.instances, theirs)]
        assert list(grade.right) == [bool(score) for score in scores]
        assert 0 < sum(grade.right) < len(rows) and 0 < grade.invalid < 1
    assert [grade.extractor for grade in grades] == [f.name for f in task._filters]


def test_stderr_is_the_harness_s():
    from lm_eval.api.metrics import mean_stderr

    rows = made_up(7, "test")
    (grade, _) = protocols.grade(PROTOCOLS["gsm8k"], rows, [row["answer"] for row in rows[:4]] + ["?"] * 3)
    assert grade.exact_match == 4 / 7 and grade.exact_match_stderr == pytest.approx(
        mean_stderr([1.0] * 4 + [0.0] * 3), rel=1e-12
    )


def test_votes_are_the_harness_s(harness):
    task, rows = harness["gsm8k_cot_self_consistency"], made_up(len(OUTPUTS), "test")
    draw = random.Random(0)
    said = ["The answer is {}.", "The answer is 7.", "no idea", "The answer is ${}.", "The answer is 7.0."]
    samples = [[draw.choice(said).format(row["answer"].split("#### ")[1]) for _ in range(4)] for row in rows]
    for instance, sampled in zip(task.instances, samples):
        instance.resps = sampled
    task.apply_filters()
    found = majority_vote(samples, [protocols.reference(PROTOCOLS["gsm8k_cot"], row) for row in rows], 4)
    theirs = [task.process_results(i.doc, [i.filtered_resps["maj@64"]])["exact_match"] for i in task.instances]
    first = [task.process_results(i.doc, [i.filtered_resps["score-first"]])["exact_match"] for i in task.instances]
    assert list(found.right) == [bool(score) for score in theirs] and 0 < sum(found.right) < len(rows)
    assert found.first == sum(map(bool, first)) / len(rows)


def test_a_tie_goes_to_the_vote_first_seen_and_invalid_votes_count():
    assert majority(["5", "7", "7", "5"]) == "5"
    assert majority(["[invalid]", "7", "[invalid]"]) == "[invalid]"


def test_votes_as_numbers_count_together():
    said = [[f"The answer is {n}" for n in ("18.0", "7", "7", "18", "18.00")]]
    found = majority_vote(said, ["18"], 5)
    assert (found.exact_match, found.equal_number) == (0.0, 1.0)


def test_the_expected_majority_is_that_of_all_subsets():
    # Two right votes of three: a majority of one is right twice in three times, and one of three always.
    said = [["The answer is 4", "The answer is 5", "The answer is 4"]]
    found = majority_vote(said, ["4"], 1, draws=4000)
    assert found.exact_match == 1.0 and found.expected == pytest.approx(2 / 3, abs=0.03)  # 4 standard errors of 0.0075
    assert majority_vote(said, ["4"], 3).expected == 1.0


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match=r"maj@8: .* at least 8, .* found 1 problems with \[3\]"):
        majority_vote([["a"] * 3], ["4"], 8)


def test_more_shots_than_rows_are_refused():
    with pytest.raises(UserError, match="gsm8k: 5 shots asked for, 2 rows"):
        protocols.prompts(PROTOCOLS["gsm8k"], made_up(1, "test"), pool=made_up(2, "train"))


def test_outputs_end_at_any_stop():
    from lm_eval.models.utils import postprocess_generated_text

    stops = PROTOCOLS["gsm8k"].stops
    for text in (" 4\n#### 4\n\nQuestion: next", "a</s>Question:", "Question:", "none ", "x<|im_end|></s>"):
        assert protocols.cut(text, stops) == postprocess_generated_text(text, list(stops), None)


def test_the_second_pass_asks_for_the_protocol_s_own_ending():
    for name, ending in (("gsm8k", "`#### N`"), ("gsm8k_cot", "`The answer is N.`")):
        protocol = PROTOCOLS[name]
        (second,) = protocols.refinement_prompts(protocol, ["P:"], [" four\n"])
        assert second.startswith("P: four\n\nCheck") and ending in second and not second.endswith(" ")
        assert protocols.cut(second[2:], protocol.stops) == second[2:]


def test_every_protocol_describes_itself():
    told = protocols.described(PROTOCOLS["gsm8k"])
    assert told["shots"] == "5, drawn per document with Random(1234)" and told["decoding"] == "greedy"
    assert protocols.described(PROTOCOLS["gsm8k"], 0)["shots"] == "0"
    assert "temperature 0.2" in protocols.described(PROTOCOLS["gsm8k_cot_self_consistency"])["decoding"]


@pytest.fixture(scope="module")
def gsm8k(shared):
    return {
        part: list(map(json.loads, (shared / "data" / f"gsm8k_{part}.jsonl").read_text("utf-8").splitlines()))
        for part in ("train", "test")
    }


@pytest.mark.parametrize(("name", "shots"), GOLDEN)
def test_prompts_of_the_real_rows_have_the_harness_s_hash(gsm8k, name, shots):
    made = protocols.prompts(PROTOCOLS[name], gsm8k["test"], pool=gsm8k["train"], shots=shots)
    assert len(made) == 1319
    assert hashlib.sha256("\x00".join(made).encode()).hexdigest() == GOLDEN[name, shots]


def test_the_real_references_grade_as_right(gsm8k):
    for rows in gsm8k.values():
        for grade in protocols.grade(PROTOCOLS["gsm8k"], rows, [row["answer"] for row in rows]):
            assert (grade.exact_match, grade.equal_number, grade.invalid) == (1.0, 1.0, 0.0)
