"""Tiny random checkpoints in Hugging Face's format, made with transformers, and their outputs under torch."""

import json
import zlib

import jax
import numpy as np
import torch
import transformers

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def llama(seed=0, **changes):
    """A LlamaForCausalLM whose every tensor is telling: weights that spread the logits, norms away from 1, biases from 0."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**SIZES, "attn_implementation": "eager", **changes})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            scale = 0.3 if tensor.ndim == 1 else 1.0 / tensor.shape[1] ** 0.5
            tensor.normal_(1.0 if name.endswith("norm.weight") else 0.0, scale)
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


def peft_model(model, seed=0, *, random_b=True, **settings):
    """`model` with a PEFT LoRA adapter whose B is random too, unless told otherwise, so that it does something."""
    import peft

    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if random_b and "lora_B" in name:
                tensor.normal_(0.0, 0.1)
    return adapted.eval()


def load(folder, lora="base", *, mesh=None, seed=0, remat="none", **model):
    """jaxft's own reading of a folder, in fp32 on one device unless told otherwise."""
    from jaxft import config
    from jaxft.parallel.mesh import make_mesh
    from jaxft.weights.model import find, materialise

    source = find(config.Model(name=str(folder), **{"dtype": "float32", **model}), lora)
    return materialise(source, mesh or make_mesh(devices=jax.devices()[:1]), seed, remat)


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
