"""A Keras preset loads as the model it is: transformers and jaxft both give Keras' own logits and ids from it, in fp32.

Keras itself runs once, in another process (keras_presets.py). Tolerance: the sides sum in another order, about 1e-6 of the
logits' spread here; 1e-4 is far from that and from the smallest planted difference.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import keras_presets
import numpy as np
import pytest
import torch
import transformers
from keras_presets import CASES, IDS, TEXTS, TURNS, UNKNOWN, WINDOW

from jaxft import config
from jaxft.config import Lora
from jaxft.data.chat import load_tokenizer
from jaxft.errors import UserError
from jaxft.parallel.mesh import make_mesh
from jaxft.weights import keras
from jaxft.weights.keras import tokenizer as keras_tokenizer
from jaxft.weights.model import find, load_decoder, materialise

pytestmark = pytest.mark.slow  # importing Keras alone takes twenty seconds

LOGITS = 1e-4
SPLIT = {"fsdp=8": config.Mesh(fsdp=8), "fsdp=4, tensor=2": config.Mesh(fsdp=4, tensor=2)}
FAMILIES = {"Gemma": "gemma2", "Llama3": "llama3", "Qwen": "qwen"}  # a case of each tokenizer


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    """The folder that keras_presets.py wrote."""
    folder = tmp_path_factory.mktemp("presets")
    environment = dict(
        os.environ, KERAS_BACKEND="jax", HF_HOME=str(folder / "home"), PYTHONPATH=os.pathsep.join(sys.path)
    )
    command = [sys.executable, keras_presets.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def facts(presets):
    return json.loads((presets / "facts.json").read_text())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Hugging Face's cache, as an empty folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def in_torch(preset, **changes):
    """Float32 logits for IDS of transformers' model with the preset's config and tensors."""
    settings = transformers.AutoConfig.from_pretrained(preset.folder, **changes)
    settings._attn_implementation = "eager"  # the others have no soft cap
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    tensors = {name: torch.from_numpy(np.array(t[...], np.float32)) for name, t in preset.files.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if settings.tie_word_embeddings else set())
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


def difference(got, want):
    """The largest, in standard deviations of `want`."""
    assert got.shape == want.shape
    return np.abs(got - want).max() / want.std()


def damaged(preset, target, part, **changes):
    """A copy of a preset whose config.json or tokenizer.json has other fields."""
    shutil.copytree(preset, target)
    record = json.loads((target / part).read_text())
    record["config"] |= changes
    (target / part).write_text(json.dumps(record))
    return target


@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_keras_logits(case, presets):
    preset, want = keras.open_preset(f"keras:{presets / case}"), np.load(presets / f"{case}.npy")
    assert difference(in_torch(preset), want) <= LOGITS


@pytest.mark.parametrize("case", CASES)
def test_the_decoder_gives_keras_logits(case, presets):
    model, _ = load_decoder(str(presets / case))  # recognised without its prefix
    got = np.asarray(jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(IDS)))
    assert difference(got, np.load(presets / f"{case}.npy")) <= LOGITS


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"sliding_window": WINDOW + 1}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("gemma2 scaled by D over N", {"query_pre_attn_scalar": 12}),
        ("llama3", {"rms_norm_eps": 1e-6}),
        ("llama3 with adjusted frequencies", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("qwen", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("qwen untied, long rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("qwen with a window", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    ],
    ids=str,
)
def test_the_tolerance_would_notice_a_setting_that_is_lost(case, changes, presets):
    preset, want = keras.open_preset(f"keras:{presets / case}"), np.load(presets / f"{case}.npy")
    assert difference(in_torch(preset, **changes), want) > 100 * LOGITS


def test_the_config_names_what_the_variables_hold(presets):
    found = {}
    for case in CASES:
        preset = keras.open_preset(f"keras:{presets / case}")
        told = json.loads((preset.folder / "config.json").read_text())
        found[case] = (told["model_type"], told["tie_word_embeddings"], told["dtype"])
        assert ("lm_head.weight" in preset.files) != told["tie_word_embeddings"]
        assert {tensor.dtype.name for tensor in preset.files.values()} == {told["dtype"]}
    assert found["gemma"] == ("gemma", True, "float32") and found["bfloat16 in shards"] == ("gemma2", True, "bfloat16")
    assert found["llama3"] == ("llama", False, "float32") and found["llama3 tied"] == ("llama", True, "float32")
    assert found["qwen"] == ("qwen2", True, "float32") and found["qwen untied, long rope"] == (
        "qwen2",
        False,
        "float32",
    )


def test_bfloat16_stays_bfloat16(presets):
    assert find(config.Model(name=f"keras:{presets / 'bfloat16 in shards'}", dtype="auto")).dtype == jnp.bfloat16


@pytest.mark.parametrize("mesh", SPLIT.values(), ids=SPLIT.keys())
@pytest.mark.parametrize("case", ["gemma2", "qwen untied, long rope"])
def test_arrays_on_eight_devices_equal_those_on_one(case, mesh, presets):
    source = find(config.Model(name=str(presets / case), dtype="float32"), Lora(rank=2))
    one, eight = (materialise(source, mesh).frozen for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(mesh)))
    assert all(np.array_equal(np.asarray(one[path]), np.asarray(eight[path])) for path in one)


def test_a_slice_reads_what_the_whole_holds(presets):
    for case in ("gemma2", "llama3"):
        for tensor in keras.open_preset(str(presets / case)).files.values():
            whole, index = np.asarray(tensor[...]), tuple(slice(n // 3, n - n // 4) for n in tensor.shape)
            assert whole.shape == tensor.shape and whole.dtype == tensor.dtype
            assert np.array_equal(tensor[index], whole[index])


def test_only_gemmas_heads_are_copied(presets):
    for case, names in (("llama3", set()), ("gemma2", {"q_proj", "k_proj", "v_proj"})):
        files = keras.open_preset(str(presets / case)).files
        copied = {name.split(".")[-2] for name, tensor in files.items() if not isinstance(tensor[...], np.memmap)}
        assert copied == names


def test_no_keras_is_imported_for_a_folder(presets):
    before = set(sys.modules)
    keras.open_preset(str(presets / "gemma2"))
    roots = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not roots & {"keras", "keras_nlp", "keras_hub", "tensorflow"}


# ---- tokenizers


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_text_equal_those_of_keras(family, presets, facts):
    tokenizer = load_tokenizer(keras.open_preset(str(presets / FAMILIES[family])).folder)
    for text, (ids, as_fed, back) in zip([*TEXTS, TURNS[family]], facts["tokens"][family], strict=True):
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        assert tokenizer(text).input_ids == as_fed  # with the BOS, where the family has one
        assert tokenizer.decode(ids) == back == text


def test_llama3s_own_vocabulary_gives_llama3s_own_ids(shared, tmp_path):
    """A preset's tokenizer, made of the released one as Keras' converter does, against the released one."""
    released = shared / "tokenizers" / "llama3"
    record = json.loads((released / "tokenizer.json").read_text())
    special = {t["content"]: t["id"] for t in record["added_tokens"] if "reserved" not in t["content"]}
    assets = tmp_path / "assets" / "tokenizer"
    assets.mkdir(parents=True)
    (assets / "vocabulary.json").write_text(json.dumps(record["model"]["vocab"] | special))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in record["model"]["merges"])
    (assets / "merges.txt").write_text("".join(f"{pair}\n" for pair in merges))
    fields = {"config_file": "tokenizer.json", "unsplittable_tokens": sorted(special)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"class_name": "Llama3Tokenizer", "config": fields}))
    for name, text in keras_tokenizer.read_tokenizer(tmp_path).files.items():
        (assets / name).write_text(text)
    ours, theirs = load_tokenizer(assets), load_tokenizer(released)
    rows = (shared / "data" / "gsm8k_test.jsonl").read_text().splitlines()[:200]
    for text in [*TEXTS, TURNS["Llama3"], *rows]:
        assert ours(text).input_ids == theirs(text).input_ids


@pytest.mark.parametrize(
    ("family", "bos", "eos", "ends"),
    [
        ("Gemma", "<bos>", "<eos>", ["<eos>", "<end_of_turn>"]),
        ("Llama3", "<|begin_of_text|>", "<|end_of_text|>", ["<|end_of_text|>", "<|eot_id|>"]),
        ("Qwen", None, "<|endoftext|>", ["<|endoftext|>", "<|im_end|>"]),
    ],
)
def test_special_tokens_and_what_ends_an_answer(family, bos, eos, ends, presets):
    preset = keras.open_preset(str(presets / FAMILIES[family]))
    tokenizer, told = load_tokenizer(preset.folder), json.loads((preset.folder / "config.json").read_text())
    assert (tokenizer.bos_token, tokenizer.eos_token) == (bos, eos)
    assert told["bos_token_id"] == tokenizer.bos_token_id and told["pad_token_id"] == tokenizer.pad_token_id
    assert tokenizer.convert_ids_to_tokens(told["eos_token_id"]) == ends
    assert tokenizer(f"a{eos}", add_special_tokens=False).input_ids[-1] == tokenizer.eos_token_id


def test_other_sentencepiece_models_are_refused_by_what_differs(presets, tmp_path):
    for other, shown in (("unigram", "model_type: 1"), ("prefix", "add_dummy_prefix: 1")):
        folder = shutil.copytree(presets / "gemma2", tmp_path / other)
        spm = Path("assets/tokenizer/vocabulary.spm")
        shutil.copyfile(presets / other / spm, folder / spm)
        with pytest.raises(UserError, match=f"vocabulary.spm: {shown} is not supported; Gemma's has"):
            keras.open_preset(str(folder))


@pytest.mark.parametrize(
    "content", [b"", b"\x0a\x05ab", b"\xff\xff\xff", b"\x0a\x02\x08\x01", b"\x0b\x00", b"\x10\x01"]
)
def test_a_damaged_sentencepiece_model_is_refused(content, tmp_path):
    (tmp_path / "vocabulary.spm").write_bytes(content)
    with pytest.raises(UserError, match=r"vocabulary.spm: "):
        keras_tokenizer._read_pieces(tmp_path / "vocabulary.spm")


# ---- the folder


def test_the_written_folder_is_named_by_what_it_holds(presets, cache, tmp_path):
    one, again = (keras.open_preset(str(presets / "llama3")).folder for _ in range(2))
    assert one == again and one.parent == cache / "jaxft" / "keras"
    assert sorted(p.name for p in one.iterdir()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    other = keras.open_preset(
        str(damaged(presets / "llama3", tmp_path / "llama3", "config.json", layer_norm_epsilon=1e-5))
    )
    assert other.folder != one
    (one / "tokenizer.json").unlink()
    assert (keras.open_preset(str(presets / "llama3")).folder / "tokenizer.json").is_file()


def test_a_cache_that_cannot_be_written_is_one_line(presets, cache):
    cache.write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*set HF_HOME"):
        keras.open_preset(str(presets / "llama3"))


# ---- what is refused


def test_names_that_are_presets(presets, tmp_path, monkeypatch):
    assert keras.is_preset("keras:gemma2_2b_en") and keras.is_preset(str(presets / "gemma"))
    monkeypatch.chdir(presets / "gemma")
    assert not any(
        map(keras.is_preset, ("", "owner/model", "builtin:tiny", str(tmp_path), str(presets / "facts.json")))
    )
    for text in ("{}", "[]", "{", '{"model_type": "llama", "class_name": "x"}', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        assert not keras.is_preset(str(tmp_path))


@pytest.mark.parametrize(
    ("case", "changes", "shown"),
    [
        ("gemma", {"use_post_ffw_norm": True}, "use_post_attention_norm: False is not supported; supported: True"),
        ("gemma", {"attention_logit_soft_cap": 50.0}, "attention_logit_soft_cap: 50.0 is not supported"),
        ("gemma", {"use_sliding_window_attention": True}, "use_sliding_window_attention: True is not supported"),
        ("gemma", {"query_head_dim_normalize": False}, "query_head_dim_normalize: False is not supported"),
        ("gemma2", {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon: 1e-05 is not supported; supported: 1e-06"),
        ("gemma2", {"intermediate_dim": 47}, "intermediate_dim: 47 is odd"),
        ("gemma2", {"a_new_field": 3}, "a_new_field: '3' is a field that this family's reader does not understand"),
        ("gemma2", {"num_layers": None}, "num_layers is missing"),
        ("gemma2", {"num_layers": 2}, "unexpected gemma_decoder_block_2/"),
        ("gemma2", {"num_layers": 4}, "missing gemma_decoder_block_3/pre_attention_norm/vars/0 (32,)"),
        ("gemma2", {"head_dim": 10}, "attention/query_dense/vars/0: file (4, 32, 12), model (4, 32, 10)"),
        ("llama3", {"rope_position_scaling_factor": 2.0}, "rope_position_scaling_factor: 2.0 is not supported; supported: 1.0"),
        ("llama3", {"rope_low_freq_factor": 1.0}, "rope_frequency_adjustment_factor, rope_high_freq_factor, rope_pre"),
        ("llama3", {"tie_word_embeddings": True}, "unexpected reversible_embedding/vars/1 (32, 400)"),
        ("qwen", {"tie_word_embeddings": False}, "missing reversible_embedding/vars/1 (32, 400)"),
        ("qwen", {"dtype": "int8"}, "dtype 'int8': quantised presets are not supported"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_by_field_and_value(case, changes, shown, presets, tmp_path):
    folder = damaged(presets / case, tmp_path / "preset", "config.json", **changes)
    with pytest.raises(UserError) as error:
        keras.open_preset(f"keras:{folder}")
    assert shown in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_quantised_preset_is_refused(presets):
    with pytest.raises(UserError, match=r"config.json: dtype 'DTypePolicyMap': quantised presets are not supported"):
        keras.open_preset(str(presets / "int8"))


def test_another_architecture_is_refused_with_those_that_are_supported(presets, tmp_path):
    for part, other in (("config.json", "BertBackbone"), ("tokenizer.json", "BertTokenizer")):
        folder = shutil.copytree(presets / "gemma", tmp_path / other)
        (folder / part).write_text((folder / part).read_text().replace(other.replace("Bert", "Gemma"), other))
        supported = other.replace("Bert", "Gemma") + ", " + other.replace("Bert", "Llama3")
        with pytest.raises(UserError, match=f"{part}: class_name '{other}' is not supported; supported: {supported}"):
            keras.open_preset(str(folder))


@pytest.mark.parametrize(
    ("lost", "shown"),
    [
        ("model.weights.h5", "no model.weights.h5 and no model.weights.json"),
        ("config.json", "config.json: missing"),
        ("tokenizer.json", "tokenizer.json: missing; a Keras preset with a tokenizer"),
        ("assets/tokenizer/vocabulary.json", "vocabulary.json: missing"),
        ("assets/tokenizer/merges.txt", "merges.txt: missing; download the preset again"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_by_its_name(lost, shown, presets, tmp_path):
    folder = shutil.copytree(presets / "llama3", tmp_path / "preset")
    (folder / lost).unlink()
    with pytest.raises(UserError, match=shown):
        keras.open_preset(f"keras:{folder}")


def test_a_hugging_face_folder_is_no_preset(shared_config):
    with pytest.raises(UserError, match=r"no class_name and config in it.*without keras:"):
        keras.open_preset(f"keras:{shared_config}")


@pytest.fixture
def shared_config(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_a_file_that_is_damaged_or_laid_out_otherwise_is_refused(presets, tmp_path):
    folder = shutil.copytree(presets / "llama3", tmp_path / "preset")
    file = folder / "model.weights.h5"
    whole = file.read_bytes()
    for content in (b"", b"no HDF5", whole[:2000], whole[: len(whole) - 3000]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"model.weights.h5: .*(damaged|truncated)"):
            keras.open_preset(str(folder))
    file.write_bytes(whole)
    path = "layers/llama_layer_norm/vars/0"
    for options in ({"compression": "gzip"}, {"dtype": np.int8}, {"dtype": ">f4"}):
        with h5py.File(file, "a") as opened:
            del opened[path]
            opened.create_dataset(path, data=np.ones(32), **options)
        with pytest.raises(
            UserError, match=r"llama_layer_norm/vars/0: (not laid out as Keras does|dtype .* not supported)"
        ):
            keras.open_preset(str(folder))
    with h5py.File(file, "a") as opened:
        del opened[path]
        opened[path] = h5py.ExternalLink("/etc/passwd", "x")
    with pytest.raises(UserError, match=r"missing llama_layer_norm/vars/0"):
        keras.open_preset(str(folder))


@pytest.mark.parametrize("name", ["../model_00000.weights.h5", "/etc/passwd", "model.bin", "", 7])
def test_an_index_that_leaves_the_folder_is_refused(name, presets, tmp_path):
    folder = shutil.copytree(presets / "bfloat16 in shards", tmp_path / "preset")
    assert len(list(folder.glob("*.weights.h5"))) > 1
    index = folder / "model.weights.json"
    places = json.loads(index.read_text())
    places["weight_map"]["/layers/rms_normalization/vars"] = ["model_00000.weights.h5", name]
    index.write_text(json.dumps(places))
    with pytest.raises(UserError, match=r"weight_map names .*same folder"):
        keras.open_preset(str(folder))


def test_a_missing_shard_is_refused(presets, tmp_path):
    folder = shutil.copytree(presets / "bfloat16 in shards", tmp_path / "preset")
    (folder / "model_00001.weights.h5").unlink()
    with pytest.raises(UserError, match=r"model_00001.weights.h5: missing"):
        keras.open_preset(str(folder))


def test_presets_of_old_keras_name_the_layers_otherwise(presets, tmp_path):
    folder = shutil.copytree(presets / "gemma", tmp_path / "preset")
    with h5py.File(folder / "model.weights.h5", "a") as opened:
        opened.move("layers", "_layer_checkpoint_dependencies")
    assert keras.open_preset(str(folder)).files.keys() == keras.open_preset(str(presets / "gemma")).files.keys()


@pytest.mark.parametrize("module", ["keras_nlp", "h5py"])
def test_without_keras_nlp_the_remedy_is_named(module, presets, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    name = "keras:gemma2_2b_en" if module == "keras_nlp" else f"keras:{presets / 'gemma'}"
    with pytest.raises(UserError, match=r"keras:.* need keras-nlp .*pip install 'jaxft\[keras\]'"):
        keras.open_preset(name)


@pytest.mark.parametrize(
    "name", ["keras:", "keras:./nowhere", "keras:/nowhere/at/all", "keras:owner/model", "keras:gs://a/b"]
)
def test_a_preset_that_is_nowhere_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"model.name: {name}: no folder .*kaggle://"):
        keras.open_preset(name)


def test_a_preset_on_the_hub_is_downloaded_with_its_files(presets, monkeypatch):
    asked = {}

    def download(name, *, revision, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(presets / "gemma")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert "model.norm.weight" in keras.open_preset("keras:hf://keras/gemma_2b_en").files
    assert asked == {"name": "keras/gemma_2b_en", "patterns": ["*.json", "*.h5", "assets/*"]}


def test_a_revision_is_refused(presets):
    with pytest.raises(UserError, match=r"model.revision: 'main', but .* is a Keras preset"):
        find(config.Model(name=str(presets / "gemma"), revision="main"))


def test_built_in_names_are_looked_up_in_keras_nlp(facts):
    said = facts["lookups"]
    for name in UNKNOWN[:3]:
        assert f"keras:{name} is no preset of keras-nlp; there are: " in said[name]
    assert "gemma2_2b_en" in said["gemma2_3b_en"] and "qwen" not in said["gemma2_3b_en"]
    assert "llama3.2_1b" in said["llama3.3_1b"] and "qwen2.5_0.5b_en" in said["qwen9"]
    assert "another class; supported: GemmaBackbone, Llama3Backbone, QwenBackbone" in said["bert_base_en"]
    (first, config_file), (then, everything) = said["asked"]
    assert first == then and first.startswith("keras/gemma2/keras/gemma2_2b_en/")
    assert (config_file, everything) == ("config.json", None)  # what is refused costs no download of weights
    assert "model.norm.weight" in said["found"]


def test_what_kaggle_answers_is_one_line(facts):
    said = facts["lookups"]
    assert "accept its licence on kaggle.com" in said["403"] and "Kaggle answered 404" in said["404"]
    assert "cannot be downloaded (ConnectionError: no network)" in said["offline"]
