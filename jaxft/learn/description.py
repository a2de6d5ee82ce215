"""What a run is: as facts in results.json, and as the first lines that it prints."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import flax
import jax

from jaxft.learn.folder import RunFolder
from jaxft.learn.job import Job
from jaxft.learn.progress import tell
from jaxft.learn.recompute import Compiled
from jaxft.models.adaptation import described
from jaxft.models.tensors import count_parameters
from jaxft.weights.model import Loaded


def facts(job: Job, loaded: Loaded, compiled: Compiled, planned: Any, started: str | None) -> dict[str, Any]:
    """For results.json; `planned` is what the plan verb expects, `started` the time of the first start, if there was one."""
    trainable, parameters = count_parameters(loaded.rows)
    adapter = next(iter(job.source.plan.adapters.values()), None)
    device, source = job.mesh.devices.flat[0], job.source
    return {
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__},
        "started": started or datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {
            "platform": device.platform, "kind": device.device_kind, "count": job.mesh.size, "processes": jax.process_count(),
        },
        "mesh": dict(job.mesh.shape),
        "model": {
            "name": job.config.model.name, "commit": source.commit, "family": source.arch.family, "dtype": str(source.dtype),
            "parameters": parameters, "trainable": trainable,
            "adapter": adapter and {"rank": adapter.rank, "alpha": adapter.alpha, "dropout": adapter.dropout},
        },
        "data": job.data.facts,
        "program": {
            "attention": loaded.attention, "remat": compiled.policy, "device_bytes": compiled.bytes,
            "compile_seconds": compiled.seconds,
        },
        "planned": planned,
        "steps": job.steps,
    }  # fmt: skip


def moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What is said of a run that goes on on other devices than its last start had, both as in results.json."""

    def place(results: Mapping[str, Any]) -> str:
        device, mesh = results["device"], results["mesh"]
        return f"{device['count']} × {device['kind']} ({', '.join(f'{name}={size}' for name, size in mesh.items())})"

    if not {"device", "mesh"} <= before.keys() or place(before) == place(now):
        return None
    return f"was on {place(before)}: from here on its numbers are those of a run that stayed there to rounding, not to the bit"


def tell_all(job: Job, folder: RunFolder, resumed: int | None, before: Mapping[str, Any]) -> None:
    """Model, adapter, data, devices and folder, and the step of the checkpoint that the run goes on from; `before` is what
    results.json held at the start."""
    model, device, optim = folder.results["model"], folder.results["device"], job.config.optim
    trainable, parameters = model["trainable"], model["parameters"]
    adapted = described(job.source.plan)
    shape = ", ".join(f"{name}={size}" for name, size in job.mesh.shape.items())
    data = job.data.facts
    tell(f"model: {model['name']} ({model['family']}, {model['dtype']})")
    tell(f"trained: {adapted}")
    tell(
        f"trainable params: {trainable:,} || all params: {parameters:,} || trainable%: {100 * trainable / parameters:.4f}"
    )
    for note in job.data.notes:
        tell(note)
    tell(f"device: {device['count']} × {device['kind']}, mesh {shape}")
    tell(
        f"batch: {optim.batch_size} sequences of {data['length']} tokens in {optim.accumulation_steps} micro-batch(es), "
        f"{100 * data['fill']:.1f} % of positions real; {job.steps} steps"
    )
    tell(f"run folder: {folder.place}" + ("" if resumed is None else f", resumed at step {resumed}"))
    other = None if resumed is None else moved(before, folder.results)
    if other is not None:
        tell(other)
