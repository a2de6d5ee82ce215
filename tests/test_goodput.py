"""goodput.jsonl: phases without a gap, and what a kill has lost."""

import json
import time
from datetime import datetime

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


def test_a_start_that_comes_to_nothing_leaves_its_lines_where_a_run_is_and_nowhere_else(tmp_path):
    with pytest.raises(ZeroDivisionError), Goodput(time.monotonic() - 2).ended(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "goodput.jsonl").write_text('{"phase": "step", "seconds": 1.0, "step": 5}\n{"phase": "st')
    clock = Goodput(time.monotonic() - 2)
    with pytest.raises(ZeroDivisionError), clock.ended(tmp_path):
        clock.begin("load")
        time.sleep(0.01)
        raise ZeroDivisionError
    clock.begin("save")  # too late
    again = Goodput(time.monotonic() - 2)
    again.open(tmp_path, 5)
    again.close()
    assert [line["phase"] for line in lines(tmp_path)] == ["step", "import", "load", "import"]


def timed(folder, *more):
    """Of a run that ends well: its seconds from outside, and the lines of its last start."""
    began = time.monotonic()
    with Run(folder, 1, 1, *more) as run:
        run.all_end_well()
    took, found = time.monotonic() - began, lines(run.folder)
    return took, found[max(i for i, line in enumerate(found) if line["phase"] == "import") :]


@pytest.mark.slow
def test_the_phases_of_a_run_add_up_to_its_processs_wall_time_also_after_a_kill_and_the_report_has_them(tmp_path):
    """Within 2 % of what somebody sees who starts the process and waits for its end."""
    more = ("--optim.max_steps", "40", "--eval.every_steps", "20")
    took, own = timed(tmp_path / "fresh", *more)
    assert sum(line["seconds"] for line in own) == pytest.approx(took, rel=0.02)
    with Run(tmp_path / "run", 1, 1, *more) as run:
        run.until(saved(run.folder, 20), what="step 20")
        run.processes[0].kill()
    took, own = timed(run.folder, *more)
    assert sum(line["seconds"] for line in own) == pytest.approx(took, rel=0.02)
    found = lines(run.folder)
    assert {"import", "load", "compile", "step", "evaluate", "save", "export"} <= {line["phase"] for line in found}
    first, last = (datetime.fromisoformat(own[i]["start"]) for i in (0, -1))
    assert (last - first).total_seconds() + own[-1]["seconds"] == pytest.approx(took, rel=0.02)  # no gap
    report = json.loads((run.folder / "report.json").read_text())["goodput_phases"]
    assert 0 < report["useful"] < 1 and report["counts"]["import"] == 2
    assert "Goodput" in (run.folder / "report.md").read_text() and read(run.folder).damage == []
