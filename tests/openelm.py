"""Apple's OpenELM in plain torch: an oracle to hold jaxft's reading of it against, since transformers has none.

Written afresh from the paper (arXiv 2404.14619) and from what apple/corenet and the files of apple/OpenELM-* on Hugging
Face do; tensors are named, and config.json is filled, as there. There is no cache: generation runs the whole row again.
"""

import json
import types
from numbers import Number

import huggingface_hub
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

COMMON = dict(
    architectures=["OpenELMForCausalLM"], model_type="openelm", activation_fn_name="swish", bos_token_id=1, eos_token_id=2,
    auto_map={"AutoConfig": "configuration_openelm.OpenELMConfig",
              "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM"},
    ffn_dim_divisor=256, ffn_with_glu=True, initializer_range=0.02, max_context_length=2048, num_gqa_groups=4,
    normalization_layer_name="rms_norm", normalize_qk_projections=True, qkv_multipliers=[0.5, 1.0], vocab_size=32000,
    rope_freq_constant=10000, rope_max_length=4096, share_input_output_layers=True, use_cache=True,
)  # fmt: skip
SIZES = COMMON | dict(  # heads 4, 6, 8 for queries and 2, 3, 4 for keys; FFN widths 16, 40, 64
    vocab_size=97, model_dim=32, head_dim=8, num_transformer_layers=3, num_gqa_groups=2, qkv_multipliers=[1.0, 2.0],
    ffn_dim_divisor=8, max_context_length=256, rope_max_length=512,
)  # fmt: skip


def _published(layers, dim, head_dim, kv_heads, multipliers):
    heads = dict(num_kv_heads=kv_heads, num_query_heads=[4 * each for each in kv_heads])
    own = dict(num_transformer_layers=layers, model_dim=dim, head_dim=head_dim, ffn_multipliers=multipliers)
    return COMMON | own | heads


# Each size's config.json, the same for -Instruct, and its number of parameters. The numbers of 270M and 450M are half the
# `total_size` in the index of mlx-community's fp16 copy (543054336 and 914358272 bytes). The other two are counted here:
# 1_1B's file of fp32 is 4.32 GB, and the Hub says 3.04B for 3B, whose three files are 4.98 + 4.90 + 2.26 GB of fp32.
PUBLISHED = {
    "270M": (_published(
        16, 1280, 64, [3] * 5 + [4] * 7 + [5] * 4,
        [0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.0],
    ), 271_527_168),
    "450M": (_published(
        20, 1536, 64, [3] * 3 + [4] * 7 + [5] * 6 + [6] * 4,
        [0.5, 0.68, 0.87, 1.05, 1.24, 1.42, 1.61, 1.79, 1.97, 2.16, 2.34, 2.53, 2.71, 2.89, 3.08, 3.26, 3.45, 3.63, 3.82, 4.0],
    ), 457_179_136),
    "1_1B": (_published(
        28, 2048, 64, [4] * 3 + [5] * 7 + [6] * 8 + [7] * 6 + [8] * 4,
        [0.5, 0.63, 0.76, 0.89, 1.02, 1.15, 1.28, 1.41, 1.54, 1.67, 1.8, 1.93, 2.06, 2.19,
         2.31, 2.44, 2.57, 2.7, 2.83, 2.96, 3.09, 3.22, 3.35, 3.48, 3.61, 3.74, 3.87, 4.0],
    ), 1_079_891_456),
    "3B": (_published(
        36, 3072, 128, [3] * 4 + [4] * 14 + [5] * 12 + [6] * 6, [tenths / 10 for tenths in range(5, 41)],
    ), 3_036_647_424),
}  # fmt: skip


def make_divisible(value, divisor):
    """`value` rounded to a multiple of `divisor`, at least one of them and never below nine tenths of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def spread(multipliers, layers):
    """One multiplier per layer: a number serves all, two are the ends of a line, more are the layers' own."""
    if isinstance(multipliers, Number):
        return [multipliers] * layers
    if len(multipliers) == 2:
        return np.linspace(*multipliers, layers).round(2).tolist()
    assert len(multipliers) == layers, (multipliers, layers)
    return list(multipliers)


def heads(config):
    """The query heads of each layer, as the multipliers make them."""
    unit = config["head_dim"] * config["num_gqa_groups"]
    each = spread(config["qkv_multipliers"], config["num_transformer_layers"])
    return [make_divisible(config["model_dim"] * one, unit) // config["head_dim"] for one in each]


class Config(types.SimpleNamespace):
    """The fields of config.json as attributes, and the method that PEFT asks of a config."""

    def to_dict(self):
        return dict(vars(self))


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


def rotate(x, base):
    """Rotary embedding of [batch, heads, length, head_dim], in fp32: the first half of a head turns with its second."""
    size, length = x.shape[-1], x.shape[-2]
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, device=x.device).float() / size)
    angles = torch.outer(torch.arange(length, device=x.device).float(), frequencies)
    first, second = x.float().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        self.q, self.kv, self.size = config.num_query_heads[i], config.num_kv_heads[i], config.head_dim
        self.base = config.rope_freq_constant
        self.qkv_proj = nn.Linear(config.model_dim, (self.q + 2 * self.kv) * self.size, bias=False)
        self.q_norm = Norm(self.size) if config.normalize_qk_projections else nn.Identity()
        self.k_norm = Norm(self.size) if config.normalize_qk_projections else nn.Identity()
        self.out_proj = nn.Linear(self.q * self.size, config.model_dim, bias=False)

    def forward(self, x, seen):
        split = self.qkv_proj(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        q, k, v = split.split([self.q, self.kv, self.kv], 1)
        q, k = rotate(self.q_norm(q), self.base), rotate(self.k_norm(k), self.base)
        k, v = (each.repeat_interleave(self.q // self.kv, 1) for each in (k, v))
        scores = (q @ k.mT * self.size**-0.5).masked_fill(~seen, -torch.inf)
        mixed = scores.softmax(-1, dtype=torch.float32).type_as(v) @ v
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        multiplier = spread(config.ffn_multipliers, config.num_transformer_layers)[i]
        width = make_divisible(multiplier * config.model_dim, config.ffn_dim_divisor)
        self.act = {"swish": F.silu, "gelu": F.gelu, "relu": F.relu}[config.activation_fn_name]
        self.gated = config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, (1 + self.gated) * width, bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)

    def forward(self, x):
        gate, *up = self.proj_1(x).chunk(1 + self.gated, -1)
        return self.proj_2(self.act(gate) * up[0] if up else self.act(gate))


class Layer(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        self.attn, self.attn_norm = Attention(config, i), Norm(config.model_dim)
        self.ffn, self.ffn_norm = FeedForward(config, i), Norm(config.model_dim)

    def forward(self, x, seen):
        x = x + self.attn(self.attn_norm(x), seen)
        return x + self.ffn(self.ffn_norm(x))


class OpenELM(nn.Module):
    """OpenELMForCausalLM of a config.json given as a dict; the lists of heads are worked out where it has none."""

    is_gradient_checkpointing = False  # else PEFT hooks the embedding

    def __init__(self, config):
        super().__init__()
        config = dict(config)
        queries = config.setdefault("num_query_heads", heads(config))
        config.setdefault("num_kv_heads", [one // config["num_gqa_groups"] for one in queries])
        self.config = config = Config(**config)
        self.transformer = nn.ModuleDict(dict(
            token_embeddings=nn.Embedding(config.vocab_size, config.model_dim),
            layers=nn.ModuleList(Layer(config, i) for i in range(config.num_transformer_layers)),
            norm=Norm(config.model_dim),
        ))  # fmt: skip
        tied = config.share_input_output_layers
        self.lm_head = None if tied else nn.Linear(config.model_dim, config.vocab_size, bias=False)

    def forward(self, input_ids, attention_mask=None, labels=None, **ignored):
        """Logits, and the mean loss of the next token where there are labels; a padded token sees but itself."""
        x = self.transformer.token_embeddings(input_ids)
        seen = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool, device=x.device).tril()
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None] | torch.eye(len(seen), dtype=torch.bool, device=x.device)
        for layer in self.transformer.layers:
            x = layer(x, seen)
        x = self.transformer.norm(x)
        logits = F.linear(x, self.transformer.token_embeddings.weight) if self.lm_head is None else self.lm_head(x)
        out = CausalLMOutput(logits=logits)
        if labels is not None:
            out.loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return out

    def get_input_embeddings(self):
        return self.transformer.token_embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, **inputs):
        return {"input_ids": input_ids, **inputs}


def openelm(seed=0, **changes):
    """A tiny OpenELM whose every tensor is telling, its layers of different widths: of SIZES with `changes`."""
    torch.manual_seed(seed)
    ends = {"ffn_multipliers": spread([0.5, 2.0], {**SIZES, **changes}["num_transformer_layers"])}
    model = OpenELM({**SIZES, **ends, **changes}).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            scale = 0.3 if tensor.ndim == 1 else 1.0 / tensor.shape[1] ** 0.5
            tensor.normal_(1.0 if name.endswith("norm.weight") else 0.0, scale)
    return model


def count(config):
    """The number of parameters of a model of `config`, which is not made."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in OpenELM(config).parameters())


def save(model, folder, max_shard=None):
    """Writes config.json and the weights, in shards of at most `max_shard` bytes where that is given; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.transformer.norm.weight.dtype).removeprefix("torch.")
    config = model.config.to_dict() | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    huggingface_hub.save_torch_state_dict(model.state_dict(), folder, max_shard_size=max_shard or "5GB")
    return folder


def load(folder):
    """The model of a folder, in the dtype that its tensors have."""
    with torch.device("meta"):
        model = OpenELM(json.loads((folder / "config.json").read_text()))
    shards = [safetensors.torch.load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    model.load_state_dict({name: tensor for shard in shards for name, tensor in shard.items()}, assign=True)
    return model.eval()


def greedy(model, ids, new):
    """The `new` likeliest tokens after each row of `ids`, as numpy [batch, new]."""
    ids = torch.from_numpy(np.asarray(ids)).long()
    for _ in range(new):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, -new:].numpy()
