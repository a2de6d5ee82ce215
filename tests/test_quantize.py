"""Quantised bases: codes as bitsandbytes and their definitions have them, and models that compute with what they decode to."""

import dataclasses
import itertools
import json
from pathlib import Path

import bitsandbytes.functional
import jax
import jax.numpy as jnp
import numpy as np
import openelm
import peft
import pytest
import torch
import transformers
from checkpoints import assert_same, load, logits, save, tiny, tokens, torch_logits, with_random_b
from marked import exhaustive, slow

import jaxft.tiny
from jaxft import config, export, train
from jaxft.config import Lora
from jaxft.errors import UserError
from jaxft.learn.loop import Loop
from jaxft.learn.loss import tally
from jaxft.models import decoder
from jaxft.models.quantize import NF4, Scheme, dynamic_code
from jaxft.parallel.mesh import make_mesh
from jaxft.weights import quantized
from jaxft.weights.model import find

BASE = Path(jaxft.tiny.__file__).parent / "base"
IDS = tokens(8, 24, vocab=96)
SHAPES = {
    "whole rows of blocks": (96, 128),
    "blocks over the ends of rows, four codes a word": (64, 172),
    "a last block cut": (33, 100),
    "two codes a word": (32, 70),
}
SCHEMES = {
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4", "quantize_group": 32},
    "nf4": {"quantize": "nf4"},
    "nf4, double": {"quantize": "nf4", "quantize_double": True},
    "int8, embedding too": {"quantize": "int8", "quantize_tables": True},
}
WIDE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
}  # down_proj's 96 inputs are no whole blocks of nf4


def drawn(shape, dtype=torch.float32, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.02
    return torch.from_numpy(values).to(dtype)


def coded(scheme, weights):
    """Codes in the order of the file `[out,in]`, and what they decode to."""
    found = scheme.encode(jnp.asarray(weights.float().numpy()))
    values = np.asarray(scheme.values(found["codes"])).reshape(-1, weights.shape[0]).T
    codes = np.searchsorted(np.array(NF4, np.float32), values) if scheme.name == "nf4" else values
    dtype = jnp.bfloat16 if weights.dtype == torch.bfloat16 else jnp.float32
    assert found["codes"].nbytes * 8 == weights.numel() * (8 if scheme.name == "int8" else 4)
    assert scheme.shape(found["codes"].shape, found["codes"].dtype) == weights.shape[::-1]
    return codes, np.asarray(scheme.decode(found["codes"], found, dtype).T.astype(jnp.float32)), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_nf4_is_bitsandbytes_to_the_last_bit(shape, dtype):
    weights = drawn(shape, dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    theirs = np.stack([packed.numpy().reshape(-1) >> 4, packed.numpy().reshape(-1) & 15], 1).reshape(-1)
    codes, decoded, _ = coded(Scheme("nf4"), weights)
    assert np.array_equal(codes.reshape(-1), theirs[: codes.size])
    assert np.array_equal(decoded, bitsandbytes.functional.dequantize_4bit(packed, state).float().numpy())


@pytest.mark.parametrize("shape", [*SHAPES.values(), (512, 512)])
def test_scales_in_eight_bits_are_bitsandbytes_but_for_ties(shape):
    """Its kernel for a CPU finds the nearest of two values that are as near by other arithmetic: one code beside, rarely."""
    assert np.array_equal(dynamic_code(), np.sort(bitsandbytes.functional.create_dynamic_map().numpy()))
    weights = drawn(shape)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weights, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    _, decoded, found = coded(Scheme("nf4", double=True), weights)
    in_order = found["scale"].T if found["scale"].ndim == 2 else found["scale"]
    apart = np.abs(np.asarray(in_order).reshape(-1).astype(int) - state.absmax.numpy().reshape(-1).astype(int))
    assert apart.max() <= 1 and (apart > 0).sum() <= 2 + 0.005 * apart.size
    np.testing.assert_allclose(found["scale_of_scale"], state.state2.absmax.numpy(), rtol=1e-5)
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state).numpy()
    equal = np.isclose(decoded, theirs, rtol=1e-5, atol=0)
    assert equal.mean() > 0.98


@pytest.mark.parametrize(("scheme", "most"), [(Scheme("int8"), 127), (Scheme("int4", 32), 7), (Scheme("int4", 64), 7)])
def test_int8_and_int4_are_symmetric_and_round_to_the_nearest_step_of_their_own_group(scheme, most):
    weights = drawn((48, 128)).numpy()
    weights[0] = 0  # a group of zeros
    weights[1] *= 1000
    codes, decoded, found = coded(scheme, torch.from_numpy(weights))
    size = 128 if scheme.name == "int8" else scheme.group
    step = np.abs(weights.reshape(48, -1, size)).max(2) / most
    np.testing.assert_allclose(np.asarray(found["scale"]).T, step, rtol=1e-6, atol=1e-38)
    assert np.abs(codes).max() == most and (np.abs(codes.reshape(48, -1, size)).max(2)[1:] == most).all()
    assert (np.abs(decoded - weights).reshape(48, -1, size) <= step[:, :, None] * 0.5001).all()
    assert not decoded[0].any()


@pytest.mark.parametrize(
    ("scheme", "bits"), [(Scheme("int8"), 8), (Scheme("int4", 32), 5), (Scheme("int4", 128), 4.25), (Scheme("nf4"), 4.5),
                         (Scheme("nf4", double=True), 4.127)],
)  # fmt: skip
def test_a_weight_takes_so_many_bits(scheme, bits):
    assert scheme.bits((4096, 4096)) == pytest.approx(bits, abs=0.01)


def model(family):
    return (
        openelm.openelm(vocab_size=96, model_dim=64, ffn_dim_divisor=32)
        if family == "openelm"
        else tiny(family, **WIDE)
    )


def saved(family, folder):
    made = model(family)
    return (openelm.save if family == "openelm" else save)(made, folder), made


def with_decoded(made, loaded):
    """The torch model with what the codes of `loaded` decode to in the place of its weights."""
    weights = made.state_dict()
    arrays = {**loaded.frozen, **loaded.trainable}
    coded_rows = [row for row in loaded.rows if row.scheme is not None]
    assert coded_rows
    for row in coded_rows:
        if not row.stacked:
            scale = next(arrays[each.path] for each in loaded.rows if each.scale and each.names == row.names)
            weights[row.names[0]].copy_(torch.from_numpy(np.asarray(arrays[row.path]) * np.asarray(scale)[:, None]))
            continue
        kernel = np.array(quantized.kernel(arrays, row.path.rpartition(".")[0], row.scheme))
        for i, name in enumerate(row.names):
            assert not np.array_equal(kernel[i], weights[name].numpy())
            weights[name].copy_(torch.from_numpy(kernel[i]))
    return made


SOME = [("llama", "int8, embedding too"), ("llama", "nf4"), ("openelm", "int4")]
FAMILIES = ("llama", "gemma2", "qwen2", "gemma", "openelm")
MORE = [
    ("gemma2", "nf4"),
    ("qwen2", "int8"),
    ("gemma", "int4"),
    ("llama", "nf4, double"),
    ("openelm", "int8, embedding too"),
]
REST = [pair for pair in itertools.product(FAMILIES, SCHEMES) if pair not in SOME + MORE]


@pytest.mark.parametrize(
    ("family", "scheme"), [*SOME, *(slow(*pair) for pair in MORE), *(exhaustive(*pair) for pair in REST)]
)
def test_logits_are_torchs_with_the_decoded_weights(family, scheme, tmp_path):
    folder, made = saved(family, tmp_path)
    loaded = load(folder, **SCHEMES[scheme])
    assert_same(logits(loaded, IDS), torch_logits(with_decoded(made, loaded), IDS))


def loss_and_gradient(loaded):
    batch = {"positions": jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape), "segments": jnp.ones_like(IDS)}
    targets, weights = jnp.asarray(np.roll(IDS, -1, 1)), jnp.ones(IDS.shape, jnp.float32)

    def nll(trainable):
        built = decoder.join(loaded.graphdef, trainable, loaded.frozen)
        h, _ = built.hidden(IDS, **batch)
        return tally(built, h, targets, weights).nll

    return jax.jit(jax.value_and_grad(nll))(loaded.trainable)


@pytest.mark.parametrize(
    ("scheme", "dora"),
    [("nf4", False), slow("int8", True), exhaustive("int8", False), exhaustive("nf4", True), exhaustive("int4", True)],
)
def test_an_adapter_trains_as_on_a_base_of_the_decoded_weights(scheme, dora, tmp_path):
    """Every gradient; with DoRA, lengths too are those of the decoded weights."""
    folder, made = saved("llama", tmp_path / "base")
    lora = Lora(rank=4, dropout=0.0, dora=dora)
    loaded = with_random_b(load(folder, lora, **SCHEMES[scheme]))
    decoded = with_random_b(load(save(with_decoded(made, loaded), tmp_path / "decoded"), lora))
    (loss, gradient), (want_loss, want) = loss_and_gradient(loaded), loss_and_gradient(decoded)
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-5)
    assert gradient.keys() == want.keys()
    for path, value in want.items():
        assert np.abs(gradient[path] - value).max() <= 1e-4 * np.abs(value).max(), path


@pytest.mark.parametrize("scheme", [slow("int4"), exhaustive("nf4, double"), "int8, embedding too"])
def test_eight_devices_hold_the_codes_of_one_and_compute_the_same(scheme, tmp_path):
    folder, _ = saved("llama", tmp_path)
    lora = Lora(rank=4, dropout=0.0)
    one = with_random_b(load(folder, lora, **SCHEMES[scheme]))
    want_loss, want = loss_and_gradient(one)
    other = (
        config.Mesh(data=2, fsdp=4) if scheme == "int4" else config.Mesh(data=2, fsdp=2, tensor=2)
    )  # 3 groups are not 2
    for shape in (other,) if "embedding" in scheme else (config.Mesh(fsdp=8), other):
        mesh = make_mesh(shape)
        eight = with_random_b(load(folder, lora, mesh=mesh, **SCHEMES[scheme]))
        for path, value in one.frozen.items():
            assert np.array_equal(np.asarray(eight.frozen[path]), np.asarray(value)), path
        codes = next(v for path, v in eight.frozen.items() if path.endswith("gate_proj.codes"))
        assert codes.sharding.shard_shape(codes.shape)[-1] < codes.shape[-1]
        loss, gradient = loss_and_gradient(eight)
        assert float(loss) == pytest.approx(float(want_loss), rel=1e-5)
        for path, value in want.items():
            assert np.abs(np.asarray(gradient[path]) - value).max() <= 1e-4 * np.abs(value).max(), path


def test_what_is_skipped_or_trained_in_full_stays_as_it_is(tmp_path):
    folder, _ = saved("llama", tmp_path)
    lora = Lora(rank=4, targets=("q_proj",), train_modules=("k_proj",))
    loaded = load(folder, lora, quantize="nf4", quantize_skip=("down_proj", "model.layers.1.mlp.up_proj"))
    schemes = {name: row.scheme for row in loaded.rows for name in row.names if row.of_checkpoint}
    whole = {name for name, scheme in schemes.items() if scheme is None}
    in_layers = {name.removeprefix("model.layers.").removesuffix(".weight") for name in whole if ".layers." in name}
    assert {name for name in in_layers if "norm" not in name} == {
        *(f"{i}.{module}" for i in (0, 1) for module in ("self_attn.k_proj", "mlp.down_proj")), "1.mlp.up_proj",
    }  # fmt: skip
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= whole


def test_a_random_start_is_quantised_too(tmp_path):
    folder, _ = saved("llama", tmp_path)
    plain, coded_start = (load(folder, init="random", **more) for more in ({}, {"quantize": "int8"}))
    row = next(row for row in coded_start.rows if row.path.endswith("up_proj.codes"))
    kernel = quantized.kernel(coded_start.frozen, row.path.rpartition(".")[0], row.scheme)
    want = plain.frozen[row.path.replace(".codes", ".kernel")]
    assert np.abs(kernel - want).max() <= np.abs(want).max() / 127


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantize": "int4", "quantize_group": 64}, "quantize_group: model.layers.0.mlp.down_proj: 96 inputs are"),
        ({"quantize": "int8", "quantize_skip": ("dense",)}, "quantize_skip: 'dense' matches no linear module; llama has d"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_quantised_so_is_one_line(settings, said, tmp_path):
    folder, _ = saved("llama", tmp_path)
    with pytest.raises(UserError, match=said):
        find(config.Model(name=str(folder), **settings), Lora())


RUN = [
    "--config", "tiny_cpu.py", "--data.limit", "60", "--data.max_length", "96", "--optim.max_steps", "6",
    "--eval.every_steps", "2", "--eval.tasks", "final_answer", "--eval.limit", "4", "--eval.max_new_tokens", "8",
    "--run.log_every", "2", "--model.quantize", "nf4",
]  # fmt: skip


@pytest.mark.exhaustive
def test_a_run_on_codes_resumes_bit_for_bit_and_its_adapter_is_pefts(tmp_path, capsys):
    """Merged, it goes into the weights as they are stored, and says so."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.main([*RUN, "--run.dir", str(whole)])
    step = Loop._train_once

    def stopping(self):
        if self.step == 5:
            raise KeyboardInterrupt
        step(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_train_once", stopping)
        train.main([*RUN, "--run.dir", str(stopped)])
    train.main([*RUN, "--run.dir", str(stopped)])
    for name in ("adapter/adapter_model.safetensors", "examples.jsonl"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    ids = tokens(2, 16, vocab=600)
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    adapted = torch_logits(peft.PeftModel.from_pretrained(base, whole / "adapter").eval(), ids)
    assert_same(logits(load(BASE, adapter=str(whole / "adapter")), ids), adapted)
    capsys.readouterr()
    export.main(["--adapter", str(whole), "--merge", "--dtype", "float32", "--out", str(tmp_path / "merged")])
    assert "in training they were held as nf4" in capsys.readouterr().out
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert_same(torch_logits(merged, ids), adapted)
    told = whole / "adapter/adapter_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"gone"):
        export.main(["--adapter", str(whole), "--merge", "--out", str(tmp_path / "again")])


def test_the_published_code_is_sorted_and_symmetric_at_its_ends():
    assert list(NF4) == sorted(NF4) and NF4[0] == -1 and NF4[-1] == 1 and NF4[7] == 0
    assert dataclasses.replace(Scheme("nf4"), double=True) != Scheme("nf4")
