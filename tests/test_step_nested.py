"""Recomputation of groups of layers (`model.remat` nested): what it computes, what it keeps, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import openelm
import pytest
from checkpoints import load, save, tiny, with_random_b
from marked import exhaustive, slow
from test_quantize import WIDE
from test_step import batch, by_name

from jaxft import config
from jaxft.config import Lora
from jaxft.learn.loss import tally
from jaxft.learn.recompute import kept_per_token
from jaxft.models import decoder
from jaxft.models.arch import inputs_held, nest
from jaxft.parallel.mesh import make_mesh
from jaxft.weights import model

LORA = Lora(rank=4, dropout=0.3)
FEW = Lora(rank=4, dropout=0.3, targets=("q_proj", "down_proj"))  # a small program, quickly compiled
ROUNDING = 1e-5  # of the largest element; scans give equal bits, and where there is none other sums are fused


@pytest.mark.parametrize(
    ("layers", "held"), [(1, (1, 1, 0)), (2, (1, 2, 0)), (5, (1, 5, 0)), (7, (1, 7, 0)), (9, (3, 3, 0)), (13, (4, 3, 1)),
                         (28, (7, 4, 0)), (42, (7, 6, 0)), (46, (7, 6, 4))],
)  # fmt: skip
def test_layers_are_cut_into_groups_so_that_few_inputs_are_held(layers, held):
    groups, size, rest = nest(layers)
    assert (groups, size, rest) == held and groups * size + rest == layers
    assert inputs_held(layers) == (layers if groups == 1 else groups + (rest > 0) + size) <= layers


def test_no_cut_of_up_to_a_hundred_layers_holds_much_more_than_twice_the_root():
    assert all(inputs_held(layers) <= 2 * layers**0.5 + 3 for layers in range(1, 100))


def saved(family, layers, folder, **sizes):
    if family == "openelm":
        widths = {"num_transformer_layers": layers, "vocab_size": 96, "ffn_multipliers": [0.5, 4.0]}
        return openelm.save(openelm.openelm(**widths), folder)
    return save(tiny(family, num_hidden_layers=layers, **{"vocab_size": 96, **sizes}), folder)


def gradient_of(loaded):
    rows = {name: jnp.asarray(x) for name, x in batch().items()}

    def nll(trainable):
        built = decoder.join(loaded.graphdef, trainable, loaded.frozen)
        h, _ = built.hidden(rows["tokens"], rows["positions"], rows["segments"], key=jax.random.key(7))
        return tally(built, h, rows["targets"], rows["weights"]).nll

    return jax.value_and_grad(nll)


def assert_nested_is_full(folder, lora=LORA, **options):
    found = {}
    for policy in ("full", "nested"):
        loaded = load(folder, lora, remat=policy, **options)
        loaded = loaded if lora is None else with_random_b(loaded)
        loss, gradient = jax.jit(gradient_of(loaded))(loaded.trainable)
        found[policy] = float(loss), by_name(loaded.rows, gradient)
    (loss, gradient), (want_loss, want) = found["nested"], found["full"]
    assert loss == pytest.approx(want_loss, rel=ROUNDING) and gradient.keys() == want.keys()
    for name, value in want.items():
        assert np.abs(gradient[name] - value).max() <= ROUNDING * np.abs(value).max(), name


@pytest.mark.parametrize(
    ("family", "layers", "lora"),
    [("llama", 9, FEW), exhaustive("llama", 11, LORA), exhaustive("llama", 9, None), slow("gemma2", 12, LORA),
     exhaustive("openelm", 9, LORA), exhaustive("llama", 13, Lora(rank=4, targets=("q_proj",), train_modules=("k_proj",)))],
)  # fmt: skip
def test_gradients_are_those_of_all_layers_computed_again(family, layers, lora, tmp_path):
    """A rest beyond the groups, every weight trained, windows that alternate within 16 tokens, and layers in no scan too."""
    assert_nested_is_full(saved(family, layers, tmp_path), lora)


@pytest.mark.parametrize(
    "options",
    [
        slow({"quantize": "nf4"}),
        exhaustive({"quantize": "int8"}),
        exhaustive({"quantize": "int4", "quantize_group": 32}),
    ],
)
def test_a_quantised_base_under_dora_too(options, tmp_path):
    assert_nested_is_full(saved("llama", 9, tmp_path, **WIDE), Lora(rank=4, dropout=0.3, dora=True), **options)


@pytest.mark.parametrize(
    ("mesh", "quantize"),
    [
        slow({"data": 2, "tensor": 2}, "int8"), exhaustive({"data": 2, "tensor": 2}, "none"),
        exhaustive({}, "int8"), exhaustive({}, "none"),
    ],
)  # fmt: skip
def test_eight_devices_too(mesh, quantize, tmp_path):
    folder = saved("llama", 9, tmp_path, **WIDE)
    assert_nested_is_full(folder, mesh=make_mesh(config.Mesh(**mesh)), quantize=quantize)


def shapes(jaxpr):
    """Of every array that an equation makes, those within other equations included."""
    for equation in jaxpr.eqns:
        yield from (out.aval.shape for out in equation.outvars)
        for value in equation.params.values():
            for one in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(one, "jaxpr", one)
                yield from shapes(inner) if hasattr(inner, "eqns") else ()


def test_of_nine_layers_inputs_are_kept_by_threes_and_no_group_of_weights_is_copied(tmp_path):
    folder = saved("llama", 9, tmp_path)
    made = {}
    for policy in ("full", "nested"):
        loaded = load(folder, FEW, remat=policy)
        made[policy] = set(shapes(jax.make_jaxpr(gradient_of(loaded))(loaded.trainable).jaxpr))
    h = 8, 16, 32
    assert {(9, *h)} == {shape for shape in made["full"] if shape[1:] == h}
    assert {(3, *h)} == {shape for shape in made["nested"] if shape[1:] == h}
    assert not {(3, 48, 32), (3, 3, 48, 32), (3, 32, 48)} & made["nested"]
    source = model.find(config.Model(name=str(folder)), LORA)
    layer = source.arch.layers[0]
    assert (
        kept_per_token(layer, source.arch, "full") == 32 and kept_per_token(layer, source.arch, "nested") == 32 * 6 // 9
    )


def checkpoints(jaxpr, turns=1):
    """(turns of the innermost scan around it, whether it has a barrier) of everything that is computed again."""
    for equation in jaxpr.eqns:
        if "prevent_cse" in equation.params:
            yield turns, equation.params["prevent_cse"]
        inside = equation.params["length"] if equation.primitive.name == "scan" else turns
        for value in equation.params.values():
            for one in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(one, "jaxpr", one)
                yield from checkpoints(inner, inside) if hasattr(inner, "eqns") else ()


@pytest.mark.parametrize(("policy", "layers"), [("full", 2), exhaustive("nested", 6)])
def test_what_is_computed_again_outside_a_loop_has_a_barrier_before_it(policy, layers, tmp_path):
    """A compiler merges equal computations, and so had kept all that OpenELM's layers, each by itself, compute."""
    few = Lora(rank=4, dropout=0.3, targets=("out_proj",))
    loaded = load(saved("openelm", layers, tmp_path), few, remat=policy)
    assert set(checkpoints(jax.make_jaxpr(gradient_of(loaded))(loaded.trainable).jaxpr)) == {(1, True)}
