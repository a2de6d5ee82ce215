"""Places and batches compared: few programs are compiled, and the cheapest and the fastest of those that fit are named."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxft.config import Config, fingerprint, to_dict
from jaxft.errors import UserError
from jaxft.learn import recompute
from jaxft.plans import estimate, program, roofline, row
from jaxft.plans import place as places
from jaxft.plans.estimate import Step
from jaxft.plans.place import Place
from jaxft.plans.reading import Reading
from jaxft.plans.row import Row
from jaxft.weights import model

MOST_ROWS = 64  # per chip
LEAST_STEPS = 100  # of a run whose length is known; a larger batch would leave too few to learn in
EQUAL = 0.98  # of the best rate is as good; of such batches that nearest to the config's is taken
COMPILES = 4  # of one place, at most


def best_batch(settings: Config, place: Place, reading: Reading | None, say: Callable[[str], None]) -> Row:
    """The row of the batch and policy with the most tokens per second, which on one place is the least USD per token.

    Arithmetic puts powers of two of rows per chip in order and rules out what cannot fit; the compiler is asked in that order
    until one fits.
    """
    try:
        candidates = ranked(settings, place, reading)
    except UserError:
        return row.plan(settings, place, reading)  # which says why
    found: Row | None = None
    refused: list[Step] = []
    asked = 0
    for step in candidates:
        if any(step.policy == other.policy and step.rows >= other.rows for other in refused):
            continue
        if asked == COMPILES:
            break
        asked += 1
        say(f"{place.name}: {step.rows} rows, {step.policy}")
        found = row.plan(program.with_batch(settings, step.rows, step.policy), place, reading)
        if found["fits"]:
            break
        refused.append(step)
    if found is None:  # nothing fits by arithmetic: the leanest is planned, which says what it needs
        least = least_rows(settings, place)
        say(f"{place.name}: {least} rows")
        found = row.plan(program.with_batch(settings, least), place, reading)
        asked = 1
    return found | {"batch": "auto", "programs_compiled": asked if place.topology else 0}


def least_rows(settings: Config, place: Place) -> int:
    """The smallest batch that splits evenly."""
    mesh = places.sizes(settings.mesh, place)
    return mesh["data"] * mesh["fsdp"] * settings.optim.accumulation_steps


def ranked(settings: Config, place: Place, reading: Reading | None) -> list[Step]:
    """Batches with their policies that may fit, best first. Raises UserError for a mesh that cannot be."""
    source, mesh = model.sketch(settings.model, settings.lora), places.sizes(settings.mesh, place)
    least = least_rows(settings, place)
    most = MOST_ROWS * least
    if reading is not None:
        sequences = reading.tokens * settings.optim.epochs / reading.fill / program.shape(settings, source)[1]
        most = min(most, max(least, int(sequences / LEAST_STEPS)))
    rated = []
    for doubled in range(most // least):
        rows = least * 2**doubled
        if rows > most:
            break
        for policy in recompute.policies(settings.model.remat, "tpu"):
            step = row.described(program.with_batch(settings, rows), source, policy, mesh, place.slices)
            if sum(estimate.memory(step).values()) <= recompute.HOPELESS * place.chip.hbm_bytes:
                rated.append((rate(step, place), step))
    top = max((speed for speed, _ in rated), default=0.0)
    good = [step for speed, step in rated if speed >= EQUAL * top]
    rest = [step for speed, step in sorted(rated, key=lambda each: -each[0]) if speed < EQUAL * top]
    return sorted(good, key=lambda step: abs(math.log(step.rows / settings.optim.batch_size))) + rest


def rate(step: Step, place: Place) -> float:
    """Positions per second by arithmetic."""
    flops = (estimate.flops_per_token(step) + estimate.attention_flops_per_token(step)) * step.rows * step.length
    network = estimate.ici_bytes(step), estimate.dcn_bytes(step)
    demand = roofline.Demand(step.rows * step.length, flops / step.chips, estimate.hbm_bytes(step), *network)
    return demand.tokens / roofline.times(demand, place).expected_step_seconds


def rows(
    settings: Config, found: Sequence[Place], batch: str | None, reading: Reading | None, say: Callable[[str], None],
    kept: Sequence[Row] = (), version: str = "",
) -> Iterator[Row]:  # fmt: skip
    """A row for each place, in turn. `batch` is auto, else the config's; a kept row of equal settings serves again."""
    known = {each.get("fingerprint"): each for each in kept}
    for place in found:
        key = fingerprint(_settings(settings), place.name, batch, vars(reading) if reading else None, versions(version))
        if key in known:
            yield known[key]
            continue
        say(f"planning {place.name}")
        made = best_batch(settings, place, reading, say) if batch == "auto" else row.plan(settings, place, reading)
        yield {**made, "fingerprint": key}


def _settings(settings: Config) -> dict[str, Any]:
    """Those that a plan depends on."""
    whole = to_dict(settings)
    return {name: whole[name] for name in ("model", "lora", "data", "optim", "mesh", "eval")} | {
        "usd": settings.run.usd_per_chip_hour
    }


def versions(version: str) -> dict[str, str]:
    """Of what decides the figures, and how hard XLA tries (JAX_OPTIMIZATION_LEVEL); `version` is jaxft's."""
    try:
        compiler = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        compiler = "none"
    level = str(jax.config.jax_optimization_level)
    return {"jaxft": version, "jax": jax.__version__, "libtpu": compiler, "optimization_level": level}


def recommended(found: Sequence[Row]) -> dict[str, str | None]:
    """The cheapest and the fastest that fit: of the run where its length is known, else of a token."""
    fitting = [each for each in found if each["fits"]]
    priced = [each for each in fitting if each["usd_per_million_tokens"] is not None]
    whole = all(each["usd"] is not None for each in priced)
    cheapest = min(priced, key=lambda each: each["usd" if whole else "usd_per_million_tokens"], default=None)
    fastest = max(fitting, key=lambda each: each["tokens_per_second"], default=None)
    return {"cheapest": cheapest and cheapest["topology"], "fastest": fastest and fastest["topology"]}


def read(file: Path) -> list[Row]:
    """Rows of an earlier sweep's file, also of an unfinished one; none where there is no such file. UserError for another."""
    try:
        return json.loads(file.read_text("utf-8"))["rows"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--json {file}: not a plan's file ({type(error).__name__}); give another name") from error
