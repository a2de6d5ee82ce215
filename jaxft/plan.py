"""`python -m jaxft.plan --config NAME --topology v5e-8`: what a training step takes of a TPU's chips, before renting them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxft import command_line, config
from jaxft.errors import UserError, run_verb

if TYPE_CHECKING:
    import jax

    from jaxft.learn.recompute import Compiled

PROG = "python -m jaxft.plan"


def main(argv: list[str]) -> None:
    """Compiles the training step of a config for a topology and prints what it takes of each chip."""
    path, overrides, own = command_line.split(argv, PROG, {"topology": ("NAME", "a TPU slice, such as v5e-8")})
    if "topology" not in own:
        raise UserError("--topology NAME is missing; NAME is a TPU slice, such as v5e-8")
    print(compiled(config.load(path, overrides), own["topology"]).said())


def lowered(settings: config.Config, topology: str) -> jax.stages.Lowered:
    """The very training step that `train` runs, lowered for that TPU topology; with `model.remat` auto, under the policy
    that fits its chips. Raises UserError, and OutOfResources where no policy fits."""
    return compiled(settings, topology).lowered


def compiled(settings: config.Config, topology: str) -> Compiled:
    """That step compiled. Rows are of data.max_length, as packed ones are; no row is read, and no weight."""
    from jaxft.learn import recompute
    from jaxft.parallel import topology as topologies
    from jaxft.parallel.mesh import check_batch, make_mesh, usable_bytes
    from jaxft.weights import model

    source = model.sketch(settings.model, settings.lora)
    mesh = make_mesh(settings.mesh, topologies.devices(topology))
    check_batch(settings.optim, mesh)
    shape = settings.optim.batch_size, min(settings.data.max_length, source.arch.max_positions)
    steps = settings.optim.max_steps or PLANNED_STEPS
    return recompute.compile_step(settings, source, mesh, steps, shape, usable_bytes(mesh))


PLANNED_STEPS = 1000  # of a schedule whose length depends on rows that are not read; no shape depends on it


if __name__ == "__main__":
    run_verb(main)
