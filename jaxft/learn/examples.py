"""What a run keeps of single examples: losses at the base, the best and the last step, and answers to tasks' problems.

Small files in the run folder's `examples/`, written when they are measured, so that a run that is resumed has them too; at
the end `examples.jsonl` and a `tasks_TASK.jsonl` for each task are made of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft import disk
from jaxft.learn.evaluator import Evaluation, Found, Rows

SHOWN = 2000  # characters of a text
NEWEST = 2  # evaluations kept beside the base's and the best one's


class Text(NamedTuple):
    """What a row asks and answers, and where it came from."""

    origin: str
    question: str
    answer: str


class Examples:
    """The files of one run folder; where it does not `write`, as on all processes but one, it does nothing."""

    def __init__(self, run: Path, writes: bool = True):
        self._run, self._folder, self._writes = run, run / "examples", writes

    def keep(self, step: int, found: Evaluation, best: int | None) -> None:
        """Writes what an evaluation found; keeps those of step 0, of step `best`, and the newest."""
        if not self._writes:
            return
        _write(self._step(step), json.dumps({name: _plain(of) for name, of in found.items()}) + "\n")
        steps = sorted(
            int(file.stem.removeprefix("step_"))
            for file in self._folder.glob("step_*.json")
            if file.stem.removeprefix("step_").isdecimal()
        )
        for old in set(steps[:-NEWEST]) - {0, best}:
            self._step(old).unlink(missing_ok=True)

    def write(self, rows: Mapping[str, Rows], texts: Mapping[str, Sequence[Text]], best: int, end: int) -> bool:
        """Makes `examples.jsonl` of steps 0, `best` and `end`: whether all three were there, as in a run that began here."""
        if not self._writes:
            return False
        lines: list[str] = []
        for name, of in rows.items():
            found = {time: self._read(step, name, of) for time, step in (("base", 0), ("best", best), ("end", end))}
            if None not in found.values():
                lines += _lines(name, of, texts[name], found)  # type: ignore[arg-type]
        if lines:
            _write(self._run / "examples.jsonl", "".join(lines))
        return bool(lines)

    def keep_answers(self, task: str, side: str, problems: Sequence[Mapping[str, Any]]) -> None:
        """Keeps one side's answers to a task's problems (base or tuned): doc, question, reference, and what was answered."""
        if not self._writes:
            return
        file = self._folder / f"{task}.base.json"
        if side == "base":
            _write(file, json.dumps(list(problems)) + "\n")
            return
        base = _loaded(file)
        if not isinstance(base, list) or len(base) != len(problems):
            return
        shared = ("doc", "question", "reference")
        lines = []
        for before, after in zip(base, problems):
            if not isinstance(before, dict) or any(before.get(key) != after[key] for key in shared):
                return  # measured on other problems, as with another eval.limit
            sides = {
                name: {k: v for k, v in of.items() if k not in shared} for name, of in (("base", before), (side, after))
            }
            lines.append(json.dumps({key: after[key] for key in shared} | sides) + "\n")
        _write(self._run / f"tasks_{task}.jsonl", "".join(lines))

    def _step(self, step: int) -> Path:
        return self._folder / f"step_{step}.json"

    def _read(self, step: int, name: str, rows: Rows) -> Found | None:
        """None where nothing was kept, or not of these rows."""
        kept = _loaded(self._step(step))
        of = kept.get(name) if isinstance(kept, dict) else None
        try:
            kinds = {kind: np.array(of["kinds"][kind], np.int64) for kind in rows.kinds}
            found = Found(np.array(of["nll"], np.float64), np.array(of["correct"], np.int64), kinds)
        except (TypeError, KeyError, ValueError, OverflowError):
            return None
        shapes = {array.shape for array in (found.nll, found.correct, *kinds.values())}
        return found if shapes == {(len(rows),)} and np.isfinite(found.nll).all() else None


def _plain(found: Found) -> dict[str, Any]:
    kinds = {name: correct.tolist() for name, correct in found.kinds.items()}
    return {"nll": found.nll.tolist(), "correct": found.correct.tolist(), "kinds": kinds}


def _lines(name: str, rows: Rows, texts: Sequence[Text], found: Mapping[str, Found]) -> list[str]:
    lines = []
    for i, text in enumerate(texts):
        kinds = {
            kind: {"tokens": int(tokens[i]), "correct": {time: int(of.kinds[kind][i]) for time, of in found.items()}}
            for kind, tokens in rows.kinds.items()
        }
        line = {
            "split": name, "row": text.origin, "question": text.question[:SHOWN], "answer": text.answer[:SHOWN],
            "tokens": int(rows.tokens[i]), "bytes": int(rows.bytes[i]), "cut": rows.cut[i],
            "nll": {time: float(of.nll[i]) for time, of in found.items()},
            "correct": {time: int(of.correct[i]) for time, of in found.items()},
            "kinds": kinds,
        }  # fmt: skip
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def _loaded(file: Path) -> Any:
    """None where there is no such file, or none that can be read: these are measurements, and no run stops for want of them."""
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _write(file: Path, text: str) -> None:
    """A kill leaves the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    disk.write_text(file, text)
