"""Adapters are PEFT's: the same logits, gradients and updates from the same pairs, and the same files both ways."""

import json
import math

import jax
import numpy as np
import optax
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from checkpoints import SIZES, llama, load, logits, peft_model, reload, save, tokens, torch_logits, with_random_b

from jaxft import config
from jaxft.config import Lora, Optim
from jaxft.errors import UserError
from jaxft.learn import optim
from jaxft.learn.step import initial_state, make_train_step
from jaxft.parallel.mesh import make_mesh
from jaxft.weights.hub import read_arch
from jaxft.weights.model import find
from jaxft.weights.peft import open_adapter
from jaxft.weights.peft import save as save_adapter

LOGITS = 1e-4  # of the logits' spread, as in test_llama.py
IDS = tokens(4, 24, seed=7)
PREFIX = "base_model.model."
KINDS = {
    "all linear": {"target_modules": "all-linear", "r": 4, "lora_alpha": 16},
    "two modules, rank-stabilised": {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8, "use_rslora": True},
    "ranks and alphas by pattern": {
        "target_modules": ["q_proj", "v_proj", "up_proj"], "r": 4, "lora_alpha": 6,
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, "alpha_pattern": {r".*layers\.0\.self_attn\.q_proj": 20},
    },
    "one layer": {"target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1]},
    "a regular expression": {"target_modules": r".*\.0\..*(k_proj|down_proj)"},
    "fractional alpha": {"target_modules": ["v_proj"], "lora_alpha": 2.5},
    "biases of the adapted modules": {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    "every bias": {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "DoRA": {"target_modules": "all-linear", "use_dora": True, "r": 4},
    "rank-stabilised DoRA with biases": {
        "target_modules": ["o_proj", "k_proj"], "use_dora": True, "use_rslora": True, "bias": "all",
    },
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding, a norm and a linear in full": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "model.norm", "input_layernorm", "k_proj"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(llama(num_hidden_layers=3, attention_bias=True), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def theirs(base, tmp_path_factory):
    """An adapter that PEFT made on every linear layer."""
    folder = tmp_path_factory.mktemp("theirs")
    peft_model(reload(base), r=4, lora_alpha=8, target_modules="all-linear").save_pretrained(folder)
    return folder


def batch(ids, weights):
    """What training takes for next-token prediction of `ids` under `weights`, which belong to the tokens predicted."""
    targets, supervised = np.roll(ids, -1, 1), np.roll(weights, -1, 1).astype(np.float32)
    supervised[:, -1] = 0
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return dict(tokens=ids, targets=targets, weights=supervised, positions=positions, segments=np.ones_like(ids))


def some_weights(ids):
    """Another number of supervised tokens in each row, as answers have."""
    return np.arange(ids.shape[1])[None] >= np.linspace(2, ids.shape[1] - 3, len(ids)).astype(int)[:, None]


def by_hub_name(rows, arrays):
    """PEFT's names and orientation of jaxft's trainable arrays."""
    from jaxft.weights.peft import hub_tensors

    return {name: value for row in rows if row.adapter for name, value in hub_tensors(row, row.names, arrays[row.path])}


def pairs(model, value=lambda p: p):
    """A PEFT model's pairs as numpy under their names in its files."""
    found = {
        n.removeprefix(PREFIX).replace(".default", ""): value(p) for n, p in model.named_parameters() if "lora_" in n
    }
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def torch_loss(model, ids, weights):
    labels = torch.from_numpy(np.where(weights, ids, -100)).long()
    return model(torch.from_numpy(ids).long(), labels=labels).loss


def first_step(loaded, optimizer, ids, weights, clip=None):
    """The state after one step, and that step's metrics."""
    mesh = make_mesh(devices=jax.devices()[:1])
    step = make_train_step(loaded, optimizer, mesh)
    return step(initial_state(loaded, optimizer, mesh), loaded.frozen, batch(ids, weights), jax.random.key(0))


def test_loss_and_gradients_of_every_pair_equal_pefts(base, theirs):
    loaded, oracle = (
        load(base, adapter=str(theirs)),
        peft.PeftModel.from_pretrained(reload(base), theirs, is_trainable=True),
    )
    weights = some_weights(IDS)
    loss = torch_loss(oracle, IDS, weights)
    loss.backward()
    wanted = pairs(oracle, lambda p: p.grad)
    state, metrics = first_step(loaded, optax.trace(decay=0.0), IDS, weights)  # its state is the gradient
    found = by_hub_name(loaded.rows, state.optimizer.trace)
    assert abs(float(metrics["nll"] / metrics["weight"]) - loss.item()) <= 5e-5
    assert float(metrics["weight"]) == weights[:, 1:].sum()
    assert found.keys() == wanted.keys() and len(found) == 3 * 7 * 2
    for name, gradient in wanted.items():
        assert gradient.std() > 0
        assert np.abs(found[name] - gradient).max() <= 1e-4 * np.abs(gradient).max(), name
    norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1e9).item()
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        Optim(learning_rate=1e-3, schedule="constant", weight_decay=0.01, clip=None, epsilon=1e-5),
        Optim(
            learning_rate=1e-3,
            schedule="linear",
            warmup=3,
            weight_decay=0.01,
            clip=0.5,
            beta1=0.8,
            beta2=0.95,
            epsilon=1e-5,
        ),
    ],
    ids=["constant", "linear, warm-up and clipping"],
)
def test_ten_steps_of_adamw_equal_torchs(base, theirs, settings):
    steps, data = 10, [tokens(4, 24, seed=i) for i in range(10)]
    loaded, oracle = (
        load(base, adapter=str(theirs)),
        peft.PeftModel.from_pretrained(reload(base), theirs, is_trainable=True),
    )
    start = pairs(oracle, lambda p: p.clone())
    wanted, torch_losses = _torch_steps(oracle.eval(), settings, data)
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = optim.optimizer(settings, steps, loaded.rows)
    step, state = make_train_step(loaded, optimizer, mesh), initial_state(loaded, optimizer, mesh)
    losses = []
    for ids in data:
        state, metrics = step(state, loaded.frozen, batch(ids, some_weights(ids)), jax.random.key(0))
        losses.append(float(metrics["nll"] / metrics["weight"]))
    assert losses == pytest.approx(torch_losses, abs=5e-5)
    found = by_hub_name(loaded.rows, state.trainable)
    # Adam divides each gradient by its own size, so rounding (1e-6 of the largest gradient) weighs most where a gradient
    # is small: a hundredth of the way that an element goes at most, a thousandth in the mean. Its epsilon is large here,
    # because with the usual one an element whose gradient is all rounding still moves by a whole learning rate.
    moved = max(np.abs(wanted[name] - start[name]).max() for name in wanted)
    for name in wanted:
        error = np.abs(found[name] - wanted[name])
        assert error.max() <= 1e-2 * moved and error.mean() <= 1e-3 * moved, name
    assert moved > 2 * settings.learning_rate


def _torch_steps(model, settings, data):
    """The pairs and losses of a plain PyTorch loop."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = settings.beta1, settings.beta2
    adamw = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=betas, eps=settings.epsilon, weight_decay=settings.weight_decay
    )
    name = {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule)
    warmup = optim.warmup_steps(settings.warmup, len(data))
    schedule = transformers.get_scheduler(name, adamw, num_warmup_steps=warmup, num_training_steps=len(data))
    losses = []
    for ids in data:
        adamw.zero_grad()
        loss = torch_loss(model, ids, some_weights(ids))
        loss.backward()
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        adamw.step()
        schedule.step()
        losses.append(loss.item())
    return pairs(model), losses


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 20), (5, 20), (0.12, 50), (0.5, 3)])
def test_learning_rates_equal_transformers(schedule, warmup, steps):
    settings = Optim(learning_rate=0.5, schedule=schedule, warmup=warmup)
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name, first = (
        {"constant": "constant_with_warmup"}.get(schedule, schedule),
        math.ceil(warmup * (steps if warmup < 1 else 1)),
    )
    scheduler = transformers.get_scheduler(name, adamw, num_warmup_steps=first, num_training_steps=steps)
    wanted = []
    for _ in range(steps):
        wanted.append(scheduler.get_last_lr()[0])
        adamw.step()
        scheduler.step()
    rates = optim.schedule(settings, steps)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes an int count with floats, as in the step
        assert [float(rates(step)) for step in range(steps)] == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def assert_same_logits(ours, torch_model):
    wanted = torch_logits(torch_model, IDS)
    assert np.abs(logits(ours, IDS) - wanted).max() <= LOGITS * wanted.std()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_an_adapter_made_by_peft_gives_the_same_logits(kind, base, tmp_path):
    oracle = peft_model(reload(base), **kind)
    oracle.save_pretrained(tmp_path)
    ours = load(base, adapter=str(tmp_path))
    assert_same_logits(ours, oracle)
    plain = torch_logits(reload(base), IDS)
    assert np.abs(logits(ours, IDS) - plain).max() > 100 * LOGITS * plain.std()  # it does something


LORAS = {
    "all linear": Lora(rank=4, alpha=12.0),
    "names, rank-stabilised": Lora(rank=3, alpha=2.5, rslora=True, targets=("q_proj", "up_proj")),
    "some layers": Lora(rank=2, targets=r"model\.layers\.[02]\.(self_attn\.v_proj|mlp\.down_proj)"),
}


def export(folder, base, loaded, lora):
    """Writes `loaded`'s adapter and returns the folder."""
    source = find(config.Model(name=str(base)), lora)
    save_adapter(folder, loaded.rows, loaded.trainable, source.plan, source.arch, str(base))
    return folder


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
def test_an_exported_adapter_gives_the_same_logits_in_peft(lora, base, tmp_path):
    ours = with_random_b(load(base, lora))
    export(tmp_path, base, ours, lora)
    oracle = peft.PeftModel.from_pretrained(reload(base), tmp_path)
    assert_same_logits(ours, oracle)
    stored = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert {PREFIX + name for name in pairs(oracle)} == set(stored)
    assert {value.dtype for value in stored.values()} == {np.dtype(np.float32)}


def test_an_exported_config_spells_out_what_peft_knows_and_nothing_else(base, tmp_path):
    export(tmp_path, base, load(base, Lora()), Lora())
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() <= peft.LoraConfig.__dataclass_fields__.keys()
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert (read.r, read.lora_alpha, read.lora_dropout, read.bias, read.use_rslora) == (8, 16, 0.1, "none", False)
    assert (read.task_type, read.base_model_name_or_path, read.inference_mode) == ("CAUSAL_LM", str(base), True)
    assert sorted(read.target_modules) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_export_import_export_is_bitwise(kind, base, tmp_path):
    first, second, third = (tmp_path / name for name in ("peft", "once", "twice"))
    peft_model(reload(base), **kind).save_pretrained(first)
    for source, target in ((first, second), (second, third)):
        loaded = load(base, adapter=str(source))
        adapter = open_adapter(source, read_arch(base))
        save_adapter(target, loaded.rows, loaded.trainable, adapter.plan(None), read_arch(base), str(base))
    one, two = (safetensors.numpy.load_file(f / "adapter_model.safetensors") for f in (first, second))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (second / name).read_bytes() == (third / name).read_bytes()
    made, copied = (torch_logits(peft.PeftModel.from_pretrained(reload(base), f), IDS) for f in (first, third))
    assert np.array_equal(made, copied)


def test_a_bfloat16_adapter_is_read_into_float32(base, theirs, tmp_path):
    stored = safetensors.torch.load_file(theirs / "adapter_model.safetensors")
    halved = {name: value.bfloat16() for name, value in stored.items()}
    copy(theirs, tmp_path)
    safetensors.torch.save_file(halved, tmp_path / "adapter_model.safetensors")
    loaded = load(base, adapter=str(tmp_path))
    for name, value in by_hub_name(loaded.rows, loaded.trainable).items():
        assert value.dtype == np.float32 and np.array_equal(value, halved[PREFIX + name].float().numpy())


def test_training_goes_on_with_the_adapters_own_rank_and_the_configs_dropout(base, theirs):
    plan = find(config.Model(name=str(base), adapter=str(theirs)), Lora(rank=64, alpha=1.0, dropout=0.3)).plan
    assert {(a.rank, a.alpha, a.dropout) for a in plan.adapters.values()} == {(4, 8.0, 0.3)}


def copy(source, target, tensors=None, **changes):
    """An adapter folder with other config values, or with other tensors."""
    written = json.loads((source / "adapter_config.json").read_text()) | changes
    (target / "adapter_config.json").write_text(json.dumps(written))
    stored = safetensors.numpy.load_file(source / "adapter_model.safetensors")
    safetensors.numpy.save_file(stored if tensors is None else tensors(stored), target / "adapter_model.safetensors")
    return target


def refused(folder, base):
    """The one line with which an adapter is refused."""
    with pytest.raises(UserError) as error:
        open_adapter(folder, read_arch(base))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 16}, {"num_hidden_layers": 2}, {"intermediate_size": 40}, {"num_key_value_heads": 1}],
    ids=str,
)
def test_an_adapter_for_another_model_is_refused(changes, theirs, tmp_path):
    other = save(llama(**{**SIZES, "num_hidden_layers": 3, **changes}), tmp_path)
    assert "model.layers." in refused(theirs, other)


def test_an_adapter_for_another_family_is_refused(base, theirs, tmp_path):
    def renamed(stored):
        return {name.replace("model.layers", "transformer.h"): value for name, value in stored.items()}

    assert "transformer.h.0" in refused(copy(theirs, tmp_path, renamed), base)


@pytest.mark.parametrize(
    ("kind", "settings", "shown"),
    [
        (peft.LoraConfig, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        (peft.LoraConfig, {"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        (peft.LoraConfig, {"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        (peft.IA3Config, {"feedforward_modules": []}, "peft_type 'IA3'"),
        (peft.LoHaConfig, {}, "peft_type 'LOHA'"),
    ],
)
def test_a_kind_of_adapter_that_means_something_else_is_refused(kind, settings, shown, base, tmp_path):
    settings = kind(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **settings})
    peft.get_peft_model(reload(base), settings).save_pretrained(tmp_path)
    assert shown in refused(tmp_path, base)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"r": "4"}, "r: expected a positive number, found '4'"),
        ({"r": 5}, "model.layers.0.self_attn.q_proj: expected A (5, 32)"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"(q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
        ({"peft_type": None}, "peft_type None"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
    ids=str,
)
def test_a_damaged_adapter_config_is_refused(changes, shown, base, theirs, tmp_path):
    assert shown in refused(copy(theirs, tmp_path, **changes), base)


def test_damaged_adapter_files_are_refused(base, theirs, tmp_path):
    lone = "model.layers.1.mlp.up_proj"
    copy(theirs, tmp_path, lambda stored: {n: v for n, v in stored.items() if lone + ".lora_B" not in n})
    assert lone in refused(tmp_path, base)
    copy(theirs, tmp_path, lambda stored: {})
    assert "no place" in refused(tmp_path, base) or "empty" in refused(tmp_path, base)
    copy(theirs, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refused(tmp_path, base)
    file.unlink()
    assert "missing" in refused(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "not JSON" in refused(tmp_path, base)
    assert "no folder" in refused(tmp_path / "nowhere", base)
