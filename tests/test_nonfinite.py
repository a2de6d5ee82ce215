"""A loss or gradient that is not finite: no update, the rows named, the run stopped after three, and nothing of it saved."""

import dataclasses
import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_train import one_device, start  # noqa: F401

from jaxft.data.loader import Loader
from jaxft.errors import UserError
from jaxft.learn.loop import Loop

MORE = ("--optim.max_steps", "10", "--eval.every_steps", "5", "--run.log_every", "2")


def poisoned(*bad):
    """A `Loader.batch_at` whose batches of these steps, from 0, lead to an infinite loss."""
    make = Loader.batch_at

    def batch_at(self, step, rows=None):
        batch = make(self, step, rows)
        if step not in bad:
            return batch
        return dataclasses.replace(batch, weights=np.where(batch.weights > 0, np.float32(np.inf), np.float32(0)))

    return batch_at


def records(folder):
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_bad_batch_changes_nothing_its_rows_are_named_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Loader, "batch_at", poisoned(3, 4, 7))
    loops, begin = [], Loop.__init__
    monkeypatch.setattr(Loop, "__init__", lambda self, *arguments: loops.append(self) or begin(self, *arguments))
    start(tmp_path, *MORE)
    found = records(tmp_path)
    skipped = [r for r in found if "skipped_rows" in r]
    assert [(r["step"], r["skipped"]) for r in skipped] == [(4, 1), (5, 2), (8, 3)]
    loader = loops[0].parts.train
    assert [r["skipped_rows"] for r in skipped] == [loader.origins_at(step) for step in (3, 4, 7)]
    assert len(loader.origins_at(3)) >= 8 and all("word_problems" in row for row in skipped[0]["skipped_rows"])
    said = capsys.readouterr().out
    assert "step 4: loss inf, not finite: no update; its rows are generated:word_problems/train" in said
    assert [r["step"] for r in found if "loss" in r] == [2, 4, 6, 8, 10]
    schedule = loops[0].parts.schedule
    rates = {r["step"]: r["learning_rate"] for r in found if "learning_rate" in r}
    assert rates[10] == float(schedule(10 - 1 - 3))  # the schedule waits too
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["state"], results["skipped_steps"], results["step"]) == ("finished", 3, 10)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(np.isfinite(value).all() for value in adapter.values())
    assert all(math.isfinite(v) for r in found for v in r.values() if isinstance(v, float))


@pytest.mark.slow  # four starts
def test_three_in_a_row_stop_the_run_and_again_when_it_resumes_until_more_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Loader, "batch_at", poisoned(5, 6, 7))
    more = (*MORE, "--run.log_every", "10")
    for _ in range(2):
        said = r"in 3 steps in a row, 6 to 8; step 5 was the last good one, and the newest checkpoint, step 5, is good"
        with pytest.raises(UserError, match=said):
            start(tmp_path, *more)
        assert not (tmp_path / "adapter").exists()
    start(tmp_path, *more, "--optim.stop_after_nonfinite", "4")
    assert json.loads((tmp_path / "results.json").read_text())["skipped_steps"] == 3


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    """Without epsilon, Adam divides the nought of a gradient by the nought of its moment."""
    more = ("--optim.epsilon", "0", "--data.validation_fraction", "0", "--eval.every_steps", "1")
    with pytest.raises(UserError, match=r"is no longer finite, .* newest checkpoint, step 0, is good: .*optim.epsilon"):
        start(tmp_path, *more)
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["0"]
