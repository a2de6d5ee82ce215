"""Whatever is in the files of a model, an adapter or a data set: it is read, or refused in one line; no traceback and no hang.

Each kind of file gets 100 inputs by default and 1,000 with `-m slow`, random ones and good ones spoilt;
`JAXFT_FUZZ=10000 python -m pytest -m slow tests/test_fuzz.py` gives each 10,000 in six minutes.
"""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxft import config
from jaxft.data import chat, rows
from jaxft.errors import UserError, one_line
from jaxft.weights import hub, peft, shards
from jaxft.weights.hub import BUILTIN

TINY = BUILTIN["builtin:tiny"]
MANY = int(os.environ.get("JAXFT_FUZZ", "1000"))
SECONDS = 20  # that one input may take, on a machine with other work

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([2**31, 2**63, 10**30, 1e308, float("inf"), float("nan"), 0.5, -0.0])
    | st.text(max_size=6)
    | st.sampled_from(
        ["a\x00b", "../../etc/passwd", "\ud800", "\x1b[2J", "1e5", "null", "llama", "{{ x }}", "{% if", "<s>"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def spoilt(good, keys=()):
    """Texts of JSON: `good`, an object, with some of its keys gone or of other values; now and then other bytes."""
    names = st.sampled_from(sorted(set(good) | set(keys)))
    changed = st.dictionaries(names, values, min_size=1, max_size=3)
    less = st.sets(names, max_size=2)
    objects = st.builds(lambda new, gone: {k: v for k, v in {**good, **new}.items() if k not in gone}, changed, less)
    text = json.dumps(good).encode()
    cut = st.builds(
        lambda at, byte: text[:at] + byte + text[at + len(byte) :], st.integers(0, len(text)), st.binary(max_size=3)
    )
    return (
        objects.map(json.dumps).map(str.encode) | cut | values.map(json.dumps).map(str.encode) | st.binary(max_size=40)
    )


def refusal(read):
    """What `read` gives; None where it refuses with a UserError of one line that can be printed. All else fails the test."""
    try:
        return read()
    except UserError as error:
        assert one_line(error).encode("utf-8", "replace") and len(str(error)) < 5000
        return None


def fuzzed(strategy):
    """The test below, over so many inputs, few by default and 10,000 when slow."""

    def of(test):
        def run(few, tmp_path_factory):
            place = tmp_path_factory.mktemp("fuzzed")
            unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
            limits = settings(max_examples=few, deadline=SECONDS * 1000, database=None, suppress_health_check=unhurried)
            limits(given(strategy)(lambda content: test(place, content)))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return pytest.mark.parametrize("few", [100, pytest.param(MANY, marks=pytest.mark.slow)])(run)

    return of


entry = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
entries = values | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64"]) | values,
        "shape": st.lists(st.integers(-1, 4) | scalars, max_size=3) | values,
        "data_offsets": st.lists(st.integers(-8, 64) | scalars, min_size=1, max_size=3) | values,
    }
)
headers = (
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), entries, max_size=3)
    .map(json.dumps)
    .map(str.encode)
)
lengths = st.sampled_from([None, 0, 1, 2**31, 2**63])


@fuzzed(st.tuples(headers | spoilt({"a": entry}), lengths, st.binary(max_size=64)))
def test_a_safetensors_header(place, content):
    header, length, tail = content
    file = place / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + tail)
    for tensor in (refusal(lambda: shards.open_file(file)) or {}).values():  # what is accepted can be read
        assert tensor.offset + tensor.dtype.itemsize * int(np.prod(tensor.shape)) <= file.stat().st_size


index = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
places = st.sampled_from(["model-1.safetensors", "../x.safetensors", "/etc/passwd", "model-2.safetensors", ""]) | values
maps = st.dictionaries(st.sampled_from(["a", "b", "c"]), places, max_size=3).map(lambda found: {"weight_map": found})


@fuzzed(maps.map(json.dumps).map(str.encode) | spoilt(index))
def test_an_index(place, content):
    header = json.dumps({"a": entry, "b": entry}).encode()
    (place / "model-1.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (place / "model.safetensors.index.json").write_bytes(content)
    found = refusal(lambda: shards.open_folder(place)) or {}
    assert all(tensor.file == place / "model-1.safetensors" for tensor in found.values())


FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "openelm"]
good_config = json.loads((TINY / "config.json").read_text())
of_families = (
    "model_type layer_types sliding_window rope_parameters query_pre_attn_scalar attn_logit_softcapping "
    "num_query_heads num_kv_heads num_transformer_layers ffn_multipliers quantization_config"
).split()


@fuzzed(st.one_of(*(spoilt({**good_config, "model_type": family}, of_families) for family in FAMILIES)))
def test_a_config(place, content):
    (place / "config.json").write_bytes(content)
    arch = refusal(lambda: hub.read_arch(place))
    assert arch is None or 0 < len(arch.layers) <= hub.MAX_LAYERS


good_tokenizer = json.loads((TINY / "tokenizer_config.json").read_text())
of_tokenizers = (
    "chat_template added_tokens_decoder extra_special_tokens additional_special_tokens add_bos_token auto_map "
    "tokenizer_class unk_token bos_token eos_token padding_side truncation_side legacy processor_class"
).split()
conversation = rows.Row((rows.Turn("user", "1 + 1?"), rows.Turn("assistant", "2")), "file:1")


@fuzzed(spoilt(good_tokenizer, of_tokenizers))
def test_a_tokenizer_config(place, content):
    if not (place / "tokenizer.json").exists():
        shutil.copyfile(TINY / "tokenizer.json", place / "tokenizer.json")
    (place / "tokenizer_config.json").write_bytes(content)

    def read():
        tokenizer = chat.load_tokenizer(place)
        return chat.encode(conversation, tokenizer, chat.choose_template("auto", tokenizer))

    example = refusal(read)
    assert example is None or example.tokens.dtype == np.int32


fields = [
    "question",
    "answer",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "text",
    "messages",
    "conversations",
]
turns = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value"]), scalars | st.sampled_from(["user", "gpt"]), max_size=4
)
records = st.dictionaries(st.sampled_from(fields), values | st.lists(turns | scalars, max_size=3), max_size=4)
lines = (records | values).map(json.dumps).map(str.encode) | st.binary(max_size=30)


@fuzzed(st.tuples(st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]), st.lists(lines, max_size=4)))
def test_rows(place, content):
    suffix, found = content
    file = place / f"rows{suffix}"
    file.write_bytes(b"\n".join(found) if suffix != ".json" else b"[" + b",".join(found) + b"]")
    splits = refusal(lambda: rows.load(config.Data(files=(str(file),), on_bad_row="skip"), 0))
    for row in splits.train + splits.validation if splits else ():
        assert row.turns[-1].content.strip() and row.origin.startswith(f"{file}:")


good_adapter = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "use_dora": False, "use_rslora": False, "bias": "none", "init_lora_weights": True,
}  # fmt: skip
patterns = st.dictionaries(st.text("ab.*+?()[]{}|\\^$o_proj2", max_size=12), scalars, max_size=3)
with_patterns = st.builds(
    lambda key, found: json.dumps(good_adapter | {key: found}).encode(),
    st.sampled_from(["rank_pattern", "alpha_pattern"]),
    patterns,
)
of_layer = "base_model.model.model.layers.0.self_attn.o_proj"
adapter_names = st.sampled_from(
    [f"{of_layer}.lora_A.weight", f"{of_layer}.lora_B.weight", f"{of_layer}.lora_magnitude_vector", "lora_A", "x.bias"]
)
adapter_tensors = st.dictionaries(adapter_names, st.sampled_from([(2, 128), (128, 2), (128,), ()]), max_size=3)
good_pair = {f"{of_layer}.lora_A.weight": (2, 128), f"{of_layer}.lora_B.weight": (128, 2)}


@fuzzed(st.tuples(spoilt(good_adapter) | with_patterns, st.just(good_pair) | adapter_tensors))
def test_an_adapter_folder(place, content):
    settings, shapes = content
    (place / peft.CONFIG).write_bytes(settings)
    at, header = 0, {}
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (place / peft.WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    arch = hub.read_arch(TINY)
    found = refusal(lambda: peft.open_adapter(place, arch))
    assert found is None or found.adaptation.adapters
