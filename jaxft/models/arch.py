"""Architecture as data: what `config.json` says, in one vocabulary for all families. No JAX here."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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
    """One decoder layer: N query heads and K key/value heads of width H, gated FFN of width F.

    `window` is how many keys a query sees at most, its own among them; None is all before it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None


@dataclass(frozen=True)
class Names:
    """Module paths in the Hub's checkpoint; those of a layer follow `layer`, which has a place for its index.

    None is a module that the family lacks. A fused module (`qkv_proj`, `gate_up_proj`) stands for those it fuses.
    """

    embed: str = "model.embed_tokens"
    layer: str = "model.layers.{}"
    norm: str = "model.norm"
    head: str | None = "lm_head"
    input_norm: str = "input_layernorm"
    q_norm: str | None = None
    k_norm: str | None = None
    attention_norm: str | None = None  # of the attention's output, before it is added
    mlp_norm: str = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    q_proj: str = "self_attn.q_proj"
    k_proj: str = "self_attn.k_proj"
    v_proj: str = "self_attn.v_proj"
    qkv_proj: str | None = None
    o_proj: str = "self_attn.o_proj"
    gate_proj: str = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    gate_up_proj: str | None = None
    down_proj: str = "mlp.down_proj"


BIASES = {
    "q_proj": "qkv_bias", "k_proj": "qkv_bias", "v_proj": "qkv_bias", "qkv_proj": "qkv_bias", "o_proj": "out_bias",
    "gate_proj": "mlp_bias", "up_proj": "mlp_bias", "gate_up_proj": "mlp_bias", "down_proj": "mlp_bias",
}  # fmt: skip
NORMS = ("input_norm", "q_norm", "k_norm", "attention_norm", "mlp_norm", "mlp_output_norm")


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
    activation: str = "silu"  # a name in ops.ACTIVATIONS
    norm_plus_one: bool = False  # RMSNorm scales by 1 + w, in fp32
    embed_scale: float | None = None
    query_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_cap: float | None = None
    logit_cap: float | None = None
    init_std: float = 0.02
    eos_ids: tuple[int, ...] = ()
    names: Names = Names()

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear modules of a layer, in the order of computing, under their names in Names."""
        qkv = ("q_proj", "k_proj", "v_proj") if self.names.qkv_proj is None else ("qkv_proj",)
        gate_up = ("gate_proj", "up_proj") if self.names.gate_up_proj is None else ("gate_up_proj",)
        return (*qkv, "o_proj", *gate_up, "down_proj")

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a layer, under their names in Names."""
        return tuple(name for name in NORMS if getattr(self.names, name) is not None)

    def module_path(self, layer: int, name: str) -> str:
        """Hub path of a layer's linear or norm, such as model.layers.0.self_attn.q_proj."""
        return f"{self.names.layer.format(layer)}.{getattr(self.names, name)}"

    def linear_shape(self, layer: int, name: str) -> tuple[int, int]:
        """`(in, out)` of a layer's linear module."""
        spec = self.layers[layer]
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        return {
            "q_proj": (self.dim, q), "k_proj": (self.dim, kv), "v_proj": (self.dim, kv), "qkv_proj": (self.dim, q + 2 * kv),
            "o_proj": (q, self.dim), "gate_proj": (self.dim, spec.ffn), "up_proj": (self.dim, spec.ffn),
            "gate_up_proj": (self.dim, 2 * spec.ffn), "down_proj": (spec.ffn, self.dim),
        }[name]  # fmt: skip

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Hub path -> `(in, out)` of every linear module of every layer, in order; the head is not among them."""
        layers = range(len(self.layers))
        return {self.module_path(i, name): self.linear_shape(i, name) for i in layers for name in self.linears}

    def biased_paths(self) -> frozenset[str]:
        """Hub paths of the linear modules that have a bias."""
        linears = ((i, name) for i in range(len(self.layers)) for name in self.linears)
        return frozenset(self.module_path(i, name) for i, name in linears if getattr(self.layers[i], BIASES[name]))

    def flops_per_token(self, *, frozen: bool) -> int:
        """Training FLOPs of a token in the layers' linear modules: 4 per weight where they are frozen, else 6.

        Two are forward's, two the activations' gradient, two the weights'. Attention's scores, norms, the adapter and what
        is recomputed are left out, as is the head, which sees supervised tokens only. This is the convention of `mfu`.
        """
        return (4 if frozen else 6) * sum(width * out for width, out in self.linear_shapes().values())

    def lora_flops_per_token(self, ranks: Mapping[str, int]) -> int:
        """Training FLOPs of a token in the adapter: 6 per weight, of `a` `[in, rank]` and `b` `[rank, out]`, by Hub path."""
        shapes = self.linear_shapes()
        return 6 * sum(rank * sum(shapes[path]) for path, rank in ranks.items())

    def head_flops_per_token(self, *, frozen: bool) -> int:
        """Training FLOPs of a supervised token in the head `[D, V]`."""
        return (4 if frozen else 6) * self.dim * self.vocab_size

    def module_paths(self) -> list[str]:
        """Hub paths of every module that holds weights, in order."""
        inner = [self.module_path(i, name) for i in range(len(self.layers)) for name in (*self.norms, *self.linears)]
        head = [] if self.names.head is None else [self.names.head]
        return [self.names.embed, *inner, self.names.norm, *head]


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


def nest(units: int) -> tuple[int, int, int]:
    """`(groups, size, rest)`: so many layers as equal groups and `rest` over, so that the fewest layer inputs are held at once:
    one of each group, and those of a group at work.

    One group where that would be no fewer than all (7 and below, but for 6). A rest is another program to compile, and has to
    save two inputs for it.
    """

    def cost(size: int) -> tuple[int, bool, bool, int]:
        rest = units % size
        held = units if size == units else units // size + size + (2 if rest else 0)
        return held, rest > 0, size != units, size

    size = min(range(min(2, units), units + 1), key=cost)
    return units // size, size, units % size


def inputs_held(units: int) -> int:
    """Of `units` layers under that."""
    groups, size, rest = nest(units)
    return units if groups == 1 else groups + (rest > 0) + size


def _same(records: Sequence[Record], a: int, b: int, length: int) -> bool:
    return b + length <= len(records) and list(records[a : a + length]) == list(records[b : b + length])
