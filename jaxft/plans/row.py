"""One place planned: a row of figures, whole words with their units, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.config import Config
from jaxft.errors import UserError, one_line
from jaxft.learn import recompute
from jaxft.learn.recompute import DoesNotFit
from jaxft.plans import estimate, program, roofline
from jaxft.plans import place as places
from jaxft.plans.estimate import Step
from jaxft.plans.place import Place
from jaxft.plans.program import Program
from jaxft.plans.reading import Reading
from jaxft.weights import model
from jaxft.weights.model import Source

COMPILED, ARITHMETIC = "compiled", "arithmetic, not compiled"
# Of a training step's time, that the same tokens take when they are only evaluated: one of two passes over the weights.
EVALUATION = 0.5
NOT_INCLUDED = "reading weights, compiling, answers generated at evaluations, saving, and waiting for chips"
PARTS = tuple(f"{part}_bytes_per_chip" for part in ("weights", "lora", "optimizer", "batch", "activations"))

Row = dict[str, Any]


def plan(settings: Config, place: Place, reading: Reading | None) -> Row:
    """The row of a place. A mesh or a batch that cannot be, a step that does not fit and a compiler's refusal are rows too."""
    try:
        return arithmetic(settings, place, reading) if place.topology is None else compiled(settings, place, reading)
    except DoesNotFit as error:
        return _too_large(settings, place, error)
    except UserError as error:
        return _head(settings, place) | {"fits": False, "error": one_line(error), "error_kind": "input"}
    except (
        jax.errors.JaxRuntimeError,
        NotImplementedError,
        ValueError,
    ) as error:  # a sharding, or an operation, that the compiler refuses
        return _head(settings, place) | {"fits": False, "error": one_line(error)[:300], "error_kind": "compiler"}


def compiled(settings: Config, place: Place, reading: Reading | None) -> Row:
    """The row of a TPU topology. Raises UserError, DoesNotFit, and what JAX and its compiler raise."""
    built = program.build(settings, place.name)
    step = described(settings, built.source, built.compiled.policy, dict(built.mesh.shape), place.slices)
    memory = program.memory(built.traced, settings.lora is not None, built.compiled.bytes)
    flops = program.flops_per_token(built.traced)
    network = _network(built, place, step)
    kernel = built.compiled.outlined.attention
    how = {
        "method": COMPILED,
        "attention": kernel,
        "flops_source": "matmuls of the traced step; a kernel's by arithmetic",
    }
    about = {"compile_seconds": built.compiled.seconds, "policies_too_large": dict(built.compiled.too_large)}
    attention = (
        0.0 if kernel == "dense" else estimate.attention_flops_per_token(step)
    )  # dense matmuls are among the traced
    return _row(settings, place, reading, step, how, memory, (flops, attention), network) | about


def arithmetic(settings: Config, place: Place, reading: Reading | None) -> Row:
    """The row by arithmetic alone, with the first policy that fits by it. Raises UserError and DoesNotFit."""
    source, mesh = model.sketch(settings.model, settings.lora), places.sizes(settings.mesh, place)
    check_rows(settings, mesh)
    tried: list[tuple[str, int | None]] = []
    for policy in recompute.policies(settings.model.remat, "gpu"):
        step = described(settings, source, policy, mesh, place.slices)
        memory = estimate.memory(step)
        total = sum(memory.values())
        if total <= place.chip.hbm_bytes:
            flops = estimate.flops_per_token(step), estimate.attention_flops_per_token(step)
            network = {"ici": estimate.ici_bytes(step), "dcn": estimate.dcn_bytes(step), "source": ARITHMETIC}
            how = {"method": ARITHMETIC, "flops_source": ARITHMETIC}
            memory |= {"total_bytes_per_chip": total}
            return _row(settings, place, reading, step, how, memory, flops, network)
        tried.append((policy, int(total)))
    raise DoesNotFit(tried, int(place.chip.hbm_bytes))


def check_rows(settings: Config, mesh: Mapping[str, int]) -> None:
    """Raises UserError where a micro-batch does not split over a mesh of those sizes."""
    micro, ways = settings.optim.micro_batch_size, mesh["data"] * mesh["fsdp"]
    if micro % ways:
        raise UserError(
            f"optim.batch_size: micro-batches of {micro} do not split over data·fsdp={ways}; take a multiple of {ways}"
        )


def described(settings: Config, source: Source, policy: str, mesh: Mapping[str, int], slices: int = 1) -> Step:
    """The step as arithmetic sees it, on a mesh of those sizes."""
    rows, length = program.shape(settings, source)
    ranks = {path: pair.rank for path, pair in source.plan.adapters.items()}
    return Step(
        source.arch, ranks, rows, length, policy, mesh["data"], mesh["fsdp"], mesh["tensor"], slices,
        settings.optim.accumulation_steps, source.dtype.itemsize, held_bytes(source),
        1.0 if source.plan.tables else source.dtype.itemsize, decodes(source),
        jnp.dtype(source.plan.param_dtype).itemsize,
    )  # fmt: skip


def base(settings: Config) -> str:
    """How the base's weights are held, in words."""
    if settings.lora is None:
        return f"{settings.model.param_dtype}, trained"
    return model.held_as(settings.model, settings.model.dtype)


def held_bytes(source: Source) -> float:
    """Of a weight of the linear modules as it is held, scales included, on average."""
    shapes = source.arch.linear_shapes()
    schemes = {path: source.plan.scheme(path) for path in shapes}
    bits = {
        path: 8 * source.dtype.itemsize if scheme is None else scheme.bits(shapes[path])
        for path, scheme in schemes.items()
    }
    return (
        sum(bits[path] * math.prod(shape) for path, shape in shapes.items()) / 8 / sum(map(math.prod, shapes.values()))
    )


def decodes(source: Source) -> bool:
    """Whether weights are written out in full before their matmul reads them; int8's scale is for what comes out of it."""
    scheme = source.plan.quantized
    return scheme is not None and scheme.name != "int8"


def expected(settings: Config, source: Source, mesh: Any, policy: str, length: int) -> Row | None:
    """What `train` is to expect of the step that it compiled, by arithmetic; None on devices that are not listed."""
    device = mesh.devices.flat[0]
    slices = len({getattr(each, "slice_index", None) for each in mesh.devices.flat})
    place = places.of_devices(device.device_kind, mesh.size, slices)
    if place is None or place.chip.flops is None:
        return None
    step = replace(described(settings, source, policy, dict(mesh.shape), slices), length=length)
    flops = estimate.flops_per_token(step) + estimate.attention_flops_per_token(step)
    times = roofline.times(_demand(step, flops, estimate.ici_bytes(step), estimate.dcn_bytes(step)), place)
    return {
        "topology": place.name,
        "seconds_per_step": times.expected_step_seconds,
        "roofline_seconds_per_step": times.roofline_seconds,
        "bound_by": times.bound_by,
        "positions_per_second": step.rows * step.length / times.expected_step_seconds,
    }


def needs(settings: Config, source: Source, mesh: Any, error: DoesNotFit) -> str:
    """What a device would hold under the last policy tried, part by part and by arithmetic, where none fits."""
    policy = error.tried[-1][0]
    found = estimate.memory(described(settings, source, policy, dict(mesh.shape)))
    parts = ", ".join(f"{name.partition('_')[0]} {size / 2**30:.2f}" for name, size in found.items())
    return f"a device needs, in GiB and by arithmetic, with model.remat {policy}: {parts}"


def _network(built: Program, place: Place, step: Step) -> dict[str, Any]:
    """Bytes that a chip takes in, from the program's text, or by arithmetic where there is none to read."""
    moved = program.moved(built.compiled.executable, place.chips // place.slices)
    if moved is None:
        source = "arithmetic: this libtpu does not print the program"
        return {"ici": estimate.ici_bytes(step), "dcn": estimate.dcn_bytes(step), "source": source}
    kinds = {name: {"times": times, "bytes": size} for name, (times, size) in moved.kinds.items()}
    return {"ici": moved.ici_bytes, "dcn": moved.dcn_bytes, "source": "the compiled program", "kinds": kinds}


def _demand(step: Step, flops_per_token: float, ici: float, dcn: float) -> roofline.Demand:
    positions = step.rows * step.length
    return roofline.Demand(positions, flops_per_token * positions / step.chips, estimate.hbm_bytes(step), ici, dcn)


def _head(settings: Config, place: Place) -> Row:
    return {
        "topology": place.name,
        "chip": place.chip.name,
        "chips": place.chips,
        "slices": place.slices,
        "rows_per_step": settings.optim.batch_size,
        "accumulation_steps": settings.optim.accumulation_steps,
        "base": base(settings),
        "hbm_bytes_per_chip": place.chip.hbm_bytes,
        "method": ARITHMETIC if place.topology is None else COMPILED,
    }


def _too_large(settings: Config, place: Place, error: DoesNotFit) -> Row:
    """What the leanest policy needs is known from the compiler, or the least that it must."""
    known = [size for _, size in error.tried if size is not None]
    needed = min(known) if known else None
    over = None if needed is None else place.chip.hbm_bytes - needed
    tried = {"policies_too_large": dict(error.tried), "total_bytes_per_chip": needed, "free_bytes_per_chip": over}
    return _head(settings, place) | {"fits": False, "error": one_line(error), "error_kind": "memory"} | tried


def _row(
    settings: Config, place: Place, reading: Reading | None, step: Step, how: Mapping[str, Any],
    memory: Mapping[str, float], flops: tuple[float, float], network: Mapping[str, Any],
) -> Row:  # fmt: skip
    arch, chip = step.arch, place.chip
    ideal = arch.flops_per_token(frozen=step.frozen) + arch.head_flops_per_token(frozen=step.frozen)
    times = roofline.times(_demand(step, sum(flops), network["ici"], network["dcn"]), place)
    return _head(settings, place) | how | {
        "fits": True,
        "mesh": {"data": step.data, "fsdp": step.fsdp, "tensor": step.tensor},
        "positions_per_row": step.length,
        "positions_per_chip": step.tokens,
        "policy": step.policy,
        **memory,
        "free_bytes_per_chip": chip.hbm_bytes - memory["total_bytes_per_chip"],
        "flops_per_token": flops[0],
        "attention_flops_per_token": flops[1],
        "ideal": "4N + 4DV" if step.frozen else "6N + 6DV",
        "ideal_flops_per_token": ideal,
        "flops_over_ideal": flops[0] / ideal,
        "hbm_traffic_bytes_per_chip": estimate.hbm_bytes(step),
        "ici_bytes_per_chip": network["ici"],
        "dcn_bytes_per_chip": network["dcn"],
        "network_source": network["source"],
        "collectives": network.get("kinds"),
        "ici_bytes_per_second": place.ici_bytes_per_second,
        "dcn_bytes_per_second": chip.dcn_bytes_per_second,
        **times.facts(),
        **_run(settings, place, reading, step, times),
    }  # fmt: skip


def _run(settings: Config, place: Place, reading: Reading | None, step: Step, times: roofline.Times) -> Row:
    """The whole run; None for what takes rows that nobody has counted."""
    positions, seconds = step.rows * step.length, times.expected_step_seconds
    fill = 1.0 if reading is None else reading.fill
    per_million = roofline.money(place, 1e6 / (positions * fill) * seconds / roofline.HOUR)
    rates = {
        "fill": None if reading is None else fill,
        "tokens_per_second": positions * fill / seconds,
        "usd_per_million_tokens": per_million["usd"],
        **roofline.price(place),
    }
    if reading is None:
        unknown = dict.fromkeys(("tokens", "steps", "training_hours", "evaluation_hours", "hours", "usd", "usd_spot"))
        return rates | unknown | {"tokens_source": "unknown; give --tokens, the real tokens of one epoch"}
    steps = reading.steps(settings, step.length)
    training = steps * seconds / roofline.HOUR
    passes = reading.held_out_tokens / fill / positions * EVALUATION * seconds / roofline.HOUR
    evaluation = reading.evaluations(settings, steps) * passes
    spent = {
        "tokens": steps * positions * fill,
        "tokens_source": reading.source,
        "steps": steps,
        "training_hours": training,
        "evaluation_hours": evaluation,
        "hours": training + evaluation,
        "not_included": NOT_INCLUDED,
    }
    return rates | spent | roofline.money(place, training + evaluation)
