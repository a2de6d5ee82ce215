"""A run folder, read with tolerance: what is there, and what is missing or damaged."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.errors import UserError

FILES = ("config.json", "metrics.jsonl", "results.json")


@dataclass(frozen=True)
class RunRecord:
    """What a run folder tells of its run; every part may be empty. `damage` says in words what could not be read."""

    path: Path
    config: dict[str, Any]
    results: dict[str, Any]
    train: list[dict[str, Any]]  # log lines of training, by step
    evaluations: list[dict[str, Any]]  # evaluation lines, by step
    damage: list[str]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    def setting(self, key: str) -> Any:
        """`section.field` of the resolved config; None where it is missing."""
        return _at(self.config, key)

    def fact(self, key: str) -> Any:
        """`key` or `section.key` of results.json; None where it is missing."""
        return _at(self.results, key)

    def count(self, key: str) -> float | None:
        """A fact that is a number."""
        return number(self.fact(key))


def read(path: Path) -> RunRecord:
    """Reads a run folder; a UserError where `path` is no folder or holds nothing that a run writes."""
    if not path.is_dir():
        raise UserError(f"{path}: {'a file' if path.exists() else 'no such folder'}; expected a run folder (run.dir)")
    damage: list[str] = []
    config, results = _record(path / "config.json", damage), _record(path / "results.json", damage)
    if config and not all(isinstance(config.get(section), dict) for section in ("model", "data", "optim")):
        damage.append("config.json is not a run's: it lacks the sections model, data and optim")
        config = {}
    lines = _lines(path / "metrics.jsonl", damage)
    if not (config or results or lines):
        found = [f for f in FILES if (path / f).exists()]
        raise UserError(
            f"{path}: not a run folder; expected {', '.join(FILES)} as `python -m jaxft.train` writes them, found "
            + (f"only {', '.join(found)} with nothing of a run in it" if found else "none of them")
        )
    return RunRecord(path, config, results, _by_step(lines, "loss"), _by_step(lines, "eval_loss"), damage)


def number(value: Any) -> float | None:
    """A finite int or float as it is, anything else as None."""
    try:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond float64
        good = False
    return value if good else None


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _record(file: Path, damage: list[str]) -> dict[str, Any]:
    text = _text(file, damage)
    value = None if text is None else _parsed(text)
    if text is not None and not isinstance(value, dict):
        damage.append(f"{file.name} is damaged: not a JSON object")
    return value if isinstance(value, dict) else {}


def _lines(file: Path, damage: list[str]) -> list[dict[str, Any]]:
    written = (_text(file, damage) or "").split("\n")
    parsed = [_parsed(line) for line in written if line.strip()]
    records = [r for r in parsed if isinstance(r, dict) and isinstance(number(r.get("step")), int)]
    if len(records) < len(parsed):
        damage.append(f"metrics.jsonl is damaged: {len(parsed) - len(records)} of {len(parsed)} lines left out")
    return records


def _text(file: Path, damage: list[str]) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        damage.append(f"{file.name} is missing")
    except OSError as error:
        damage.append(f"{file.name} cannot be read: {error.strerror}")
    return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _by_step(records: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Records that have a finite `key`, one per step (the last written wins), in order."""
    kept = {r["step"]: r for r in records if number(r.get(key)) is not None}
    return [kept[step] for step in sorted(kept)]
