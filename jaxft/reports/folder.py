"""A run folder, read with tolerance: what is there, and what is missing or damaged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxft.errors import UserError
from jaxft.reports import evaluations, records
from jaxft.reports.fitting import number
from jaxft.reports.records import parsed, text_of

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
    examples: list[records.Example] = field(default_factory=list)  # of the validation rows and the probe
    answers: dict[str, list[records.Problem]] = field(default_factory=dict)  # of the run's own tasks
    measured: list[evaluations.Evaluation] = field(
        default_factory=list
    )  # of `python -m jaxft.evaluate`, the oldest first
    phases: list[records.Phase] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def of_gsm8k(self) -> bool:
        """Whether the rows are GSM8K's own, as far as the name of their source tells."""
        files = self.setting("data.files")
        names = files if isinstance(files, list) and files else [self.setting("data.name")]
        return any("gsm8k" in str(name).casefold() for name in names)

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
    config, results = (records.object_of(path / f"{name}.json", damage) or {} for name in ("config", "results"))
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
    return RunRecord(
        path, config, results, _by_step(lines, "loss"), _by_step(lines, "eval_loss"), damage,
        examples=records.examples(path, damage),
        answers=records.answers(path, damage),
        measured=evaluations.evaluations(path, damage),
        phases=records.phases(path, damage),
    )  # fmt: skip


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _lines(file: Path, damage: list[str]) -> list[dict[str, Any]]:
    written = (text_of(file, damage) or "").split("\n")
    read = [parsed(line) for line in written if line.strip()]
    kept = [r for r in read if isinstance(r, dict) and isinstance(number(r.get("step")), int) and r["step"] >= 0]
    if len(kept) < len(read):
        damage.append(f"metrics.jsonl is damaged: {len(read) - len(kept)} of {len(read)} lines left out")
    return kept


def _by_step(records: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Records that have a finite `key`, one per step (the last written wins), in order."""
    kept = {r["step"]: r for r in records if number(r.get(key)) is not None}
    return [kept[step] for step in sorted(kept)]
