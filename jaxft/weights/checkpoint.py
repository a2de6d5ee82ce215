"""Orbax checkpoints of what a run changes: trainable parameters, optimizer, step, and where the run stood.

One module, because Orbax's v0 manager is the mature one and v1 will replace it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from jaxft.errors import UserError


class Preserve(preservation_policy.PreservationPolicy):
    """Keeps the newest `keep` steps and the best one, which the loop names."""

    def __init__(self, keep: int):
        self.keep, self.best = keep, None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One verdict per checkpoint, oldest first."""
        newest = len(checkpoints) - self.keep
        return [i >= newest or checkpoint.step == self.best for i, checkpoint in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one run folder; saving goes on in the background, `close` waits for it."""

    def __init__(self, folder: Any, keep: int):
        """`folder` is a path, or an etils path in object storage."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step of every save
        self._preserve = Preserve(keep)
        try:
            self._manager = self._open(folder)
        except ModuleNotFoundError as error:
            raise UserError(f"run.dir: {folder} needs {error.name}; `pip install 'jaxft[gcs]'`") from error

    def _open(self, folder: Any) -> ocp.CheckpointManager:
        local = isinstance(folder, Path)
        return ocp.CheckpointManager(
            folder.absolute() if local else folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._preserve,
                save_decision_policy=save_decision_policy.FixedIntervalPolicy(1),  # the loop decides
                cleanup_tmp_directories=True,
                # Renamed before deleted: a kill in between leaves no half-deleted step. Object storage renames nothing.
                todelete_subdir=".trash" if local else None,
            ),
        )

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any], best: int | None) -> None:
        """Saves a pytree of arrays and JSON-ready `progress` as `step`; keeps step `best` beside the newest."""
        self._preserve.best = best
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        self._manager.save(step, args=items)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """`(state, progress)` of `step`; `like` is a pytree of arrays or ShapeDtypeStructs with their shardings."""
        target = jax.tree.map(_abstract, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=items)
        return found["state"], found["progress"]

    def wait(self) -> None:
        """Returns when every save is on disk; raises the error of one that failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees Orbax's threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
