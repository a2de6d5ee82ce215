"""Checkpoint files become sharded arrays, every tensor accounted for, and a damaged file becomes one line."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from benchmarks import loading
from checkpoints import llama, load, save
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxft import config
from jaxft.config import Lora
from jaxft.errors import UserError
from jaxft.parallel.mesh import make_mesh
from jaxft.weights import load as weights_load
from jaxft.weights import shards
from jaxft.weights.hub import local_folder
from jaxft.weights.model import load_decoder
from jaxft.weights.shards import open_file, open_folder

MESHES = {
    "fsdp=8": config.Mesh(fsdp=8),
    "data=2, fsdp=2, tensor=2": config.Mesh(data=2, fsdp=2, tensor=2),
    "fsdp=4, tensor=2": config.Mesh(tensor=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = llama(vocab_size=96, num_hidden_layers=3, attention_bias=True, mlp_bias=True)
    return save(model, tmp_path_factory.mktemp("llama"))


def rewrite(folder, target, change):
    """A copy of the checkpoint in `folder` whose dict of tensors went through `change`."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    target.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def values(loaded):
    return {path: np.asarray(value) for path, value in (loaded.trainable | loaded.frozen).items()}


def test_every_missing_unexpected_and_misshapen_tensor_is_listed_in_one_error(folder, tmp_path):
    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
        tensors["model.layers.2.self_attn.k_proj.weight"] = np.ones((32, 16), np.float32)
        tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # old files have it: harmless

    with pytest.raises(UserError) as error:
        load(rewrite(folder, tmp_path, damage))
    text = str(error.value)
    assert "4 tensors do not fit config.json" in text
    assert "missing model.layers.1.mlp.up_proj.weight (48, 32)" in text and "missing model.norm.weight (32,)" in text
    assert "unexpected model.layers.0.self_attn.q_norm.weight (8,)" in text
    assert "model.layers.2.self_attn.k_proj.weight: file (32, 16), model (16, 32)" in text
    assert "inv_freq" not in text


def test_a_tied_checkpoint_may_repeat_its_head(tmp_path):
    tied = save(llama(tie_word_embeddings=True), tmp_path)
    again = rewrite(
        tied, tmp_path / "again", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0})
    )
    assert np.array_equal(load_decoder(str(again))[0](jnp.ones((1, 4))), load_decoder(str(tied))[0](jnp.ones((1, 4))))


def test_an_untied_checkpoint_without_its_head_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"missing lm_head.weight \(96, 32\)"):
        load(rewrite(folder, tmp_path, lambda tensors: tensors.pop("lm_head.weight")))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", "", 7])
def test_an_index_that_leaves_the_folder_is_refused(name, folder, tmp_path):
    save(llama(), tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(places))
    with pytest.raises(UserError, match=r"weight_map names .*same folder"):
        open_folder(tmp_path)


def test_an_index_that_does_not_match_its_shards_is_refused(tmp_path):
    save(llama(), tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    original = json.loads(index.read_text())
    shard = original["weight_map"]["model.norm.weight"]
    lost = original | {"weight_map": original["weight_map"] | {"model.other.weight": shard}}
    index.write_text(json.dumps(lost))
    with pytest.raises(UserError, match=r"1 tensors are not in the shard it names, first model.other.weight in"):
        open_folder(tmp_path)
    for damaged in ({"weight_map": []}, {}, []):
        index.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"index.json: (no weight_map|expected a JSON object)"):
            open_folder(tmp_path)
    index.write_text(json.dumps(original))
    (tmp_path / shard).unlink()
    with pytest.raises(UserError, match=f"{shard}: missing"):
        open_folder(tmp_path)


def test_pickle_weights_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"only pickle weights \(pytorch_model.bin\).*safe_serialization=True"):
        open_folder(tmp_path)


def test_a_folder_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no model.safetensors"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match=r"config.json: missing"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 8, 200, -1])
def test_a_truncated_file_is_refused(kept, folder, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((folder / "model.safetensors").read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model.safetensors: .*(truncated|header of|not a safetensors)"):
        open_folder(tmp_path)


def raises_only_user_errors(read):
    """Runs `read`; any exception but UserError fails the test."""
    try:
        return read()
    except UserError as error:
        assert str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64"]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | json_values, max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-8, 64) | json_values, min_size=2, max_size=2) | json_values,
    },
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=3)


@settings(max_examples=300, deadline=None, database=None)
@given(header=headers.map(lambda h: json.dumps(h).encode()) | st.binary(max_size=64), tail=st.binary(max_size=64))
@example(header=b"[" * 100_000, tail=b"")
@example(header=b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}', tail=b"1234")
@example(header=b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', tail=b"1234")
@example(header=b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.5, 4.5]}}', tail=b"12345678")
@example(header=b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', tail=b"1234")
@example(header=b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}', tail=b"1234")
def test_any_header_is_read_or_refused(header, tail, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + tail)
    found = raises_only_user_errors(lambda: open_file(file)) or {}
    for tensor in found.values():  # what was accepted can be read
        assert tensor.offset + tensor.dtype.itemsize * int(np.prod(tensor.shape)) <= file.stat().st_size
        if 0 not in tensor.shape:
            assert tensor[...].shape == tensor.shape


@settings(max_examples=100, deadline=None, database=None)
@given(content=st.binary(max_size=64) | json_values.map(lambda v: json.dumps(v).encode()))
@example(content=b"9" * 5000)
@example(content=b"[" * 100_000)
@example(content=b"\xff\xfe{}")
def test_any_config_or_index_is_read_or_refused(content, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    (folder / "model.safetensors.index.json").write_bytes(content)
    raises_only_user_errors(lambda: open_folder(folder))
    raises_only_user_errors(lambda: load(folder))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_arrays_on_eight_devices_equal_those_on_one(mesh, folder):
    one, eight = load(folder, Lora(rank=8)), load(folder, Lora(rank=8), mesh=make_mesh(mesh))
    wanted, found = values(one), values(eight)
    assert wanted.keys() == found.keys()
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)
    split = {row.path for row in eight.rows if not (eight.trainable | eight.frozen)[row.path].is_fully_replicated}
    assert {row.path for row in eight.rows if len(row.hub_shape) == 2 and not row.adapter} <= split  # every matrix


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_each_device_reads_only_its_slice(mesh, folder, monkeypatch):
    read = {}
    some, rows = shards.Slice.__getitem__, shards.Slice.read_rows

    def recorded(self, index):
        part = some(self, index)
        read.setdefault((self.offset, self.shape), []).append(part.size)
        return part

    def recorded_rows(self, first, out):
        read.setdefault((self.offset, self.shape), []).append(out.nbytes // self.dtype.itemsize)
        rows(self, first, out)

    monkeypatch.setattr(shards.Slice, "__getitem__", recorded)
    monkeypatch.setattr(shards.Slice, "read_rows", recorded_rows)
    loaded = load(folder, mesh=make_mesh(mesh))
    sizes = make_mesh(mesh).shape
    for (_, shape), parts in read.items():
        # A matrix is split over fsdp and tensor, a bias at most over tensor; the same slice may serve several devices.
        ways = sizes["fsdp"] * sizes["tensor"] if len(shape) == 2 else 1
        assert max(parts) * ways <= np.prod(shape)
        assert len(parts) <= 8
    assert len(read) == sum(len(row.names) for row in loaded.rows)


def test_no_tensor_is_read_before_all_are_checked(folder, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("read a tensor of a checkpoint that does not fit")

    broken = rewrite(folder, tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.setattr(shards.Slice, "__getitem__", never)
    monkeypatch.setattr(shards.Slice, "read_rows", never)
    with pytest.raises(UserError, match=r"missing model.norm.weight"):
        load(broken)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_accelerators_way_of_stacking_gives_the_same_arrays(dtype, folder, monkeypatch):
    wanted = values(load(folder, Lora(), dtype=dtype))
    monkeypatch.setattr(weights_load, "on_cpu", lambda sharding: False)
    found = values(load(folder, Lora(), dtype=dtype, mesh=make_mesh(config.Mesh(fsdp=4, tensor=2))))
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)


def test_loading_holds_no_more_than_two_tensors_beyond_the_arrays(tmp_path):
    """In a process of its own, on a checkpoint of 0.4 GB; the figure is below a tenth of a tensor here."""
    assert loading.write_checkpoint(tmp_path, 4e8) > 3e8
    child = [sys.executable, "-m", "tests.benchmarks.loading", "--folder", str(tmp_path)]
    said = subprocess.run(child, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert json.loads(said.stdout.splitlines()[-1])["tensors"] <= 2


@pytest.mark.parametrize(
    ("stored", "asked", "given"),
    [
        ("bfloat16", "auto", "bfloat16"), ("float32", "auto", "float32"), ("float16", "auto", "float32"),
        ("bfloat16", "float32", "float32"), ("float32", "bfloat16", "bfloat16"), ("float16", "bfloat16", "bfloat16"),
    ],
)  # fmt: skip
def test_the_dtype_is_the_files_own_or_the_one_asked_for(stored, asked, given, tmp_path):
    import torch

    model = llama().to(getattr(torch, stored))
    loaded = load(save(model, tmp_path), Lora(), dtype=asked)
    assert {value.dtype for value in loaded.frozen.values()} == {jnp.dtype(given)}
    kernel = model.model.layers[1].mlp.up_proj.weight.detach().to(getattr(torch, given)).float().numpy()
    found = next(np.asarray(v, np.float32)[1] for path, v in loaded.frozen.items() if path.endswith("up_proj.kernel"))
    assert np.array_equal(found, kernel)  # rounded as torch rounds


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("no/such/folder", "no folder no/such/folder"),
        ("./nowhere", "no folder ./nowhere"),
        ("/nowhere/at/all", "no folder /nowhere/at/all"),
        ("justaname", "no folder justaname"),
        ("", "model.name"),
        ("nobody-here/no-such-model", "is not a folder here"),
        ("a b/c", "model.name: a b/c"),
        ("..foo/bar", "no folder ..foo/bar"),
        ("builtin:huge", "'builtin:huge' is not built in; built in: builtin:tiny"),
    ],
)
def test_a_model_that_is_nowhere_is_refused_by_name(name, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        local_folder(name)
    assert shown in str(error.value)


def test_a_file_is_no_model(folder):
    with pytest.raises(UserError, match="is a file; give the folder"):
        local_folder(str(folder / "model.safetensors"))


def test_a_random_start_is_seeded_and_needs_no_weights(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    one, again, other = (load(tmp_path, None, init="random", seed=seed) for seed in (0, 0, 1))
    sharded = load(tmp_path, None, init="random", mesh=make_mesh())
    assert all(np.array_equal(a, b) for a, b in zip(values(one).values(), values(again).values(), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(values(one).values(), values(sharded).values(), strict=True))
    names = {row.path: row.names[0] for row in one.rows}
    for path, value in values(one).items():
        if names[path].endswith("norm.weight"):
            assert (value == 1).all()
        elif names[path].endswith("bias"):
            assert (value == 0).all()
        else:
            assert abs(value.std() - 0.02) < 0.002 and not np.array_equal(value, values(other)[path])
    assert {len(value.devices()) for value in sharded.trainable.values()} == {8}
    assert jax.device_count() == 8
