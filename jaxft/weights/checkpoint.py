"""Orbax checkpoints of what a run changes: trainable parameters, optimizer, step, and where the run stood.

One module, because Orbax's v0 manager is the mature one and v1 will replace it. Every step is sealed with a manifest before
it takes its name, and checked against it before it is restored.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from jaxft import disk
from jaxft.errors import OutOfResources, UserError, disk_full
from jaxft.parallel.processes import ALONE, Processes
from jaxft.weights import manifest

TRASH = ".trash"
UNFINISHED = ".orbax-checkpoint-tmp"
MARGIN_BYTES = 1 << 20  # for the logs and the manifest


class Preserve(preservation_policy.PreservationPolicy):
    """Keeps the newest `keep` steps and the best one, which the loop names."""

    def __init__(self, keep: int):
        self.keep, self.best = keep, None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One verdict per checkpoint, oldest first."""
        newest = len(checkpoints) - self.keep
        return [i >= newest or checkpoint.step == self.best for i, checkpoint in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one run folder; saving goes on in the background, `close` waits for it.

    All processes of a run make one and call its methods together. Damage is found at the start: the newest step that is
    whole, and whose best one is, stays the newest; what comes after it is told to `say` and removed.
    """

    def __init__(self, folder: Any, keep: int, processes: Processes = ALONE, say: Callable[[str], None] = print):
        """`folder` is a path, or an etils path in object storage. Raises UserError where no step is whole."""
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every save, and its errors with their stacks
        self._local = isinstance(folder, Path)
        self._folder, self._processes, self._say = folder.absolute() if self._local else folder, processes, say
        self._preserve, self._saving, self._bytes = Preserve(keep), (0, {}, None), 0
        self._found: dict[int, manifest.Manifest | str] = {}  # of the step checked at the start
        self._start, self._best_lost = processes.from_first(self._choose)
        try:
            self._manager = self._open()
        except ModuleNotFoundError as error:
            raise UserError(f"run.dir: {folder} needs {error.name}; `pip install 'jaxft[gcs]'`") from error

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._preserve,
                save_decision_policy=save_decision_policy.FixedIntervalPolicy(1),  # the loop decides
                cleanup_tmp_directories=True,
                # Renamed before deleted: a kill in between leaves no half-deleted step. Object storage renames nothing.
                todelete_subdir=TRASH if self._local else None,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    @property
    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any], best: int | None) -> None:
        """Saves a pytree of arrays and JSON-ready `progress` as `step`; keeps step `best` beside the newest.

        Raises OutOfResources where the disk has no room for it, or had none for the step before; older steps stay.
        """
        self.wait()
        self._preserve.best = best
        if step in self._manager.all_steps():
            return
        self._saving = (step, _described(state), best)
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + MARGIN_BYTES
        self._check_room()
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Raises what `save` would, as soon as it is known that the step being written cannot be."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """`(state, progress)` of `step`; `like` is a pytree of arrays or ShapeDtypeStructs with their shardings.

        Raises UserError where it is damaged, or holds other arrays than `like`.
        """
        self.wait()
        fault = self._processes.from_first(lambda: self._fault(step, _described(like)))
        if fault is not None:
            raise UserError(
                f"{fault}; the same command again trains from an older step, a new --run.dir from the start"
            )
        target = jax.tree.map(_abstract, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=items)
        except (ValueError, KeyError, OSError) as error:  # whole, so what cannot be read was written by another Orbax
            what = " ".join(str(error).split())
            raise UserError(
                f"{self._folder / str(step)}: Orbax {ocp.__version__} cannot read it: {what:.300}"
            ) from error
        progress = found["progress"]
        if step == self._start and self._best_lost:
            progress = progress | {"best_loss": None, "best_step": step, "bad_evaluations": 0}
        return found["state"], progress

    def wait(self) -> None:
        """Returns when every save is on disk; raises the error of one that failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Waits, and frees Orbax's threads."""
        self.wait()
        if self._processes.first:
            self._empty_trash()
        self._manager.close()

    def _choose(self) -> tuple[int | None, bool]:
        """The step to go on from, and whether its best one is lost. Newer ones go: Orbax would save nothing before them."""
        self._empty_trash()
        self._remove_unfinished()
        steps, read = sorted(self._steps(), reverse=True), self._found

        def whole(step: int) -> bool:
            if step not in read:
                read[step] = manifest.read(self._folder / str(step))
            return isinstance(read[step], manifest.Manifest)

        good = next((s for s in steps if whole(s) and (read[s].best in (None, s) or whole(read[s].best))), None)
        chosen = good if good is not None else next(filter(whole, steps), None)
        faults = "; ".join(f"step {s}: {said}" for s, said in read.items() if isinstance(said, str))
        if steps and chosen is None:
            raise UserError(f"{self._folder}: no checkpoint is whole ({faults:.400}); start again in a new --run.dir")
        if faults:
            lost = "" if good is not None else ", which counts as the best so far"
            self._say(f"damaged checkpoints: {faults}; going on from step {chosen}{lost}")
        for step in steps:
            if step > (chosen or 0) or isinstance(read.get(step), str):
                self._remove(step)
        self._found = {step: found for step, found in read.items() if step == chosen}
        return chosen, good is None and chosen is not None

    def _steps(self) -> list[int]:
        if not self._folder.exists():
            return []
        named = [path for path in self._folder.iterdir() if path.name.isascii() and path.name.isdigit()]
        # In object storage what has a name may be unfinished.
        return [int(path.name) for path in named if self._local or (path / manifest.COMMITTED).exists()]

    def _remove(self, step: int) -> None:
        """Under another name first, so that a kill leaves no half of it; in object storage its mark of completeness first."""
        folder = self._folder / str(step)
        if self._local:
            trash = self._folder / TRASH
            trash.mkdir(exist_ok=True)
            folder.rename(trash / f"damaged-{step}")
            self._empty_trash()
        else:
            (folder / manifest.COMMITTED).unlink(missing_ok=True)
            folder.rmtree()

    def _empty_trash(self) -> None:
        if self._local:
            shutil.rmtree(self._folder / TRASH, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        """What a kill or an error left of a step on its way to disk."""
        if self._local and self._folder.is_dir():
            for folder in self._folder.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _seal(self) -> None:
        """Orbax calls it on process 0 when all files of a step are written and before it takes its name."""
        step, arrays, best = self._saving
        self._empty_trash()
        folder = self._folder / str(step)
        if self._local:
            (folder,) = self._folder.glob(f"{step}{UNFINISHED}*")
        manifest.write(folder, arrays, best)

    def _fault(self, step: int, arrays: dict[str, str]) -> str | None:
        """What keeps a step from being restored into such arrays."""
        folder = self._folder / str(step)
        found = self._found.pop(step, None) or manifest.read(folder)
        if isinstance(found, str):
            return f"{folder}: {found}; the same command again trains from a step before it"
        return _differing(found, folder, arrays)

    def _check_room(self) -> None:
        if not (self._local and self._processes.first) or disk.free_bytes(self._folder) >= self._bytes:
            return
        self._empty_trash()
        if disk.free_bytes(self._folder) < self._bytes:
            raise OutOfResources(self._full())

    def _full(self) -> str:
        newest = max(self._steps(), default=None)
        kept = "" if newest is None else f" (it goes on from step {newest})"
        return disk.full(self._folder, f"{self._folder}: step {self._saving[0]}", self._bytes) + kept

    def _failed(self, error: Exception) -> Exception:
        """What to raise for an error of Orbax's; what it has written of the step gives its room back."""
        if isinstance(error, (UserError, OutOfResources)):
            return error
        if self._processes.first:
            self._remove_unfinished()
        if not self._local:
            return error
        if disk_full(error):
            return OutOfResources(self._full())
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)
        if cause is None:
            return error
        return UserError(f"{self._folder}: step {self._saving[0]} cannot be written: {cause.strerror or cause}")


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _described(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in leaves}


def _differing(found: manifest.Manifest, folder: Any, arrays: dict[str, str]) -> str | None:
    """Orbax would cast in silence."""
    names = [name for name in found.arrays.keys() | arrays.keys() if found.arrays.get(name) != arrays.get(name)]
    if not names:
        return None
    first = min(names)
    return (
        f"{folder}: {len(names)} arrays do not fit this run, first {first}: checkpoint "
        f"{found.arrays.get(first)}, run {arrays.get(first)}; give a new --run.dir"
    )
