"""What a report makes of losses per example, answers per problem and evaluations: the figures are those of the analysis."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_folders import (
    answered,
    choices,
    evaluation,
    examples,
    measurement,
    replies,
    word_problems,
    write_lines,
)
from test_report import finished, lines, undrawn

from jaxft import report
from jaxft.analysis import contamination, hardness, overfitting, trends
from jaxft.analysis.comparison import compare
from jaxft.analysis.gsm8k import categories
from jaxft.analysis.gsm8k.answers import score, summary

__all__ = ["undrawn"]
HELD, PROBE = word_problems(120), word_problems(40, "fresh")


def whole(folder: Path, levels=(2.0, 0.8, 0.9), **changes) -> Path:
    """A finished run with all that training writes."""
    metrics = [
        line | {"probe_loss": 2.0 - 0.07 * line["step"], "probe_mean_token_accuracy": 0.5, "eval_bits_per_byte": 1.0}
        if "eval_loss" in line
        else line
        for line in lines()
    ]
    finished(folder, hostile="plain", metrics=metrics)
    base, tuned = replies(HELD, 0.1, 1, 0.5), replies(HELD, 0.6, 2)
    write_lines(folder / "examples.jsonl", [*examples(HELD, "validation", levels=levels), *examples(PROBE, "probe", 1)])
    write_lines(folder / "tasks_final_answer.jsonl", answered(HELD, base, tuned))
    texts = [row["question"] for row in HELD], [row["answer"] for row in HELD]
    scores = {
        side: summary(score(*texts, said, [False] * len(HELD))) for side, said in (("base", base), ("tuned", tuned))
    }
    rewrite(folder / "results.json", tasks={"final_answer": scores})
    return folder


def rewrite(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with everything, and two evaluations of it; its report is written once."""
    folder = whole(tmp_path_factory.mktemp("runs") / "whole")
    asked = PROBE + word_problems(50, "train")
    first = measurement("gsm8k", asked, replies(asked, 0.3, 3), replies(asked, 0.7, 4, 0.3))
    evaluation(folder, "20260301-000000", [first, choices("mmlu", 400, 0.5, 0.40, 0.25)], model="m")
    again = measurement("gsm8k", asked, replies(asked, 0.3, 3), replies(asked, 0.5, 5, 0.3))
    trained = [row["question"] for row in HELD + PROBE[:3]]
    evaluation(folder, "20260302-000000", [again, choices("arc_challenge", 300, 0.25, 0.26, 0.25)], trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.plots, "png", lambda plot, theme: b"")
        report.write(folder)
    return folder


@pytest.fixture(scope="module")
def figures(run) -> dict:
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def written(run) -> str:
    return (run / "report.md").read_text()


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_runs_own_task_is_compared_problem_by_problem(run, figures, written):
    problems = read(run, "tasks_final_answer.jsonl")
    expected = compare([p["base"]["right"] for p in problems], [p["tuned"]["right"] for p in problems])
    (own,) = (s for s in figures["scores"] if s["task"] == "final_answer")
    for name in ("difference", "p_value", "right_to_wrong", "wrong_to_right", "detectable"):
        assert own["change"][name] == getattr(expected, name)
    assert own["change"]["difference_interval"] == list(expected.difference_interval)
    assert own["base"]["value"] == expected.first and own["tuned"]["value"] == expected.second
    assert own["base"]["interval"] == pytest.approx(expected.first_interval)
    assert f"**better by {expected.difference * 100:.1f} points**" in written and "p \\< 0.0001" in written


def test_answers_of_another_run_are_not_taken_for_this_ones(tmp_path, undrawn):
    folder = whole(tmp_path / "run")
    write_lines(folder / "tasks_final_answer.jsonl", read(folder, "tasks_final_answer.jsonl")[:60])
    figures = report.write(folder)
    assert figures["scores"][0]["change"] is None
    assert "the intervals do not overlap" in (folder / "report.md").read_text()


def test_evaluations_keep_their_figures_and_the_newest_counts(run, figures):
    told = json.loads((run / "evaluations/20260302-000000/results.json").read_text())["tasks"]["gsm8k"]
    found = {s["metric"]: s for s in figures["scores"] if s["task"] == "gsm8k"}
    assert set(found) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    for metric, line in found.items():
        assert line["source"] == "evaluations/20260302-000000"
        for side in ("base", "tuned"):
            assert line[side]["value"] == told["sides"][side]["metrics"][metric]["value"]
            assert line[side]["invalid"] == told["sides"][side]["invalid"][metric.partition(",")[2]]
        assert line["change"]["p_value"] == told["comparisons"][metric]["p_value"]
        assert "version 3" in line["protocol"] and "greedy" in line["protocol"]
    assert found["exact_match,strict-match"]["primary"] is True


def test_the_panel_has_the_tasks_that_training_was_not_for(run, figures, written):
    rows = {row["task"]: row for row in figures["panel"]}
    assert set(rows) == {"mmlu", "arc_challenge", "gsm8k"}  # the rows are generated, not GSM8K's
    panel = json.loads((run / "evaluations/20260301-000000/results.json").read_text())["panel"]
    (mmlu,) = (row for row in panel if row["task"] == "mmlu")
    assert rows["mmlu"]["p_value"] == pytest.approx(2 * mmlu["p_value"])  # rows of two evaluations
    assert rows["mmlu"]["verdict"] == "worse" and rows["arc_challenge"]["near_chance"] is True
    assert "**Regression: raised.** Worse on mmlu, of 3 tasks" in written
    assert "arc_challenge cannot show one (the base is near chance)" in written


def test_a_base_that_solves_nothing_cannot_lose_anything():
    from jaxft.analysis.comparison import PanelRow
    from jaxft.reports.sections.panel import flag, floored

    def row(right: int, near: bool | None = None) -> PanelRow:
        return PanelRow(
            "t", "exact_match", 100, right / 100, 0.0, -right / 100, (-0.1, 0.0), 1.0, "no change shown", near
        )

    assert floored(row(5)) == "the base has 5 right" and floored(row(6)) is None and floored(row(50, True))
    assert flag([row(0)]).raised is None and flag([row(0), row(50)]).raised is False
    assert compare([True] * 6 + [False] * 94, [False] * 100).p_value < 0.05  # so six may be told from chance
    assert compare([True] * 5 + [False] * 95, [False] * 100).p_value > 0.05


def test_on_gsm8k_its_tasks_are_trained_for_and_published_scores_are_cited(run, tmp_path, undrawn):
    folder = whole(tmp_path / "gsm8k")
    (folder / "evaluations").mkdir()
    (folder / "evaluations/1").mkdir()
    (folder / "evaluations/1/results.json").write_bytes((run / "evaluations/20260301-000000/results.json").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["model"]["name"], config["data"]["name"] = "qwen/qwen2-1.5b", "openai/gsm8k"
    (folder / "config.json").write_text(json.dumps(config))
    figures, text = report.write(folder), (folder / "report.md").read_text()
    assert [row["task"] for row in figures["panel"]] == ["mmlu"]
    cited = {(s["benchmark"], s["value"]) for s in figures["published"]}
    assert {("GSM8K", 58.5), ("MMLU", 56.5)} <= cited
    assert "| `Qwen/Qwen2-1.5B` | GSM8K | 58.5 | 4-shot |" in text and "N/A" not in text
    assert "counts of six tokens" in text
    config["model"]["name"] = "apple/OpenELM-3B"
    (folder / "config.json").write_text(json.dumps(config))
    report.write(folder)
    assert "GSM8K: none published" in (folder / "report.md").read_text()


def test_loss_decreases_have_paired_intervals(run, figures, written):
    held = [line for line in read(run, "examples.jsonl") if line["split"] == "validation"]
    tokens = [line["tokens"] for line in held]
    base, best = ([line["nll"][at] for line in held] for at in ("base", "best"))
    expected = trends.of_examples(base, best, tokens, "")
    found = figures["paired"]["validation, base to best"]
    assert found["percent_interval"] == list(expected.percent_interval) and found["percent"] == expected.percent
    assert figures["paired"]["probe, base to end"]["percent"] > 0
    assert "| Validation loss, base to best | 2.0000 | 0.8000 | −60.0 % |" in written


def test_token_accuracy_of_rows_stands_beside_that_of_tokens(run, figures, written):
    held = [line for line in read(run, "examples.jsonl") if line["split"] == "validation"]
    mean = np.mean([line["correct"]["best"] / line["tokens"] for line in held])
    assert figures["teacher_forced"]["rows"]["mean"]["best"] == pytest.approx(mean)
    change = figures["teacher_forced"]["accuracy_change"]
    total = sum(line["tokens"] for line in held)
    moved = sum(line["correct"]["best"] - line["correct"]["base"] for line in held) / total
    assert (
        change["change"] == pytest.approx(moved) and change["change_interval"][0] < moved < change["change_interval"][1]
    )
    assert figures["teacher_forced"]["kinds"]["final answer"]["best"] == 1
    assert "Rows with every token right" in written and "teacher-forced" in written


def test_the_overfitting_flag_is_the_analysiss_on_examples(run, figures, written):
    by = {split: [e for e in read(run, "examples.jsonl") if e["split"] == split] for split in ("validation", "probe")}
    losses = [
        overfitting.Losses(
            *([e["nll"][at] for e in rows] for at in ("base", "best", "end")), [e["tokens"] for e in rows]
        )
        for rows in by.values()
    ]
    expected = overfitting.verdict(*losses)
    found = figures["overfitting"]
    assert found["flag"] is expected.flag is True and found["rule"] == overfitting.RULE
    assert [s["figures"] for s in found["signs"]] == [s.figures for s in expected.signs]
    assert overfitting.RULE.split(";")[0].replace("<", "\\<") in written


def asked_of_both(folder, seen, held):
    """An evaluation of 60 training rows and 60 held-out ones, of which the tuned model solves these shares."""
    rows = word_problems(60, "train"), word_problems(60)
    own = [
        replace(measurement(name, asked, replies(asked, 0.0, 1), replies(asked, share, 2)), seen=name != "final_answer")
        for name, asked, share in zip(("final_answer_train_rows", "final_answer"), rows, (seen, held))
    ]
    evaluation(folder, f"2026030{3 + len(list((folder / 'evaluations').glob('*')))}-000000", own)
    return own


def test_answers_to_training_rows_decide_the_third_clause_and_are_no_score(tmp_path, undrawn):
    folder = whole(tmp_path / "run", levels=(2.0, 0.8, 0.8))
    for seen, held, raised in ((1.0, 0.2, True), (0.5, 0.45, False)):
        own = asked_of_both(folder, seen, held)
        shares = [(m.values("tuned", m.primary) == 1).tolist() for m in own]
        found = report.write(folder)
        sign = next(s for s in found["overfitting"]["signs"] if s["clause"] == "exact match")
        assert sign["raised"] is raised
        assert sign["figures"] == overfitting.verdict(exact=tuple(shares)).signs[2].figures
        assert "final_answer" in str(found["tasks"]) and "train_rows" not in str(found["tasks"])
    assert "of training rows" in (folder / "report.md").read_text()
    assert all(row["task"] != "final_answer_train_rows" for row in found["panel"])


def of_lines(tmp_path, evaluations, probe=None, name="run") -> dict:
    metrics = lines(evaluations)
    for line in metrics:
        if probe and "eval_loss" in line:
            line["probe_loss"] = probe[line["step"]]
    folder = finished(tmp_path / name, hostile="plain", metrics=metrics)
    rewrite(folder / "results.json", best_step=min(evaluations, key=lambda e: e[1])[0])
    return report.write(folder)["overfitting"]


def test_without_examples_the_clauses_that_lines_decide_are_decided(tmp_path, undrawn):
    falling = ((0, 2.0, 0.4), (10, 1.2, 0.5), (20, 0.7, 0.6))
    found = of_lines(tmp_path, falling, {0: 1.98, 10: 1.1, 20: 0.65}, "probed")
    assert [s["raised"] for s in found["signs"]] == [False, False, None] and found["flag"] is False
    found = of_lines(tmp_path, falling, {0: 1.98, 10: 0.9, 20: 0.4}, "remembered")
    assert [s["raised"] for s in found["signs"]] == [False, True, None] and found["flag"] is True
    rising = ((0, 2.0, 0.4), (10, 0.8, 0.7), (20, 0.9, 0.7))
    found = of_lines(tmp_path, rising, {0: 1.98, 10: 0.8, 20: 0.9}, "rising")
    assert [s["raised"] for s in found["signs"]] == [None, False, None] and found["flag"] is None
    assert "losses per example would tell" in found["signs"][0]["figures"]


def test_without_a_probe_the_logged_loss_serves_and_is_named(tmp_path, undrawn):
    found = of_lines(tmp_path, ((0, 2.0, 0.4), (10, 1.9, 0.5), (20, 1.8, 0.6)))
    assert found["signs"][1]["raised"] is True  # logged from 1.515 to 0.815, validation by a tenth
    assert "for want of a probe" in found["signs"][1]["figures"]
    alone = of_lines(tmp_path, ((0, 2.0, 0.4),), name="alone")
    assert alone["flag"] is None and {s["figures"] for s in alone["signs"]} == {"not measured"}


def test_hard_categories_and_mistakes_are_those_of_the_problems(run, figures, written):
    problems = read(run, "tasks_final_answer.jsonl")
    classes = categories.of_rows([{"question": p["question"], "answer": p["reference"]} for p in problems])
    held = [line for line in read(run, "examples.jsonl") if line["split"] == "validation"]
    table = hardness.table(
        classes, [p["tuned"]["right"] for p in problems], [p["base"]["right"] for p in problems],
        nll=[e["nll"]["best"] for e in held], tokens=[e["tokens"] for e in held],
    )  # fmt: skip
    own = figures["hard"][0]
    assert [c["p_value"] for c in own["categories"]] == [row.p_value for row in table] and table
    assert [c["loss"] for c in own["categories"]] == [row.loss for row in table]
    wrong = sum(not p["tuned"]["right"] for p in problems)
    assert sum(row["count"] for row in own["mistakes"]["tuned"]) == wrong
    kinds = {row["kind"] for row in own["mistakes"]["tuned"]}
    assert {"arithmetic", "plan"} <= kinds
    assert [h["source"] for h in figures["hard"][1:]] == ["evaluations/20260302-000000"]
    assert "### Kinds of mistakes" in written and "2 + 2 = 5" in written


def test_a_flagged_category_has_three_real_examples(tmp_path, undrawn):
    folder = whole(tmp_path / "run")
    problems = read(folder, "tasks_final_answer.jsonl")
    steps = [
        c["steps"]
        for c in categories.of_rows([{"question": p["question"], "answer": p["reference"]} for p in problems])
    ]
    for problem, step in zip(problems, steps, strict=True):
        problem["tuned"] |= {
            "right": step == "1–2",
            "text": problem["reference"] if step == "1–2" else "No.\n#### 77777",
        }
    write_lines(folder / "tasks_final_answer.jsonl", problems)
    figures, text = report.write(folder), (folder / "report.md").read_text()
    flagged = [c for c in figures["hard"][0]["categories"] if c["flag"] == "hard"]
    assert flagged
    asked = {p["question"] for p in problems}
    for category in flagged:
        assert len(category["examples"]) == 3
        assert all(e["question"] in asked and e["output"] == "No.\n#### 77777" for e in category["examples"])
        assert category["examples"][0]["question"] in text


def test_rows_that_stand_out_are_found_with_their_faults_first(tmp_path, undrawn):
    folder = whole(tmp_path / "run")
    found = read(folder, "examples.jsonl")
    found[7]["nll"] |= {"best": found[7]["nll"]["best"] * 9}
    found[9]["nll"] |= {"base": 1.0}
    found[5]["cut"] = True
    found[11]["question"] = found[10]["question"]
    found[11]["answer"] = found[10]["answer"]
    write_lines(folder / "examples.jsonl", found)
    rows, text = report.write(folder)["rows"], (folder / "report.md").read_text()
    assert rows["faults"] == {"cut": 1, "same prompt": 1, "duplicate": 1}
    assert rows["outlying"][0]["row"] == found[7]["row"] and rows["outlying"][0]["z"] > 3.5
    assert [s["row"] for s in rows["worst"]] == [found[7]["row"], found[9]["row"]]
    assert (rows["worsened"], rows["harmful"]) == (2, 2)
    assert "Rows that stand out" in text and found[7]["row"] in text


INSTRUCTIONS = (
    (
        "Write a poem about the sea without using the word 'blue'.",
        "The blue sea sings of sand and foam and far away lands.",
    ),
    (
        "Classify the animal as mammal or bird: whale",
        "Mammal, because whales feed their young with milk and breathe air.",
    ),
    ("List three fruits that are red.", "Apples, cherries and strawberries are all red fruits when ripe."),
)


def test_instruction_data_has_its_own_categories_and_constraints(tmp_path, undrawn):
    folder = finished(tmp_path / "run", hostile="plain")
    rows = [
        {"question": f"{q} ({i})", "answer": a + " And so on." * (i % 9)} for i in range(40) for q, a in INSTRUCTIONS
    ]
    found = examples(rows, "validation")
    for i, line in enumerate(found):
        line["nll"]["best"] *= 2.0 if i % 3 == 0 else 1.0  # poems
    write_lines(folder / "examples.jsonl", found)
    (folder / "results.json").write_text(json.dumps(json.loads((folder / "results.json").read_text()) | {"tasks": {}}))
    figures, text = report.write(folder), (folder / "report.md").read_text()
    table = {(c["dimension"], c["name"]): c for c in figures["rows"]["categories"]}
    poems = table["creative", "yes"]
    assert poems["flag"] == "hard" and poems["factor"] > 1.5 and poems["documents"] == 40
    assert (figures["rows"]["forbidding"], figures["rows"]["broken"]) == (40, 40)
    assert figures["rows"]["checkable"] == {"nothing by machine": 80, "the label": 40}
    assert "Categories by loss" in text and "use them all the same" in text and "Examples: `creative: yes`" in text


def test_contamination_says_what_was_compared(run, figures, written):
    by = {c["asked"]: c for c in figures["contamination"]}
    kinds = {k["kind"]: k for k in by["gsm8k"]["found"]["kinds"]}
    assert kinds["duplicate"]["shared"] == 3 and by["gsm8k"]["found"]["trained"] == len(HELD) + 3
    expected = contamination.check([r["question"] for r in PROBE], [r["question"] for r in HELD])
    assert [k["shared"] for k in by["validation rows"]["found"]["kinds"]] == [s.shared for s in expected.sharings]
    assert "40 training rows, the probe: a sample of all" in written
    assert "**Contamination: raised.** " in written


def test_goodput_is_the_share_of_steps(tmp_path, undrawn):
    folder = finished(tmp_path / "run")
    assert report.write(folder)["goodput_phases"] is None
    write_lines(
        folder / "goodput.jsonl",
        [{"phase": p, "seconds": s, "start": "x"} for p, s in (("step", 60), ("load", 15), ("step", 25))],
    )
    found = report.write(folder)["goodput_phases"]
    assert found["seconds"] == {"step": 85.0, "load": 15.0} and found["useful"] == pytest.approx(0.85)
    assert "85.0 % of the logged time was spent in training steps" in (folder / "report.md").read_text()


def test_what_was_not_measured_is_said_and_what_was_is_not(run, figures, written, tmp_path, undrawn):
    left = written[written.index("## What was not measured") :]
    assert "one seed" in left and "Losses per example" not in left and "probe was off" not in left
    bare = finished(tmp_path / "bare")
    report.write(bare)
    left = (bare / "report.md").read_text().partition("## What was not measured")[2]
    for said in ("Losses per example", "probe was off", "paired test", "Other abilities", "phase by phase"):
        assert said in left
    assert "Rows that stand out" not in (bare / "report.md").read_text()


def test_epoch_ends_and_final_steps_are_reported_where_lines_suffice(tmp_path, undrawn):
    draw = np.random.default_rng(0)
    metrics = [
        {
            "step": s,
            "epoch": s / 100,
            "loss": 2.0 - 0.4 * ((s - 1) // 100) + draw.normal(0, 0.01),
            "num_tokens": 100 * s,
            "learning_rate": 1e-4,
        }
        for s in range(1, 301)
    ] + [{"step": s, "eval_loss": 2.0 - s / 300, "eval_mean_token_accuracy": 0.5} for s in (0, 150, 300)]
    folder = finished(tmp_path / "run", metrics=sorted(metrics, key=lambda r: r["step"]))
    figures = report.write(folder)
    assert [(d["step"], d["sudden"]) for d in figures["epoch_drops"]] == [(100, True), (200, True)]
    assert figures["epoch_drops"][0]["nats"] == pytest.approx(0.4, abs=0.02)
    final = figures["quantities"]["final_steps_change_percent"]
    assert final["interval"][0] < final["value"] < final["interval"][1] and math.isfinite(final["value"])
    assert "are being remembered" in (folder / "report.md").read_text()
