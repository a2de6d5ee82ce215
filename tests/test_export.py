"""`python -m jaxft.export`: merged checkpoints that transformers loads, adapters written anew, and a user's mistakes."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import openelm as apple
import peft
import pytest
import safetensors.torch
import torch
import transformers
from checkpoints import SIZES, assert_same, load, logits, peft_model, tokens, torch_logits
from safetensors.numpy import load_file, save_file
from test_adapters import DORA, EMBED, EVERY, FUSED, HEAD, PATTERNS, QUERY, TIED, UNTIED, by_peft, make, read
from test_peft import copy

from jaxft import config, export
from jaxft.errors import UserError
from jaxft.models.adaptation import Adapter
from jaxft.weights import merged
from jaxft.weights.model import find

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
IDS = tokens(3, 24, seed=7)
# (W + BA) x for W x + B (A x), in fp32: some 1e-7 a product, and Gemma 2's soft-caps and norms carry it through 3 layers.
MERGED = 2e-5  # of the logits' spread
BOTH = {"modules_to_save": [EMBED, HEAD]}
KINDS = {
    "llama": ("llama", {"attention_bias": True}, EVERY | {"bias": "all", "lora_alpha": 2.5}),
    "llama, untied, both, a norm": ("llama", {}, QUERY | {"modules_to_save": [EMBED, HEAD, "input_layernorm"]}),
    "gemma, DoRA": ("gemma", {}, EVERY | DORA),
    "gemma2": ("gemma2", {}, EVERY),
    "gemma2, tied head": ("gemma2", {}, QUERY | {"modules_to_save": [HEAD]}),
    "gemma2, untied, DoRA, head": ("gemma2", UNTIED, EVERY | DORA | {"modules_to_save": [HEAD]}),
    "qwen2, DoRA, biases of the pairs": ("qwen2", {}, EVERY | DORA | {"bias": "lora_only"}),
    "qwen2, tied embedding": ("qwen2", TIED, QUERY | {"modules_to_save": [EMBED]}),
    "qwen2, tied, every bias, both, a biased linear": (
        "qwen2", TIED, QUERY | {"bias": "lora_only", "modules_to_save": [EMBED, HEAD, "v_proj"]}
    ),
    "qwen3, patterns, norms": ("qwen3", {}, EVERY | PATTERNS | {"modules_to_save": ["q_norm", "k_norm"]}),
    "mistral, patterns, rank-stabilised DoRA": ("mistral", {}, EVERY | PATTERNS | DORA | {"use_rslora": True}),
    "openelm": ("openelm", {}, {"target_modules": FUSED}),
    "openelm, DoRA": ("openelm", {}, {"target_modules": FUSED} | DORA),
    "openelm, embedding that is the head": ("openelm", {}, {"target_modules": FUSED, "modules_to_save": ["token_embeddings"]}),
    "openelm, untied, head": (
        "openelm", {"share_input_output_layers": False}, {"target_modules": FUSED, "modules_to_save": [HEAD]}
    ),
}  # fmt: skip


def adapter_of(base, folder, **settings):
    """The folder of an adapter that PEFT made for `base`, which it names."""
    peft_model(read(base), **settings).save_pretrained(folder)
    return copy(folder, folder, base_model_name_or_path=str(base))


def run(adapter, out, *options):
    """Exports, and returns the folder."""
    export.main(["--adapter", str(adapter), "--out", str(out), *map(str, options)])
    return out


def stored(folder):
    """Every tensor of a checkpoint by name."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base with a tokenizer of its own, as text that no test reads, and an adapter for it."""
    folder = make("llama", tmp_path_factory.mktemp("base"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text(f"{name} of the base")
    return folder


@pytest.fixture(scope="module")
def plain(llama, tmp_path_factory):
    return adapter_of(llama, tmp_path_factory.mktemp("adapter"), **EVERY)


@pytest.mark.parametrize(("family", "changes", "settings"), KINDS.values(), ids=KINDS)
def test_a_merged_checkpoint_gives_the_logits_of_base_and_adapter(family, changes, settings, tmp_path):
    base = make(family, tmp_path / "base", **changes)
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    out = run(adapter, tmp_path / "out", "--merge")
    assert_same(torch_logits(read(out), IDS), torch_logits(by_peft(base, adapter), IDS), MERGED)
    assert_same(logits(load(out), IDS), logits(load(base, adapter=str(adapter)), IDS), MERGED)
    before, after = stored(base), stored(out)
    tied = getattr(read(base).config, "tie_word_embeddings", False)
    parted = {"lm_head.weight"} if tied and {EMBED, HEAD} & set(settings.get("modules_to_save", ())) else set()
    assert after.keys() == before.keys() | parted
    assert all(value.dtype == np.float32 for value in after.values())
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    assert now == was | ({"tie_word_embeddings": False} if parted else {})


def exact(base, adapter):
    """W + scale · BA and so on by PEFT in fp32, of a base of any dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of merging tied modules, which makes no difference to the tensors
        return peft.PeftModel.from_pretrained(read(base), adapter).merge_and_unload().state_dict()


ROUNDED = {"plain": EVERY, "DoRA": EVERY | DORA, "in full": EVERY | BOTH | {"bias": "all"}}


@pytest.mark.parametrize("settings", ROUNDED.values(), ids=ROUNDED)
def test_bfloat16_weights_are_merged_in_float32_and_rounded_once(settings, tmp_path):
    base = tmp_path / "base"
    read(make("qwen2", tmp_path / "fp32", **TIED)).bfloat16().save_pretrained(base)
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    wanted = {name: value.numpy() for name, value in exact(base, adapter).items()}
    half = run(adapter, tmp_path / "half", "--merge")
    full = run(adapter, tmp_path / "full", "--merge", "--dtype", "float32")
    for name, value in stored(full).items():
        assert value.dtype == np.float32
        assert np.abs(value - wanted[name]).max() <= 1e-6 * np.abs(wanted[name]).max(), name  # a sum in another order
        rounded = stored(half)[name]
        assert rounded.dtype == ml_dtypes.bfloat16 and np.array_equal(rounded, value.astype(ml_dtypes.bfloat16)), name
    assert json.loads((full / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(torch_logits(read(full), IDS), torch_logits(by_peft(base, adapter), IDS), MERGED)


def test_each_tensor_keeps_its_own_dtype_unless_told_otherwise(llama, plain, tmp_path):
    mixed = shutil.copytree(llama, tmp_path / "mixed")
    tensors = safetensors.torch.load_file(llama / "model.safetensors")
    tensors = {name: value if "norm" in name else value.half() for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, mixed / "model.safetensors", {"format": "pt"})
    kept = stored(run(plain, tmp_path / "kept", "--merge", "--model", mixed))
    assert {name: value.dtype for name, value in kept.items()} == {n: t.numpy().dtype for n, t in tensors.items()}
    cast = run(plain, tmp_path / "cast", "--merge", "--model", mixed, "--dtype", "bfloat16")
    assert {value.dtype for value in stored(cast).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert read(cast).dtype == torch.float32 and transformers.AutoConfig.from_pretrained(cast).dtype == torch.bfloat16


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_written_only_where_they_part(tmp_path):
    base = make("qwen2", tmp_path / "base", **TIED)
    tensors = stored(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    together = run(adapter_of(base, tmp_path / "one", **QUERY), tmp_path / "together", "--merge")
    apart = run(adapter_of(base, tmp_path / "two", **QUERY, modules_to_save=[EMBED]), tmp_path / "apart", "--merge")
    assert stored(together).keys() == tensors.keys() - {"lm_head.weight"}
    assert np.array_equal(stored(apart)["lm_head.weight"], tensors["lm_head.weight"])


def test_shards_are_small_and_their_index_is_right(llama, plain, tmp_path, monkeypatch):
    whole = run(plain, tmp_path / "whole", "--merge")
    monkeypatch.setattr(merged, "SHARD_BYTES", 20_000)
    out = run(plain, tmp_path / "out", "--merge")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = {file.name: sum(v.nbytes for v in load_file(file).values()) for file in out.glob("*.safetensors")}
    assert len(sizes) > 3 and max(sizes.values()) <= 20_000 and not (whole / "model.safetensors.index.json").exists()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert set(index["weight_map"].values()) == sizes.keys()
    assert all(name in load_file(out / file) for name, file in index["weight_map"].items())
    assert {name: v.tobytes() for name, v in stored(out).items()} == {n: v.tobytes() for n, v in stored(whole).items()}
    assert np.array_equal(torch_logits(read(out), IDS), torch_logits(read(whole), IDS))


def test_tokenizer_and_generation_settings_travel_along(llama, plain, tmp_path):
    out = run(plain, tmp_path / "out", "--merge")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (llama / name).read_bytes()
    own = shutil.copytree(plain, tmp_path / "own")
    (own / "tokenizer_config.json").write_text("of the adapter")
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer_config.json").write_text("of the option")
    for i, options in enumerate(([], ["--merge"])):
        mine = run(own, tmp_path / f"mine{i}", *options)
        given = run(own, tmp_path / f"given{i}", "--tokenizer", other, *options)
        assert (mine / "tokenizer_config.json").read_text() == "of the adapter"
        assert (given / "tokenizer_config.json").read_text() == "of the option"


@pytest.mark.parametrize("settings", [EVERY, EVERY | DORA | BOTH | {"bias": "all"}], ids=["plain", "of every kind"])
def test_a_bfloat16_adapter_is_written_anew_in_float32_with_every_key(settings, tmp_path, capsys):
    base = make("qwen2", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    tensors = {n: v.bfloat16() for n, v in safetensors.torch.load_file(adapter / "adapter_model.safetensors").items()}
    safetensors.torch.save_file(tensors, adapter / "adapter_model.safetensors")
    out = run(adapter, tmp_path / "out")
    said = capsys.readouterr().out
    assert str(out) in said and ("vLLM-ready: yes" if settings == EVERY else "vLLM-ready: no, ") in said
    written = stored(out)
    assert written.keys() == tensors.keys()
    assert all(v.dtype == np.float32 and np.array_equal(v, tensors[n].float().numpy()) for n, v in written.items())
    assert np.array_equal(torch_logits(by_peft(base, out), IDS), torch_logits(by_peft(base, adapter), IDS))
    said = json.loads((out / "adapter_config.json").read_text())
    assert said.keys() >= {"r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_dora", "rank_pattern"}
    assert said["base_model_name_or_path"] == str(base) and said.keys() <= peft.LoraConfig.__dataclass_fields__.keys()


def test_a_float32_adapter_written_anew_is_bit_identical(llama, plain, tmp_path):
    once = run(plain, tmp_path / "once")
    twice = run(once, tmp_path / "twice")
    before, after = load_file(plain / "adapter_model.safetensors"), load_file(twice / "adapter_model.safetensors")
    assert {n: v.tobytes() for n, v in before.items()} == {n: v.tobytes() for n, v in after.items()}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()


def test_a_run_folder_stands_for_its_adapter_and_a_named_model_for_the_adapters_own(llama, plain, tmp_path):
    ran = tmp_path / "run"
    shutil.copytree(plain, ran / "adapter")
    (ran / "config.json").write_text("{}")
    wanted = stored(run(plain, tmp_path / "a", "--merge"))
    assert all(np.array_equal(v, wanted[n]) for n, v in stored(run(ran, tmp_path / "b", "--merge")).items())
    other = make("llama", tmp_path / "other", seed=1)
    found = stored(run(ran, tmp_path / "c", "--merge", "--model", other))
    assert all(not np.array_equal(v, wanted[n]) for n, v in found.items())
    again = json.loads((run(ran, tmp_path / "d", "--model", other) / "adapter_config.json").read_text())
    assert again["base_model_name_or_path"] == str(other)


MISTAKES = {
    "out exists": "out exists", "no adapter": "nowhere", "base gone": "gone", "base that the Hub would have": "some/base",
    "no base named": "--model adapter_config.json", "another width": "q_proj (8, 32)", "another family": "openelm model.layers",
}  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--merge"]], ids=["adapter", "merged"])
@pytest.mark.parametrize(("mistake", "shown"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(mistake, shown, options, plain, tmp_path):
    adapter, out = shutil.copytree(plain, tmp_path / "adapter"), tmp_path / "out"
    bases = {"base gone": str(tmp_path / "gone"), "base that the Hub would have": "some/base", "no base named": None}
    if mistake == "out exists":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif mistake == "no adapter":
        adapter = tmp_path / "nowhere"
    elif mistake in bases:
        copy(plain, adapter, base_model_name_or_path=bases[mistake])
    elif mistake == "another width":
        options = [*options, "--model", make("llama", tmp_path / "other", hidden_size=16)]
    else:
        options = [*options, "--model", make("openelm", tmp_path / "other")]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        run(adapter, out, *options)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in shown.split()), str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_code_of_a_hub_repository_is_named_by_it_and_that_of_a_local_folder_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = make("openelm", tmp_path / "models" / "openelm")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=FUSED)
    source = find(config.Model(name=str(base), adapter=str(adapter)))
    hub = merged.config_for(base, "apple/OpenELM-270M", source.arch, source.plan, None)["auto_map"]
    assert set(hub.values()) == {f"apple/OpenELM-270M--{name}" for name in apple.COMMON["auto_map"].values()}
    out = run(adapter, tmp_path / "out", "--merge", "--model", "models/openelm")  # a folder, however much like a Hub id
    assert json.loads((out / "config.json").read_text())["auto_map"] == apple.COMMON["auto_map"]


def test_a_row_of_zeros_stays_one_under_dora():
    """As in training, where its magnitude of 0 is divided by a length that is not quite 0."""
    pair = {"lora_A.weight": np.ones((1, 3)), "lora_B.weight": np.zeros((2, 1))}
    parts = pair | {"lora_magnitude_vector": np.array([0.0, 5.0])}
    weight = np.array([[0, 0, 0], [0, 3, 4]], np.float32)
    assert np.array_equal(merged.with_pair(weight.copy(), Adapter(1, 1.0, dora=True), parts.__getitem__), weight)


def test_the_command_prints_its_help():
    command = [sys.executable, "-m", "jaxft.export", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and not ended.stderr
    for option in ("--adapter", "--out", "--merge", "--model", "--revision", "--tokenizer", "--dtype"):
        assert option in ended.stdout


PEAK = """
from jaxft import export
from jaxft.weights import merged
merged.SHARD_BYTES = 20_000_000
for name in ("small", "large"):  # the first imports everything
    export.main(["--adapter", f"{name}/adapter", "--out", f"{name}/out", "--merge"])
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""  # not ru_maxrss, which begins as that of the process that started this one


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak as Linux tells it")
def test_merging_holds_a_few_shards_in_memory_and_never_the_model(tmp_path):
    large = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12, vocab_size=1000)
    for name, sizes in (("small", {}), ("large", large)):
        base = tmp_path / name / "base"
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | sizes)).save_pretrained(base)
        adapter_of(base, tmp_path / name / "adapter", **EVERY)
    ended = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    before, after = (1024 * int(line) for line in ended.stdout.splitlines()[1::2])
    size = (tmp_path / "large/base/model.safetensors").stat().st_size
    # A shard of 20 MB is held twice while it is written, and a tensor of 6 MB several times while it is merged.
    assert size > 200e6 and after - before < size / 2
