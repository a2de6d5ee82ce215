"""The mesh: slices, and that its shape changes no loss."""

import itertools

import jax
import numpy as np
import pytest
from checkpoints import llama, load, save, tokens
from marked import exhaustive, slow

from jaxft import config
from jaxft.config import Lora, Optim
from jaxft.errors import UserError
from jaxft.learn import optim
from jaxft.learn.step import initial_state, make_train_step
from jaxft.parallel import topology
from jaxft.parallel.mesh import make_mesh
from jaxft.parallel.sharding import place

STEPS = 200
MESHES = {
    "8 data": {"data": 8}, "8 fsdp": {"fsdp": 8}, "2 data x 4 fsdp": {"data": 2, "fsdp": 4},
    "4 data x 2 tensor": {"data": 4, "tensor": 2}, "2 fsdp x 4 tensor": {"fsdp": 2, "tensor": 4},
    "2 slices x 2 fsdp x 2 tensor": {"slices": 2, "fsdp": 2, "tensor": 2},
}  # fmt: skip


def test_axis_data_holds_the_slices_and_an_fsdp_group_stays_in_one():
    devices = topology.devices("2xv5e-16")
    mesh = make_mesh(config.Mesh(), devices[::-1])  # in whatever order they come
    assert dict(mesh.shape) == {"data": 2, "fsdp": 16, "tensor": 1}
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    mesh = make_mesh(config.Mesh(data=2, fsdp=4, tensor=-1, slices=2), devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 4, "tensor": 2}
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize("name", ["v5e-256", "v6e-16"])
def test_neighbours_on_the_fsdp_axis_are_neighbours_on_the_wires(name):
    """In a list of the devices as they come, the last of a row of chips is followed by the first of the next."""
    devices = topology.devices(name)
    size = np.array([d.coords for d in devices]).max(axis=0) + 1
    line = [np.array(d.coords) for d in make_mesh(devices=devices).devices.flat]
    apart = np.array([abs(one - other) for one, other in itertools.pairwise(line)])
    hops = np.minimum(apart, size - apart)
    assert (hops.sum(axis=1) == 1).mean() >= 0.9


def test_devices_that_tell_no_slice_are_cut_in_their_order():
    mesh = make_mesh(config.Mesh(slices=4))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert [d.id for d in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize(
    ("devices", "sizes", "shown"),
    [
        ("2xv5e-16", {"slices": 1}, "mesh.slices=1: 32 devices in 2 slice(s) are here; use -1 for all there are"),
        ("v5e-8", {"slices": 2}, "mesh.slices=2: 8 devices in 1 slice(s) are here"),
        ("2xv5e-16", {"fsdp": 32}, "mesh.fsdp=32, mesh.tensor=1 does not multiply to 16 device(s) of each of 2 slices"),
        (None, {"slices": 3}, "mesh.slices=3: 8 device(s) do not make so many equal slices; use -1 for one"),
        (None, {"slices": 0}, "mesh.slices=0: 8 device(s) do not make"),
    ],
)
def test_slices_that_are_not_there_are_refused(devices, sizes, shown):
    with pytest.raises(UserError) as error:
        make_mesh(config.Mesh(**sizes), devices and topology.devices(devices))
    assert shown in str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(llama(vocab_size=96, num_key_value_heads=4), tmp_path_factory.mktemp("llama"))


def losses(folder, mesh, dtype="float32"):
    """Of each of 200 steps of AdamW on changing batches, whose rows have different numbers of supervised tokens."""
    loaded = load(folder, Lora(rank=4, dropout=0.0), mesh=mesh, dtype=dtype)
    settings = Optim(learning_rate=3e-3, warmup=10, clip=1.0)
    optimizer = optim.optimizer(settings, STEPS, loaded.rows)
    step, state = make_train_step(loaded, optimizer, mesh), initial_state(loaded, optimizer, mesh)
    compiled, sums = None, []
    for number in range(STEPS):
        ids = tokens(8, 17, number % 20, vocab=96)
        weights = (np.arange(16)[None] >= 2 * np.arange(8)[:, None]).astype(np.float32)
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
        batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights, "positions": positions}
        batch = place(mesh, batch | {"segments": np.ones((8, 16), np.int32)}, ("batch", None))
        compiled = compiled or step.lower(state, loaded.frozen, batch, jax.random.key(0)).compile()
        state, metrics = compiled(state, loaded.frozen, batch, jax.random.key(0))
        sums.append(metrics["nll"] / metrics["weight"])
    return np.array(jax.device_get(sums))


@pytest.fixture(scope="module")
def on_one_device(folder):
    return losses(folder, make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    "name", [slow(name) if name in ("8 fsdp", "2 slices x 2 fsdp x 2 tensor") else exhaustive(name) for name in MESHES]
)
def test_losses_of_two_hundred_steps_are_those_of_one_device(name, folder, on_one_device):
    found = losses(folder, make_mesh(config.Mesh(**({"data": 1, "fsdp": 1} | MESHES[name]))))
    assert on_one_device[-20:].mean() < on_one_device[:20].mean() - 0.5  # something was learnt
    np.testing.assert_allclose(found, on_one_device, rtol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["8 fsdp", "2 fsdp x 4 tensor"])
def test_in_bfloat16_they_are_within_a_hundredth(name, folder):
    alone = losses(folder, make_mesh(devices=jax.devices()[:1]), "bfloat16")
    found = losses(folder, make_mesh(config.Mesh(**({"data": 1, "fsdp": 1} | MESHES[name]))), "bfloat16")
    assert alone[-20:].mean() < alone[:20].mean() - 0.5
    np.testing.assert_allclose(found, alone, rtol=1e-2)
