"""The loss in one pass: what it sums and its gradients, by chunks, by parts of the vocabulary and over a mesh."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import config
from jaxft.learn import loss
from jaxft.models.lora import Frozen, Tuned
from jaxft.models.quantize import encode_rows
from jaxft.models.vocabulary import look_up, table_axes
from jaxft.parallel.mesh import make_mesh
from jaxft.parallel.sharding import spec

B, S, D = 8, 12, 16


def model(V, cap=None, mesh=None, trained=False, dtype=jnp.float32):
    """What `tally` reads of a decoder: its head, its cap and its mesh."""
    table, scale = jnp.asarray(np.random.default_rng(1).normal(size=(V, D)), dtype), None
    arch = SimpleNamespace(vocab_size=V, logit_cap=cap)
    return SimpleNamespace(
        arch=arch, mesh=mesh, head=(Tuned if trained else Frozen)(table), embed=None, head_scale=scale
    )


def batch(V, seed=0):
    drawn = np.random.default_rng(seed)
    h = jnp.asarray(drawn.normal(size=(B, S, D)), jnp.float32)
    weights = (drawn.random((B, S)) < 0.5) * drawn.choice([0.5, 1.0, 2.0], (B, S))
    return h, jnp.asarray(drawn.integers(0, V, (B, S)), jnp.int32), jnp.asarray(weights, jnp.float32)


def plain(table, cap, h, targets, weights):
    """The same from whole logits, as everybody writes it."""
    logits = h @ table.astype(jnp.float32).T
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return loss.Tally(jnp.sum(nll * weights), jnp.sum(right * weights), jnp.sum(weights))


def found(made, h, targets, weights):
    """Sums, and the gradients of 3 · nll with respect to h and the head."""

    def scaled(h, table):
        sums = loss.tally(SimpleNamespace(**{**vars(made), "head": type(made.head)(table)}), h, targets, weights)
        return 3.0 * sums.nll, sums

    return jax.jit(jax.value_and_grad(scaled, (0, 1), has_aux=True))(h, made.head[...])


def assert_equal(made, V, cap, seed=0):
    h, targets, weights = batch(V, seed)
    table = made.head[...]
    guessed = jnp.argmax(h @ table.astype(jnp.float32).T, axis=-1).astype(jnp.int32)
    targets = targets.at[:, ::3].set(guessed[:, ::3])  # some right ones
    (_, sums), (of_h, of_table) = found(made, h, targets, weights)
    wanted = plain(table, cap, h, targets, weights)
    for one, other in zip(sums, wanted):
        assert float(one) == pytest.approx(float(other), rel=2e-6)
    assert 0 < float(sums.correct) < float(sums.weight)
    of_plain = jax.grad(lambda h, t: 3.0 * plain(t, cap, h, targets, weights).nll, (0, 1))(h, table)
    np.testing.assert_allclose(of_h, of_plain[0], atol=2e-6 * float(jnp.abs(of_plain[0]).max()))
    assert not np.asarray(of_h)[np.asarray(weights) == 0].any()
    wanted_table = of_plain[1] if isinstance(made.head, Tuned) else jnp.zeros_like(table)
    np.testing.assert_allclose(of_table, wanted_table, atol=3e-6 * float(jnp.abs(of_plain[1]).max()))


MESHES = {
    "one device": None, "swept": {}, "swept as on a chip": {}, "fsdp=8": {"fsdp": 8},
    "2·2·2": {"data": 2, "fsdp": 2, "tensor": 2},
}  # fmt: skip


def mesh_of(name):
    if name == "one device":
        return None
    return make_mesh(devices=jax.devices()[:1]) if name.startswith("swept") else make_mesh(config.Mesh(**MESHES[name]))


@pytest.fixture
def small_chunks(request, monkeypatch):
    """So that these few positions and columns are several chunks and parts; on a CPU as on a chip where a place says so."""
    for name, value in (
        ("CHUNK_ELEMENTS", 96 * 7), ("MIN_CHUNK", 1), ("SWEPT_CHUNK", 40), ("COLUMNS", 17), ("CPU_COLUMNS", 17),
    ):  # fmt: skip
        monkeypatch.setattr(loss, name, value)
    if "where" in request.fixturenames and request.getfixturevalue("where").endswith("chip"):
        monkeypatch.setattr(loss, "_on_cpu", lambda mesh: False)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("V", [96, 97], ids=["V=96", "V=97, which splits over nothing"])
@pytest.mark.parametrize("cap", [None, 2.0], ids=["", "capped"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("where", MESHES)
def test_sums_and_gradients_are_those_of_whole_logits(where, trained, cap, V):
    if V == 97 and where == "2·2·2":
        V = 98  # by tensor=2 it must split; not by fsdp too
    assert_equal(model(V, cap, mesh_of(where), trained), V, cap)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("where", MESHES)
def test_a_head_in_int8_is_the_head_that_its_codes_stand_for(where):
    made = model(96, 2.0, mesh_of(where))
    codes, scale = encode_rows(made.head[...])
    decoded = SimpleNamespace(**{**vars(made), "head": Frozen(codes.astype(jnp.float32) * scale[:, None])})
    coded = SimpleNamespace(**{**vars(made), "head": Frozen(codes), "head_scale": scale})
    h, targets, weights = batch(96)

    def found(made):
        return jax.jit(jax.value_and_grad(lambda h: loss.tally(made, h, targets, weights).nll))(h)

    (nll, of_h), (wanted, of_wanted) = found(coded), found(decoded)
    assert float(nll) == pytest.approx(float(wanted), rel=2e-6)
    np.testing.assert_allclose(of_h, of_wanted, atol=2e-6 * float(jnp.abs(of_wanted).max()))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("where", "V"), [("one device", 96), ("swept", 97), ("fsdp=8", 96), ("fsdp=8", 97), ("2·2·2", 96), ("2·2·2", 98)]
)
def test_the_scores_of_positions_are_those_of_whole_logits(where, V):
    made = model(V, 2.0, mesh_of(where))
    h, targets, weights = batch(V)
    logits = 2.0 * jnp.tanh(h @ made.head[...].T / 2.0)
    targets = targets.at[:, ::3].set(jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, ::3])  # some right ones
    scores = jax.jit(lambda h: loss.scores(made, h, targets, weights))(h)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.nll, jnp.where(weights > 0, nll, 0.0), atol=2e-6 * float(nll.max()))
    np.testing.assert_array_equal(scores.correct, (jnp.argmax(logits, axis=-1) == targets) & (weights > 0))
    assert 0 < np.asarray(scores.correct).sum() < (np.asarray(weights) > 0).sum()


def test_parts_of_the_vocabulary_are_equal_where_they_can_be():
    """And of whole lanes; the largest of the published vocabularies, and one that is a prime."""
    found = [loss._columns(V, 16384) for V in (256000, 128256, 32000, 640, 32003)]
    assert found == [16000, 16384, 16000, 640, 16384]


@pytest.mark.parametrize("where", MESHES)
def test_of_equal_logits_the_first_is_the_prediction(where):
    made = model(96, mesh=mesh_of(where))
    h, targets, weights = jnp.zeros((B, S, D)), jnp.zeros((B, S), jnp.int32).at[:, ::2].set(5), jnp.ones((B, S))
    (_, sums), _ = found(made, h, targets, weights)
    assert float(sums.correct) == B * S / 2
    made.head = Frozen(jnp.zeros((96, D)).at[jnp.array([7, 60])].set(1.0))
    h, targets = jnp.ones((B, S, D)), jnp.full((B, S), 60, jnp.int32).at[:, ::3].set(7)
    assert float(found(made, h, targets, weights)[0][1].correct) == B * S / 3


@pytest.mark.parametrize("where", MESHES)
def test_without_a_supervised_token_there_is_nothing(where):
    h, targets, weights = batch(96)
    (_, sums), (of_h, _) = found(model(96, mesh=mesh_of(where)), h, targets, jnp.zeros_like(weights))
    assert tuple(map(float, sums)) == (0.0, 0.0, 0.0) and not np.asarray(of_h).any()


@pytest.mark.parametrize("where", ["one device", "swept", "fsdp=8"])
def test_bfloat16_rounds_no_more_than_its_inputs(where):
    made = model(96, 30.0, mesh_of(where), dtype=jnp.bfloat16)
    h, targets, weights = batch(96)
    h = h.astype(jnp.bfloat16)
    (_, sums), (of_h, _) = found(made, h, targets, weights)
    wanted = plain(made.head[...], 30.0, h.astype(jnp.float32), targets, weights)
    assert of_h.dtype == jnp.bfloat16 and sums.nll.dtype == jnp.float32
    assert float(sums.nll) == pytest.approx(float(wanted.nll), rel=1e-4)
    of_plain = jax.grad(lambda h: 3 * plain(made.head[...], 30.0, h, targets, weights).nll)(h.astype(jnp.float32))
    apart = np.abs(of_h.astype(jnp.float32) - of_plain).max() / np.abs(of_plain).max()
    assert apart < 2**-6  # two roundings to 8 bits, of the logits' gradient and of the result


@pytest.mark.parametrize("V", [96, 97])
@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_rows_looked_up_over_a_mesh_are_those_of_the_table_with_their_gradient(V, shape):
    mesh = make_mesh(config.Mesh(**shape))
    table, tokens = model(V).head[...], batch(V)[1]
    placed = jax.device_put(table, jax.sharding.NamedSharding(mesh, spec(table_axes(V, mesh), mesh, table.shape)))
    assert np.array_equal(jax.jit(lambda t: look_up(t, tokens, mesh))(placed), table[tokens])
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(B, S, D)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(look_up(t, tokens, mesh) * weights)))(placed)
    np.testing.assert_allclose(gradient, jnp.zeros_like(table).at[tokens].add(weights), atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "largest", "size"),
    [(1024, 220, 128), (1024, 1024, 1024), (100, 512, 100), (1000, 300, 250), (97, 50, 49)],
)
def test_chunks_are_equal_where_they_can_be(tokens, largest, size):
    assert loss._chunk_size(tokens, largest) == size
