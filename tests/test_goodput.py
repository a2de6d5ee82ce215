"""goodput.jsonl: phases without a gap, and what a kill has lost."""

import json
import time
from datetime import UTC, datetime

import pytest
from launched import Run, saved

from jaxft.learn.goodput import Goodput, process_began
from jaxft.reports.folder import read


def lines(folder):
    return [json.loads(line) for line in (folder / "goodput.jsonl").read_text().splitlines()]


def phases(folder):
    return [(line["phase"], line.get("step")) for line in lines(folder)]


def test_phases_follow_each_other_without_a_gap_and_waiting_is_taken_out_of_steps(tmp_path):
    began = time.monotonic() - 5.0
    clock = Goodput(began)
    clock.begin("load")
    time.sleep(0.02)
    clock.begin("step")
    clock.open(tmp_path, None)
    time.sleep(0.05)
    clock.waited(0.02)
    clock.begin("save", 10)
    time.sleep(0.01)
    clock.close(10)
    took = time.monotonic() - began
    assert phases(tmp_path) == [("import", None), ("load", None), ("data_wait", 10), ("step", 10), ("save", 10)]
    assert sum(line["seconds"] for line in lines(tmp_path)) == pytest.approx(took, abs=0.01)
    assert [line["seconds"] for line in lines(tmp_path)][2] == pytest.approx(0.02)
    assert 0 < time.monotonic() - process_began() < 86400


def test_what_came_after_the_checkpoint_that_a_run_goes_on_from_is_lost(tmp_path):
    made = [("load", None), ("evaluate", 0), ("step", 5), ("save", 5), ("step", 8), ("data_wait", 8)]
    records = [{"phase": phase, "seconds": 1.0} | ({} if step is None else {"step": step}) for phase, step in made]
    (tmp_path / "goodput.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"phase": "st')
    clock = Goodput(time.monotonic() - 1)
    clock.open(tmp_path, 5)
    clock.close()
    lost = [("lost", 8), ("lost", 8)]
    assert phases(tmp_path) == [("load", None), ("evaluate", 0), ("step", 5), ("save", 5), *lost, ("import", None)]
    Goodput(time.monotonic()).open(tmp_path, None)  # no checkpoint is left
    assert [phase for phase, _ in phases(tmp_path)] == ["load", *["lost"] * 5, "import"]


@pytest.mark.slow
def test_the_phases_of_a_run_that_was_killed_add_up_to_its_wall_time_and_the_report_has_them(tmp_path):
    more = ("--optim.max_steps", "40", "--eval.every_steps", "20")
    with Run(tmp_path / "run", 1, 1, *more) as run:
        run.until(saved(run.folder, 20), what="step 20")
        run.processes[0].kill()
    began = datetime.now(UTC)
    with Run(run.folder, 1, 1, *more) as again:
        again.all_end_well()
    found = lines(run.folder)
    assert {"import", "load", "compile", "step", "evaluate", "save", "export"} <= {line["phase"] for line in found}
    own = found[max(i for i, line in enumerate(found) if line["phase"] == "import") :]
    first, last = (datetime.fromisoformat(own[i]["start"]) for i in (0, -1))
    assert abs((first - began).total_seconds()) < 1
    took = (last - first).total_seconds() + own[-1]["seconds"]
    assert sum(line["seconds"] for line in own) == pytest.approx(took, rel=0.02)
    report = json.loads((run.folder / "report.json").read_text())["goodput_phases"]
    assert 0 < report["useful"] < 1 and report["counts"]["import"] == 2
    assert "Goodput" in (run.folder / "report.md").read_text() and read(run.folder).damage == []
