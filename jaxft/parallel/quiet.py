"""Keeps libtpu, installed for the plan verb, from complaining on a machine without a TPU."""

from __future__ import annotations

import glob
import os

from jaxft.parallel.topology import QUIET

NODES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # what a TPU's driver makes


def without_tpu() -> None:
    """Call it before JAX looks for devices. Where there is a TPU, by JAX's own judgement or by the driver's files, it does
    nothing; elsewhere it answers what libtpu would ask a TPU's metadata server, and the platform is chosen as ever."""
    from jax._src import cloud_tpu_init  # there is no public word for it

    if getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True) or any(map(glob.glob, NODES)):
        return
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
