"""The rows of native tasks: what is asked, what shots are drawn from, and what was trained on, for contamination."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jaxft import config
from jaxft.data import rows
from jaxft.data.loader import sample
from jaxft.data.rows import Row
from jaxft.errors import UserError, one_line
from jaxft.evals.tasks import question

GSM8K = config.Data(name="openai/gsm8k", subset="main", test_split="test", validation_fraction=0.0)


@dataclass(frozen=True)
class Material:
    """`asked` and `pool` are rows, `source` where the first come from; `trained` are questions that training saw, if known."""

    asked: list[Row]
    pool: list[Row]
    source: str


@dataclass(frozen=True)
class Run:
    """A run folder: its settings for data, and the adapter in it."""

    folder: Path
    data: config.Data
    seed: int
    max_new_tokens: int
    model: config.Model
    """The run's section of that name; its own name is "" where the run's is not known."""

    @property
    def adapter(self) -> Path:
        """The best adapter."""
        return self.folder / "adapter"


def run_of(folder: Path) -> Run | None:
    """The run that `folder` is, or whose adapter it is; None where it is an adapter alone. UserError for a run without one."""
    place = folder.parent if folder.name == "adapter" and not (folder / "config.json").is_file() else folder
    try:
        settings = json.loads((place / "config.json").read_text())
        data, model = _section(config.Data, settings["data"]), _section(config.Model, settings["model"])
        run, limits = settings["run"], settings.get("eval", {})
        seed, longest = run.get("seed", 0), limits.get("max_new_tokens", 256)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not (place / "adapter" / "adapter_config.json").is_file():
        whole = f"; it trained every weight: give --model {place / 'model'}" if (place / "model").is_dir() else ""
        raise UserError(f"--adapter {folder}: a run folder without an adapter{whole}")
    return Run(place, data, seed, longest, model)


def _section(record: type, told: Mapping[str, Any]) -> Any:
    """A section of a resolved config, with the fields that this version knows."""
    known = {field.name for field in fields(record)}
    return record(**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if k in known})


def of_run(run: Run) -> Material:
    """What training measured its tasks on: the run's test rows, or those it held out."""
    splits = _load(run.data, run.seed, "the run's data")
    label = "test" if splits.test else "validation"
    where = " ".join(run.data.test_files or run.data.files) or run.data.name
    return Material(splits.test or splits.validation, splits.train, f"{label} rows of {where} (the run's own)")


def seen(run: Run, held: Material, count: int) -> Material:
    """`count` of the run's training rows, `held.pool`, drawn by the run's seed as training draws its probe."""
    drawn = sample(min(count, len(held.pool)), len(held.pool), run.seed)
    source = held.source.replace("test rows", "training rows").replace("validation rows", "training rows")
    return Material([held.pool[i] for i in drawn], held.pool, source)


def trained_questions(run: Run | None, files: Sequence[str]) -> list[str]:
    """The questions that training saw: of `files`, else of the run's training rows."""
    if files:
        found = _load(config.Data(files=tuple(files), validation_fraction=0.0), 0, "--train-files").train
    elif run is not None:
        found = _load(run.data, run.seed, "the run's data").train
    else:
        return []
    return [text for row in found if (text := question(row))]


def of_options(name: str | None, split: str, files: Sequence[str], shot_files: Sequence[str]) -> Material:
    """Rows of `files`, else of a split of a named dataset; the pool is `shot_files`, else the dataset's train split."""
    pool = []
    if shot_files:
        pool = _load(config.Data(files=tuple(shot_files), validation_fraction=0.0), 0, "--shot-files").train
    if files:
        asked = _load(config.Data(files=tuple(files), validation_fraction=0.0), 0, "--test-files").train
        return Material(asked, pool, " ".join(files))
    data = replace(GSM8K, test_split=split)
    if name not in (None, GSM8K.name):
        data = replace(data, name=name, subset=None)
    splits = _load(data, 0, f"--data {data.name}")
    return Material(splits.test, pool or splits.train, f"{data.name}/{split}")


def _load(data: config.Data, seed: int, what: str) -> rows.Splits:
    try:
        return rows.load(data, seed)
    except UserError as error:
        raise UserError(
            f"{what}: {one_line(error)} (rows can be given with --test-files, shots with --shot-files)"
        ) from error


def described(material: Material) -> Mapping[str, Any]:
    """JSON-ready."""
    return {"rows": material.source, "asked": len(material.asked), "pool": len(material.pool)}
