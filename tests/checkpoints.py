"""Tiny random checkpoints in Hugging Face's format, made with transformers, and their outputs under torch."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

LOGITS, LOSS = 1e-4, 5e-5  # of the logits' standard deviation; nats
SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


# What sets a family apart, away from every value at which a mistake would not show.
LOCAL, GLOBAL = "sliding_attention", "full_attention"
TELLING = {
    "llama": {},
    "mistral": {"sliding_window": 8, "head_dim": 12},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "qwen3": {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "gemma": {"head_dim": 12, "num_key_value_heads": 1, "num_hidden_layers": 5},
    "gemma2": {
        "num_hidden_layers": 3, "head_dim": 12, "query_pre_attn_scalar": 5, "sliding_window": 8,
        "attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0,
    },
}  # fmt: skip


def llama(seed=0, **changes):
    """A LlamaForCausalLM whose every tensor is telling."""
    return tiny("llama", seed, **changes)


def tiny(family, seed=0, **changes):
    """A model of `family` whose every tensor is telling: weights that spread the logits, norms and biases away from neutral."""
    torch.manual_seed(seed)
    config = {**SIZES, "attn_implementation": "eager", **TELLING[family], **changes}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **config)).eval()
    neutral = 0.0 if family.startswith("gemma") else 1.0  # Gemma's norms multiply by 1 + w
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            scale = 0.3 if tensor.ndim == 1 else 1.0 / tensor.shape[1] ** 0.5
            if family == "gemma" and name.endswith("down_proj.weight"):
                scale *= 4  # else the two forms of GELU hardly differ in the logits
            tensor.normal_(neutral if name.endswith("norm.weight") else 0.0, scale)
    return model


def save(model, folder, **options):
    """Writes `model` as transformers does and returns the folder."""
    model.save_pretrained(folder, **options)
    return folder


def reload(folder, dtype=torch.float32):
    """The folder's model as transformers reads it, its rotary frequencies in fp32 whatever `dtype`."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def edit_config(folder, *removed, **changes):
    """Drops and sets fields of a folder's config.json."""
    file = folder / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in removed} | changes
    file.write_text(json.dumps(config))
    return folder


def tokens(batch, length, seed=0, vocab=97):
    """Random int32 token ids."""
    return np.random.default_rng(seed).integers(3, vocab, (batch, length), dtype=np.int32)


def torch_logits(model, ids, **inputs):
    """Float32 logits of a torch model as numpy."""
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(ids)).long(), **inputs).logits.float().numpy()


def torch_loss(model, ids):
    """Mean next-token loss over all of `ids`."""
    ids = torch.from_numpy(np.asarray(ids)).long()
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def outputs(folder, ids, **arrays):
    """jaxft's jitted logits of a folder, and the mean next-token loss as training forms it."""
    from jaxft.learn.loss import tally
    from jaxft.weights.model import load_decoder

    model, _ = load_decoder(str(folder))
    inputs = {
        "positions": jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
        "segments": jnp.ones_like(ids),
    } | arrays
    targets, weights = np.roll(ids, -1, 1), np.ones(ids.shape, np.float32)
    weights[:, -1] = 0

    @jax.jit
    def both(ids):
        h, _ = model.hidden(ids, **inputs)
        return model.logits(h), tally(model, h, jnp.asarray(targets), jnp.asarray(weights))

    logits, sums = both(ids)
    return np.asarray(logits), float(sums.nll / sums.weight)


def assert_same(got, want, tolerance=LOGITS):
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * want.std()


def assert_equals_torch(folder, torch_model, ids):
    logits, loss = outputs(folder, ids)
    assert_same(logits, torch_logits(torch_model, ids))
    assert abs(loss - torch_loss(torch_model, ids)) <= LOSS


def peft_model(model, seed=0, *, random_b=True, **settings):
    """`model` with a PEFT LoRA adapter, all that it trains drawn at random unless told otherwise, so that it does something."""
    import peft

    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if random_b and "lora_B" in name:
                tensor.normal_(0.0, 0.1)
            elif random_b and tensor.requires_grad and "lora_A" not in name:
                tensor.mul_(torch.empty_like(tensor).uniform_(0.7, 1.3))
    return adapted.eval()


def load(folder, lora="base", *, mesh=None, seed=0, remat="none", **model):
    """jaxft's own reading of a folder, in fp32 on one device unless told otherwise."""
    from jaxft import config
    from jaxft.parallel.mesh import make_mesh
    from jaxft.weights.model import find, materialise, outline

    source = find(config.Model(name=str(folder), **{"dtype": "float32", **model}), lora)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return materialise(source, mesh, outline(source, mesh, remat), seed=seed)


def logits(loaded, ids):
    """The float32 logits of what `load` gave, as numpy; jitted, which compiles faster than it runs op by op."""
    return np.asarray(jax.jit(lambda model, ids: model(ids))(loaded.decoder(), ids))


def with_random_b(loaded):
    """`loaded` with the B of its adapter drawn at random, so that it does something."""
    for path, value in loaded.trainable.items():
        if path.endswith(".b"):
            drawn = np.random.default_rng(zlib.crc32(path.encode())).normal(0, 0.1, value.shape)
            loaded.trainable[path] = jax.device_put(drawn.astype(np.float32), value.sharding)
    return loaded
