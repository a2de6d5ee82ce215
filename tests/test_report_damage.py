"""Reports of half-finished, damaged and hostile run folders: what is there, what is missing, and never a traceback."""

import copy
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from run_folders import evaluation, examples, measurement, replies, write_lines
from test_report import HOSTILE, TAGS, Page, undrawn
from test_report_sections import HELD, PROBE, whole

from jaxft import report
from jaxft.reports import content, fitting, html, markdown
from jaxft.reports.fitting import Fitter, Unfit, fitted
from jaxft.reports.folder import read
from jaxft.reports.records import Example, Problem

__all__ = ["undrawn"]
NEW = ("examples.jsonl", "tasks_final_answer.jsonl", "goodput.jsonl", "evaluations/1/results.json")
WRONG = (
    None, True, -1, 0, 0.5, 1e308, -1e308, 10**400, float("nan"), float("inf"), "", "text", HOSTILE, [], {}, [None], [[1, 2]],
    {"a": {"b": []}}, "9" * 5000,
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A small run with every file; tests copy it."""
    folder = whole(tmp_path_factory.mktemp("runs") / "sound")
    write_lines(folder / "goodput.jsonl", [{"phase": "step", "seconds": 5, "start": "x"}] * 3)
    asked = PROBE[:35]
    told = measurement("gsm8k", asked, replies(asked, 0.3, 3), replies(asked, 0.6, 4))
    evaluation(folder, "1", [told], [row["question"] for row in HELD])
    for name, keep in (("examples.jsonl", slice(None, None, 3)), ("tasks_final_answer.jsonl", slice(70))):
        lines = (folder / name).read_text().splitlines()[keep]
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run"))


def made(folder: Path) -> str:
    """All of a report but the plots, as text; JSON has to be strict."""
    found = content.find(read(folder))
    blocks = content.blocks(found, [])
    page = html.page("x", blocks)
    assert not Page(page).open
    return page + markdown.markdown(blocks) + json.dumps(fitting.plain(found.figures), allow_nan=False)


@pytest.mark.parametrize("name", NEW)
def test_a_new_file_that_is_missing_is_not_missed(folder, name):
    (folder / name).unlink()
    found = content.find(read(folder))
    missing = "\n".join(found.figures["missing"])
    assert ("evaluations/1/results.json is missing" in missing) == (name == NEW[3])
    made(folder)


@pytest.mark.parametrize("name", NEW)
def test_a_file_cut_short_is_named_and_the_rest_is_reported(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) * 2 // 3 - 4])
    found = content.find(read(folder))
    assert any(line.startswith(name) and "damaged" in line for line in found.figures["missing"])
    assert found.figures["eval_loss"]["best"] == 0.8
    if name == "examples.jsonl":
        assert found.figures["teacher_forced"]["examples"]["validation"] > 20
    made(folder)


ELSE = (b"", b"\xff\xfe\x00", b"[1, 2]", b"null\n", b"{}", b"[" * 100_000, b'{"split": NaN}')


@pytest.mark.parametrize("name", NEW)
def test_a_file_that_holds_something_else_is_named_or_empty(folder, name):
    for data in ELSE:
        (folder / name).write_bytes(data)
        named = any(name in line for line in read(folder).damage)
        assert named or (data == b"" and name != NEW[3]), data[:20]
    made(folder)


def test_folders_in_the_place_of_files_and_files_in_that_of_folders(folder):
    for name in NEW[:3]:
        (folder / name).unlink()
        (folder / name).mkdir()
    shutil.rmtree(folder / "evaluations")
    (folder / "evaluations").write_text("no folder")
    missing = "\n".join(content.find(read(folder)).figures["missing"])
    assert all(f"{name} cannot be read" in missing for name in NEW[:3])
    made(folder)


def mutated(value, draw: random.Random):
    """`value` with one part of it, anywhere, replaced or removed."""
    value = copy.deepcopy(value)
    holder, key = None, None
    inner = value
    while isinstance(inner, (dict, list)) and inner and (holder is None or draw.random() < 0.85):
        holder = inner
        key = draw.choice(list(inner)) if isinstance(inner, dict) else draw.randrange(len(inner))
        inner = inner[key]
    if holder is None:
        return draw.choice(WRONG)
    if draw.random() < 0.15:
        del holder[key]
    else:
        holder[key] = draw.choice(WRONG)
    return value


def damaged(folder: Path, seed: int) -> None:
    """Replaces parts of every file of a run."""
    draw = random.Random(seed)
    for name in ("config.json", "results.json", "metrics.jsonl", *NEW):
        text = (folder / name).read_text()
        if name.endswith("l"):
            lines = [json.loads(line) for line in text.splitlines()]
            for at in draw.sample(range(len(lines)), min(6, len(lines))):
                lines[at] = mutated(lines[at], draw)
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            value = json.loads(text)
            for _ in range(4):
                value = mutated(value, draw) if isinstance(value, dict) else value
            (folder / name).write_text(json.dumps(value))


def check_damage(sound: Path, folder: Path, seeds: range) -> None:
    for seed in seeds:
        at = folder / str(seed)
        shutil.copytree(sound, at)
        damaged(at, seed)
        try:
            made(at)
        except Exception as error:  # which seed it was is what a reader needs
            raise AssertionError(f"seed {seed}") from error


def test_any_part_may_be_of_a_wrong_kind(sound, tmp_path):
    check_damage(sound, tmp_path, range(6))


@pytest.mark.exhaustive
def test_any_part_may_be_of_a_wrong_kind_in_many_ways(sound, tmp_path):
    check_damage(sound, tmp_path, range(100, 500))


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e17], ids=["nought", "tiny", "huge"])
def test_losses_of_any_size_are_reported(folder, value):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: value if k.endswith("loss") else v for k, v in line.items()} for line in lines]
    write_lines(folder / "metrics.jsonl", lines)
    found = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    for line in found:
        line["nll"] = dict.fromkeys(line["nll"], min(value, 1e11))
    write_lines(folder / "examples.jsonl", found)
    made(folder)


def test_text_from_every_new_file_is_escaped(folder, tmp_path):
    rows = [{"question": f"{i} {HOSTILE}", "answer": f"{HOSTILE}\n#### {i}"} for i in range(40)]
    told = examples(rows, "validation") + examples(rows, "probe")
    for line in told:
        line["row"] = HOSTILE
    told[3]["nll"]["best"] *= 30
    write_lines(folder / "examples.jsonl", told)
    wrong = {"text": HOSTILE, "right": False, "cut": False, "found": HOSTILE}
    both = {"base": wrong, "tuned": wrong}
    problems = [{"doc": i, "question": r["question"], "reference": r["answer"], **both} for i, r in enumerate(rows)]
    write_lines(folder / "tasks_final_answer.jsonl", problems)
    (folder / "tasks_<b>x.jsonl").write_bytes((folder / "tasks_final_answer.jsonl").read_bytes())
    shutil.rmtree(folder / "evaluations")
    said = HOSTILE.replace("\ud800", "")  # no text that is written as UTF-8 has it
    paired = [{name: text.replace("\ud800", "") for name, text in row.items()} for row in rows]
    told = measurement(said[:60], paired, [said] * 40, [said] * 40)
    evaluation(folder, "<i>1", [told], [row["question"] for row in paired])
    write_lines(folder / "goodput.jsonl", [{"phase": HOSTILE, "seconds": 1}])
    found = content.find(read(folder))
    blocks = content.blocks(found, [])
    page = Page(html.page("x", blocks))
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags} and not page.open and TAGS in page.text
    text = markdown.markdown(blocks)
    assert "\x1b" not in text and "\u202e" not in text
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.M | re.S)
    prose = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
    assert not re.search(r"(?<!\\)<", prose)
    from jaxft.reports.comparison import printed
    from jaxft.reports.document import terminal

    for said in (terminal(content.verdict(found)), printed([found, found])):
        assert "\x1b" not in said and "\u202e" not in said


def test_what_fits_is_read_and_what_does_not_is_counted():
    line = examples(HELD[:1], "validation")[0]
    example = fitted(Example, line | {"more": 1})
    assert example.tokens == line["tokens"] and example.nll.best == line["nll"]["best"] and example.sound
    assert fitted(Example, {k: v for k, v in line.items() if k not in ("cut", "bytes", "kinds")}).kinds == {}
    for wrong in ({"tokens": 1.5}, {"tokens": True}, {"nll": {"base": 1.0}}, {"question": 3}, {"nll": None}):
        with pytest.raises(Unfit):
            fitted(Example, line | wrong)
    for wrong in ({"tokens": 0}, {"split": "test"}, {"correct": dict.fromkeys(line["nll"], 10**9)}):
        assert not fitted(Example, line | wrong).sound
    fit = Fitter()
    assert fit.many(Problem, [{"doc": 1, "question": "q", "reference": "r"}, {"doc": "1"}, 7])[0].base is None
    assert fit.left_out == 2
    assert fit.one(tuple[float, float], [1, 2]) == (1, 2) and fit.one(tuple[float, float], [1, 2, 3]) is None
    assert fit.named(float, {"a": 1, "b": 10**400, "c": float("nan")}) == {"a": 1} and fit.left_out == 5
    assert fitting.number(1e18) is None and fitting.number(True) is None and fitting.number(-5) == -5


def test_the_verb_reports_a_damaged_folder_and_exits_well(folder, capsys, undrawn):
    damaged(folder, 3)
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 2.0}\n{"step": 1, "lo')
    assert report.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "has not finished" in said or "The run ended" in said
    assert "Missing from this run folder" in (folder / "report.md").read_text()
