"""Damage is found before a checkpoint is loaded, a full disk leaves the older steps, and what is listed can be restored."""

import json
import random
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_disk import names, small_disk  # noqa: F401

from jaxft.errors import OutOfResources, UserError
from jaxft.weights import manifest
from jaxft.weights.checkpoint import TRASH, UNFINISHED, Checkpoints

HARMLESS = (manifest.COMMITTED,)  # read by nobody on a disk


def state(step, dtype=jnp.float32):
    """Arrays as a run's: parameters, moments and a counter, all of `step`."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    draw = np.random.default_rng(step)
    tree = {
        "step": np.int32(step),
        "trainable": {"q.lora_a": draw.standard_normal((2, 64, 8), np.float32)},
        "optimizer": [draw.standard_normal((2, 64, 8), np.float32), np.int32(step)],
    }
    return jax.tree.map(lambda x: jax.device_put(jnp.asarray(x, dtype if x.ndim else jnp.int32), device), tree)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def opened(folder, keep=3):
    """The checkpoints, and the lines they say."""
    said = []
    return Checkpoints(folder, keep, say=said.append), said


def saved(folder, steps, bests, keep=3):
    """Writes `steps`, each with the step that was best then."""
    checkpoints, _ = opened(folder, keep)
    for step, best in zip(steps, bests, strict=True):
        checkpoints.save(
            step, state(step), {"best_step": best, "best_loss": 0.5, "bad_evaluations": 1, "tokens": step}, best
        )
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Steps 10, 20 and 30, of which 20 was best in the end."""
    return saved(tmp_path_factory.mktemp("run") / "checkpoints", (10, 20, 30), (10, 20, 20))


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def files_of(step):
    return sorted(path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file())


def flip(content, at):
    return content[: at // 8] + bytes([content[at // 8] ^ (1 << at % 8)]) + content[at // 8 + 1 :]


def zeroed(content):
    start = min(100, len(content) // 2)
    return content[:start] + bytes(len(content[start : start + 4096])) + content[start + 4096 :]


def damages(content, seed):
    """Name -> what is left of a file; None for nothing."""
    draw = random.Random(seed)
    places = sorted(draw.sample(range(8 * len(content)), 8))
    made = {"deleted": None, "emptied": b"", "cut in half": content[: len(content) // 2], "cut by a byte": content[:-1]}
    made |= {f"bit {at} flipped": flip(content, at) for at in places} | {"zeroed": zeroed(content)}
    return {name: left for name, left in made.items() if left != content}


def spoil(file, left):
    file.unlink() if left is None else file.write_bytes(left)


def test_every_kind_of_damage_to_every_file_is_found(written):
    step, tried = written / "30", 0
    assert isinstance(manifest.read(step), manifest.Manifest)
    assert len(files_of(step)) > 8 and manifest.NAME in files_of(step)
    for number, name in enumerate(files_of(step)):
        content = (step / name).read_bytes()
        for kind, left in damages(content, number).items():
            spoil(step / name, left)
            found = manifest.read(step)
            (step / name).write_bytes(content)
            tried += 1
            silent = name in HARMLESS or (name == manifest.METADATA and only_time(content, left))
            assert silent or (isinstance(found, str) and name in found), (name, kind, found)
    assert tried > 100 and isinstance(manifest.read(step), manifest.Manifest)


def only_time(content, left):
    """Whether nothing but Orbax's time of saving has changed, which nobody reads."""
    try:
        before, after = (json.loads(text) for text in (content, left))
        return before | {manifest.TIME: 0} == after | {manifest.TIME: 0}
    except (TypeError, ValueError):
        return False


def check_falls_back(folder, name, left):
    """The newest step, damaged so, is never what is restored."""
    spoil(folder / "30" / name, left)
    checkpoints, said = opened(folder)
    latest = checkpoints.latest
    restored, progress = checkpoints.restore(latest, state(0))
    assert same(restored, state(latest)) and progress["tokens"] == latest
    if name not in HARMLESS:
        assert latest == 20 and not (folder / "30").exists(), (name, latest)
        (line,) = said
        assert "step 30: " in line and name in line and "going on from step 20" in line
    checkpoints.save(30, state(30), {}, 20)  # it is trained anew
    checkpoints.close()
    assert isinstance(manifest.read(folder / "30"), manifest.Manifest)


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "progress/metadata", manifest.NAME])
def test_a_damaged_step_is_said_and_the_older_one_is_used(folder, name):
    check_falls_back(folder, name, None)


@pytest.mark.slow
def test_whatever_happens_to_a_file_the_older_step_is_restored(written, tmp_path):
    for number, name in enumerate(files_of(written / "30")):
        content = (written / "30" / name).read_bytes()
        for kind, left in damages(content, number).items():
            if name != manifest.METADATA or not only_time(content, left):
                folder = shutil.copytree(written, tmp_path / f"{number} {kind}")
                check_falls_back(folder, name, left)
                shutil.rmtree(folder)


def test_without_a_whole_step_there_is_one_line_and_nothing_is_removed(folder):
    for step in ("10", "20", "30"):
        (folder / step / "progress" / "metadata").unlink()
    with pytest.raises(
        UserError, match=r"no checkpoint is whole \(step 30: progress/metadata is missing; .*new --run.dir"
    ):
        opened(folder)
    assert {"10", "20", "30"} <= set(names(folder))


def test_where_the_best_step_is_damaged_it_is_trained_again_from_the_one_before(folder):
    spoil(folder / "20" / "progress" / "metadata", b"")
    checkpoints, (line,) = opened(folder)
    assert checkpoints.latest == 10 and "step 20: progress/metadata has 0 bytes instead of" in line
    checkpoints.close()
    assert "30" not in names(folder)


def test_where_none_before_the_damaged_best_is_left_the_newest_counts_as_the_best(folder):
    shutil.rmtree(folder / "10")
    spoil(folder / "20" / "progress" / "metadata", b"")
    checkpoints, (line,) = opened(folder)
    restored, progress = checkpoints.restore(30, state(0))
    assert same(restored, state(30)) and line.endswith("going on from step 30, which counts as the best so far")
    assert progress == {"best_step": 30, "best_loss": None, "bad_evaluations": 0, "tokens": 30}
    checkpoints.close()


def test_a_best_step_damaged_during_the_run_is_refused_at_its_end(folder):
    checkpoints, _ = opened(folder)
    spoil(folder / "20" / "state" / "manifest.ocdbt", b"")
    with pytest.raises(
        UserError, match=r"20: state/manifest.ocdbt has 0 bytes .*; the same command again trains from a step"
    ):
        checkpoints.restore(20, state(0))
    checkpoints.close()


def test_arrays_of_another_dtype_or_shape_are_never_cast(folder):
    checkpoints, _ = opened(folder)
    with pytest.raises(UserError, match=r"2 arrays do not fit this run, first .*: checkpoint float32 .*, run bfloat16"):
        checkpoints.restore(30, state(0, jnp.bfloat16))
    checkpoints.close()


def test_a_step_is_sealed_before_it_takes_its_name(tmp_path, monkeypatch):
    seen, seal = [], Checkpoints._seal
    monkeypatch.setattr(Checkpoints, "_seal", lambda self: seen.append(names(tmp_path)) or seal(self))
    saved(tmp_path, (1,), (1,))
    assert len(seen) == 1 and [name.partition(UNFINISHED)[0] for name in seen[0]] == ["1"] and "1" not in seen[0]
    assert manifest.NAME in names(tmp_path / "1")


def test_what_a_killed_save_left_is_swept_and_no_old_steps_pile_up(folder):
    (folder / f"40{UNFINISHED}").mkdir()
    (folder / TRASH / "5").mkdir(parents=True)
    saved(folder, (40, 50), (20, 20), keep=1)
    assert [name for name in names(folder) if not name.startswith("_")] == ["20", "50"]


FILLS_UP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_checkpoints as here
from jaxft import disk
from jaxft.errors import run_verb
from jaxft.weights import checkpoint

folder, blind = Path(sys.argv[1]), sys.argv[2] == "blind"
if blind:
    checkpoint.Checkpoints._check_room = lambda self: None

def main(argv):
    checkpoints, _ = here.opened(folder / "checkpoints", 99)
    for step in range(1, 100):
        checkpoints.save(step, here.large(step), {}, step)
    checkpoints.close()

run_verb(main)
"""


def large(step):
    """A state of 1 MB that does not compress."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"a": jax.device_put(np.random.default_rng(step).standard_normal((1 << 18,), np.float32), device)}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["seeing", "blind"])
def test_a_full_disk_ends_with_exit_3_the_older_steps_and_no_leftovers(small_disk, tmp_path, how):  # noqa: F811
    """Seen before the save; and where something else fills it in between, from what Orbax makes of it."""
    ended = small_disk(
        tmp_path / "d", "6m", sys.executable, "-c", FILLS_UP, tmp_path / "d", how, __file__.rpartition("/")[0]
    )
    (line,) = ended.stderr.splitlines()
    assert (
        ended.returncode == 3
        and "the disk is full: 2,097,152 bytes needed, " in line
        and " bytes free; make room" in line
    )
    left = tmp_path / "d-left" / "checkpoints"
    steps = [name for name in names(left) if name.isdigit()]
    assert steps and f"(it goes on from step {max(map(int, steps))})" in line
    assert not [name for name in names(left) if UNFINISHED in name]
    checkpoints, said = opened(left)
    assert said == [] and same(checkpoints.restore(checkpoints.latest, large(0))[0], large(checkpoints.latest))
    checkpoints.close()


def test_without_room_a_save_is_refused_before_it_begins(folder, monkeypatch):
    checkpoints, _ = opened(folder)
    monkeypatch.setattr("jaxft.disk.free_bytes", lambda _: 5)
    with pytest.raises(
        OutOfResources, match=r"step 40: the disk is full: [0-9,]+ bytes needed, 5 bytes free; .* from step 30"
    ):
        checkpoints.save(40, state(40), {}, 20)
    monkeypatch.undo()
    checkpoints.close()
    assert {"10", "20", "30"} <= set(names(folder)) and not [n for n in names(folder) if UNFINISHED in n]
