"""Every family trains on eight devices as on one, with everything trained that an adapter can train."""

import jax
import numpy as np
import openelm
import optax
import pytest
from checkpoints import load, save, tiny, tokens, with_random_b
from marked import exhaustive

from jaxft import config
from jaxft.config import Lora
from jaxft.errors import UserError
from jaxft.learn.step import initial_state, make_train_step
from jaxft.parallel.mesh import make_mesh

IDS = tokens(8, 24, vocab=96)
THREE_AXES = config.Mesh(data=2, fsdp=2, tensor=2)


def two_steps(folder, mesh, embedding):
    """Loss and gradient norm of the second step."""
    lora = Lora(rank=4, dropout=0.0, dora=True, bias="all", train_modules=(embedding,))
    loaded, optimizer = with_random_b(load(folder, lora, mesh=mesh)), optax.sgd(0.1)
    step, state = make_train_step(loaded, optimizer, mesh), initial_state(loaded, optimizer, mesh)
    positions = np.broadcast_to(np.arange(IDS.shape[1], dtype=np.int32), IDS.shape)
    batch = {"tokens": IDS, "targets": np.roll(IDS, -1, 1), "positions": positions}
    batch |= {"segments": np.ones_like(IDS), "weights": np.ones(IDS.shape, np.float32)}
    for _ in range(2):
        state, metrics = step(state, loaded.frozen, batch, jax.random.key(0))
    return float(metrics["nll"]), float(metrics["grad_norm"])


@pytest.mark.parametrize(
    "family", [exhaustive("gemma2"), exhaustive("gemma"), exhaustive("qwen2"), exhaustive("qwen3")]
)
def test_eight_devices_equal_one(family, tmp_path):
    folder = save(tiny(family, vocab_size=96, num_key_value_heads=2), tmp_path)
    one = two_steps(folder, make_mesh(devices=jax.devices()[:1]), "embed_tokens")
    for mesh in (config.Mesh(fsdp=8), THREE_AXES):
        assert two_steps(folder, make_mesh(mesh), "embed_tokens") == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_openelm_on_eight_devices_equals_one_and_its_odd_heads_are_not_cut(tmp_path):
    openelm.save(openelm.openelm(vocab_size=96), tmp_path)
    one = two_steps(tmp_path, make_mesh(devices=jax.devices()[:1]), "token_embeddings")
    assert two_steps(tmp_path, make_mesh(config.Mesh(data=2, fsdp=4)), "token_embeddings") == pytest.approx(
        one, rel=1e-5
    )
    with pytest.raises(
        UserError, match=r"qkv_proj: kv_heads of 3 does not split over tensor=2; set mesh.tensor to at most 1"
    ):
        load(tmp_path, mesh=make_mesh(THREE_AXES))
