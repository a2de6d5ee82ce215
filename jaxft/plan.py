"""`python -m jaxft.plan --config NAME --topology v5e-8`: what a training step takes of a TPU's chips, before renting them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxft import command_line, config
from jaxft.errors import UserError, run_verb

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from jaxft.learn.recompute import Compiled
    from jaxft.weights.model import Source

PROG = "python -m jaxft.plan"
PLANNED_STEPS = 1000  # of a schedule whose length depends on rows that are not read; no shape depends on it


def main(argv: list[str]) -> None:
    """Compiles the training step of a config for a topology and prints what it takes of each chip."""
    path, overrides, own = command_line.split(argv, PROG, {"topology": ("NAME", "a TPU slice, such as v5e-8")})
    if "topology" not in own:
        raise UserError("--topology NAME is missing; NAME is a TPU slice, such as v5e-8")
    print(compiled(config.load(path, overrides), own["topology"]).said())


def lowered(settings: config.Config, topology: str) -> jax.stages.Lowered:
    """The very training step that `train` runs, lowered for that TPU topology.

    With `model.remat` auto it is compiled first, to find the policy that fits the chips. Raises UserError, and
    OutOfResources where no policy fits.
    """
    from jaxft.learn import recompute

    policy = settings.model.remat
    if policy == "auto":
        policy = compiled(settings, topology).policy
    found = recompute.traceable(settings, *_work(settings, topology), policy)
    return found.step.lower(*found.inputs)


def compiled(settings: config.Config, topology: str) -> Compiled:
    """That step compiled, and what it takes of a chip."""
    from jaxft.learn import recompute
    from jaxft.parallel.mesh import usable_bytes

    source, mesh, steps, shape = _work(settings, topology)
    return recompute.compile_step(settings, source, mesh, steps, shape, usable_bytes(mesh))


def _work(settings: config.Config, topology: str) -> tuple[Source, Mesh, int, tuple[int, int]]:
    """Model, mesh, steps and batch. Rows are of data.max_length, as packed ones are; no row is read, and no weight."""
    from jaxft.parallel import topology as topologies
    from jaxft.parallel.mesh import check_batch, make_mesh
    from jaxft.weights import model

    source = model.sketch(settings.model, settings.lora)
    mesh = make_mesh(settings.mesh, topologies.devices(topology))
    check_batch(settings.optim, mesh)
    shape = settings.optim.batch_size, min(settings.data.max_length, source.arch.max_positions)
    return source, mesh, settings.optim.max_steps or PLANNED_STEPS, shape


if __name__ == "__main__":
    run_verb(main)
