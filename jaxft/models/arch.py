"""Architecture as data: what `config.json` says, in one vocabulary for all families. No JAX here."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Record = TypeVar("Record", bound=Hashable)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the rotary wavelengths: long ones by `factor`, short ones not, a ramp between."""

    factor: float
    low_frequency: float
    high_frequency: float
    original_positions: int


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base `theta`; positions divided by `linear`; frequencies rescaled by `llama3` where set."""

    theta: float
    linear: float = 1.0
    llama3: Llama3Scaling | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: N query heads and K key/value heads of width H, gated FFN of width F."""

    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False


@dataclass(frozen=True)
class Names:
    """Module paths in the Hub's checkpoint; those of a layer follow `layer`, which has a place for its index."""

    embed: str = "model.embed_tokens"
    layer: str = "model.layers.{}"
    norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    q_proj: str = "self_attn.q_proj"
    k_proj: str = "self_attn.k_proj"
    v_proj: str = "self_attn.v_proj"
    o_proj: str = "self_attn.o_proj"
    gate_proj: str = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    down_proj: str = "mlp.down_proj"


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Arch:
    """A decoder-only transformer of model width D and vocabulary V."""

    family: str
    vocab_size: int
    dim: int
    layers: tuple[LayerSpec, ...]
    rope: Rope
    norm_eps: float
    tied_head: bool
    max_positions: int
    init_std: float = 0.02
    eos_ids: tuple[int, ...] = ()
    names: Names = Names()

    def module_path(self, layer: int, linear: str) -> str:
        """Hub path of a layer's linear module, such as model.layers.0.self_attn.q_proj."""
        return f"{self.names.layer.format(layer)}.{getattr(self.names, linear)}"

    def linear_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """Hub path -> (in, out) of each linear module of a layer."""
        spec = self.layers[layer]
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        shapes = ((self.dim, q), (self.dim, kv), (self.dim, kv), (q, self.dim))
        shapes += ((self.dim, spec.ffn), (self.dim, spec.ffn), (spec.ffn, self.dim))
        return {self.module_path(layer, name): shape for name, shape in zip(LINEARS, shapes)}

    def linear_paths(self) -> list[str]:
        """Hub paths of every linear module of every layer, in order; the head is not among them."""
        return [self.module_path(i, name) for i in range(len(self.layers)) for name in LINEARS]


def stages(records: Sequence[Record]) -> list[tuple[int, int, int]]:
    """Cuts a list of per-layer records into `(first, period, repeats)` that a scan can run.

    Greedy: at each position the period of at most 4 layers that covers most of what follows. Equal layers give one
    stage of period 1; alternating ones a period of 2 and, for an odd count, one layer over; all different ones a stage each.
    """
    found, first = [], 0
    while first < len(records):
        best = (1, 1)
        for period in range(1, 5):
            repeats = 1
            while _same(records, first, first + repeats * period, period):
                repeats += 1
            if repeats > 1 and repeats * period > best[0] * best[1]:
                best = (period, repeats)
        found.append((first, *best))
        first += best[0] * best[1]
    return found


def _same(records: Sequence[Record], a: int, b: int, length: int) -> bool:
    return b + length <= len(records) and list(records[a : a + length]) == list(records[b : b + length])
