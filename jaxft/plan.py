"""`python -m jaxft.plan --config NAME --topology v5e-8`: what a run takes of chips: memory, time and money, before renting."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxft
from jaxft import command_line, config
from jaxft.errors import OutOfResources, UserError, run_verb

if TYPE_CHECKING:
    import jax

    from jaxft.learn.recompute import Compiled
    from jaxft.plans.place import Place
    from jaxft.plans.reading import Reading
    from jaxft.plans.row import Row

PROG = "python -m jaxft.plan"
OWN = {
    "topology": ("NAMES", "TPU slices or GPUs, such as v5e-8,2xv5e-16,8xH100"),
    "batch": ("N", "sequences per step; auto finds the best for each place"),
    "tokens": ("N", "real tokens of one epoch, where the rows are not here to count"),
    "json": ("FILE", "write all figures there, a row as soon as it is known"),
    "resume": ("", "take rows from that file that were planned with the same settings and versions"),
    "plot": ("FILE", "draw hours against USD there (png, svg, pdf)"),
    "markdown": ("", "print the table in Markdown"),
}


def main(argv: list[str]) -> None:
    """Plans a config on one place or several. Raises UserError, and OutOfResources where nothing fits."""
    path, overrides, own = command_line.split(argv, PROG, OWN)
    if "topology" not in own:
        raise UserError("--topology NAMES is missing; a TPU slice such as v5e-8, or several: v5e-4,v5e-8,v6e-8")
    settings = _with_batch(config.load(path, overrides), own.get("batch"))
    from jaxft.plans import plot, sweep, table

    places = _places(own["topology"], settings)
    reading = _reading(settings, own.get("tokens"))
    file, chart = _file(own, "json", (".json",)), _file(own, "plot", (".png", ".svg", ".pdf"))
    kept = sweep.read(file) if file is not None and "resume" in own else []
    rows: list[Row] = []
    for row in sweep.rows(settings, places, own.get("batch"), reading, _say, kept, jaxft.__version__):
        rows.append(row)
        if file is not None:
            _write(file, settings, Path(path).stem, rows)
    best = sweep.recommended(rows)
    if len(rows) == 1 and rows[0]["fits"] and "markdown" not in own:
        print(table.block(rows[0]))
    elif len(rows) > 1 or "markdown" in own:
        print(table.markdown(rows) if "markdown" in own else table.table(rows))
        print(f"\n{table.notes(rows, best)}")
    if chart is not None:
        plot.save(chart, rows, f"{settings.model.name} on {settings.data.name or 'own rows'}")
    if not any(row["fits"] for row in rows):
        raise _nothing(rows)


def lowered(settings: config.Config, topology: str) -> jax.stages.Lowered:
    """The very training step that `train` runs, lowered for that TPU topology.

    With `model.remat` auto it is compiled first, to find the policy that fits the chips. Raises UserError, and
    OutOfResources where no policy fits.
    """
    from jaxft.plans import program

    return program.lowered(settings, topology)


def compiled(settings: config.Config, topology: str) -> Compiled:
    """That step compiled, and what it takes of a chip."""
    from jaxft.plans import program

    return program.build(settings, topology).compiled


def _with_batch(settings: config.Config, batch: str | None) -> config.Config:
    if batch is None or batch == "auto":
        return settings
    changed = dataclasses.replace(
        settings, optim=dataclasses.replace(settings.optim, batch_size=_count(batch, "--batch"))
    )
    config.validate(changed)
    return changed


def _count(text: str, option: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{option} {text}: expected a whole number above 0{', or auto' if option == '--batch' else ''}")
    return int(text)


def _file(own: dict[str, str], option: str, endings: tuple[str, ...]) -> Path | None:
    """Where to write, checked before a minute of compiling."""
    if option not in own:
        return None
    file = Path(own[option])
    if file.suffix.lower() not in endings:
        raise UserError(f"--{option} {file}: expected a name that ends in {' or '.join(endings)}")
    if not file.parent.is_dir() or file.is_dir():
        raise UserError(f"--{option} {file}: there is no folder {file.parent} to write it to")
    return file


def _places(names: str, settings: config.Config) -> list[Place]:
    """Known names only; and where one is a TPU's, its compiler is there."""
    from jaxft.parallel import topology
    from jaxft.plans import place

    each = dict.fromkeys(name.strip() for name in names.split(",") if name.strip())
    found = [place.parse(name, settings.run.usd_per_chip_hour) for name in each]
    if not found:
        raise UserError(f"--topology {names!r}: no name in it; such as v5e-8, or several: v5e-4,v5e-8,v6e-8")
    first = next((each for each in found if each.topology is not None), None)
    if first is not None:
        topology.devices(first.name)
    return found


def _reading(settings: config.Config, tokens: str | None) -> Reading | None:
    from jaxft.plans import reading
    from jaxft.weights import model

    arch = model.sketch(settings.model, settings.lora).arch
    given = None if tokens is None else _count(tokens, "--tokens")
    return reading.of_run(settings, arch.family, arch.vocab_size, arch.max_positions, given)


def _write(file: Path, settings: config.Config, name: str, rows: list[Row]) -> None:
    from jaxft.plans import sweep

    whole: dict[str, Any] = {
        "config": name, "model": settings.model.name, "date": date.today().isoformat(),
        "versions": sweep.versions(jaxft.__version__), **sweep.recommended(rows), "rows": rows,
    }  # fmt: skip
    try:
        file.write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n", "utf-8")
    except OSError as error:
        raise UserError(f"--json {file}: cannot be written: {error.strerror}") from error


def _nothing(rows: list[Row]) -> Exception:
    """Why there is no row that fits: of one, its own reason."""
    memory = all(row["error_kind"] == "memory" for row in rows)
    said = (
        rows[0]["error"] if len(rows) == 1 else f"none of the {len(rows)} places can run this; the reasons stand above"
    )
    return OutOfResources(said) if memory else UserError(said)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_verb(main)
