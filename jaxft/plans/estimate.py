"""A training step by arithmetic: its FLOPs, and what it reads, sends and holds.

It serves where nothing is compiled (a GPU, a batch that may not be worth a minute of compiling) and for what no compiler tells:
XLA counts the bytes of a loop's body once. Every figure is one chip's in one step unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxft.learn.recompute import kept_per_token
from jaxft.models.arch import Arch, LayerSpec, nest

# How often the residual stream [tokens, D] is read or written in a layer beside the matmuls: two norms and two sums, forward
# and backward; and a [tokens, F] where the gated product is formed as matmuls read it, once forward and twice backward. It is
# the least. XLA's own count, of four unrolled layers, is three times as much; it has in it what stays in a core's own memory.
STREAM, GATED = 12, 5
CHUNK = 512  # tokens whose logits are formed at once; the head is read for each (learn/loss.py)
FORWARD, BACKWARD = 4, 10  # FLOPs of attention per query, key and channel: two matmuls, and five


@dataclass(frozen=True)
class Step:
    """A step of `rows` × `length` tokens over all chips; `data` counts copies of the model over all slices.

    `ranks` are the pairs' by Hub path; where none is given every weight is trained. `width` is bytes of an element, `held`
    those of a linear weight as it is held, with its share of scales, `table_width` of one of the embedding, `param_width` of
    one that is trained; `decoded`: a pass writes such weights out and reads them.
    """

    arch: Arch
    ranks: Mapping[str, int]
    rows: int
    length: int
    policy: str = "dots"
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1
    micro_batches: int = 1
    width: int = 2
    held: float = 2
    table_width: float = 2
    decoded: bool = False
    param_width: int = 4

    @property
    def chips(self) -> int:
        """Over all slices."""
        return self.data * self.fsdp * self.tensor

    @property
    def frozen(self) -> bool:
        """Whether the base's weights get no gradient."""
        return bool(self.ranks)

    @property
    def tokens(self) -> float:
        """Of one chip, where those that share a row each count it."""
        return self.rows * self.length / (self.data * self.fsdp)

    @property
    def trained(self) -> int:
        """Parameters trained, over all chips."""
        if not self.frozen:
            return self.weights + self.table * (1 if self.arch.tied_head else 2)
        shapes = self.arch.linear_shapes()
        return sum(rank * sum(shapes[path]) for path, rank in self.ranks.items())

    @property
    def weights(self) -> int:
        """Of the layers' linear modules, over all chips."""
        return self.arch.flops_per_token(frozen=True) // 4

    @property
    def table(self) -> int:
        """Weights of the embedding, or of the head."""
        return self.arch.dim * self.arch.vocab_size


def flops_per_token(step: Step) -> float:
    """Of one position in matmuls, the head's for every position, attention's left out; what the policy repeats counts again."""
    arch, repeated = step.arch, _repeated(step)
    linear = arch.flops_per_token(frozen=step.frozen) * (1 + repeated / (2 if step.frozen else 3))
    pairs = arch.lora_flops_per_token(step.ranks) * (1 + repeated / 3) if step.frozen else 0
    return linear + pairs + arch.head_flops_per_token(frozen=step.frozen)


def attention_flops_per_token(step: Step) -> float:
    """Of one position in attention's matmuls: causal, at most a window back; packed rows need less, which no kernel skips."""
    each = FORWARD * {"full": 2, "nested": 2 + _regrouped(step)}.get(step.policy, 1) + BACKWARD
    return each * sum(_keys(layer, step.length) * layer.heads * layer.head_dim for layer in step.arch.layers)


def _keys(layer: LayerSpec, length: int) -> float:
    """How many keys a query sees, on average over a row."""
    window = min(layer.window or length, length)
    return window * (1 - window / (2 * length))


def _repeated(step: Step) -> float:
    """Share of the layers' matmuls that the backward pass computes again."""
    if step.policy in ("dots", "none"):
        return 0.0
    gated = sum(layer.ffn * step.arch.dim for layer in step.arch.layers) / step.weights  # one of gate, up and down
    if step.policy == "qkv":
        return 2 * gated
    once = 1.0 if step.arch.names.mlp_output_norm else 1.0 - gated  # nobody needs the output of down but such a norm
    return once + (_regrouped(step) if step.policy == "nested" else 0)


def _regrouped(step: Step) -> int:
    """Whether groups of layers are computed again as well, before their layers are."""
    return int(nest(len(step.arch.layers))[0] > 1)


def hbm_bytes(step: Step) -> float:
    """Read and written in memory, at least: weights a pass, what matmuls take and give, the head a chunk, the optimizer."""
    return _weights_moved(step) + _activations_moved(step) + _head_moved(step) + _optimizer_moved(step)


def _weights_moved(step: Step) -> float:
    """Read once forward, backward and for what is repeated; written when they come from other chips, forward and backward.
    What is decoded apart from its matmul is written and read once more each time."""
    passes = (2 if step.frozen else 3) + _repeated(step)
    moved = (passes + (2 if step.fsdp > 1 else 0)) * step.held + (2 * passes * step.width if step.decoded else 0)
    return step.micro_batches * moved * step.weights / step.tensor


def _activations_moved(step: Step) -> float:
    arch, passes = step.arch, 2 + _repeated(step)
    linear = sum(sum(arch.linear_shape(i, name)) for i in range(len(arch.layers)) for name in arch.linears)
    heads = sum(2 * (layer.heads + layer.kv_heads) * layer.head_dim for layer in arch.layers)
    gated = sum(layer.ffn for layer in arch.layers)
    split = (passes * linear + (1 + passes) * heads + GATED * gated) / step.tensor
    return step.tokens * step.width * (split + STREAM * arch.dim * len(arch.layers))


def _head_moved(step: Step) -> float:
    """Its share of the vocabulary for every chunk of all tokens of a copy, forward and backward; logits in float32."""
    ways, tokens = step.fsdp * step.tensor, step.tokens * step.fsdp
    return tokens / CHUNK * 2 * step.table * step.table_width / ways + tokens * 4 * 4 * step.arch.vocab_size / ways


def _optimizer_moved(step: Step) -> float:
    """Parameters and two float32 moments read and written, gradients written and read; sums of several in float32."""
    gradients = 2 * step.param_width if step.micro_batches == 1 else 2 * 4 * step.micro_batches
    return (2 * step.param_width + 16 + gradients) * step.trained / (step.fsdp * step.tensor)


def ici_bytes(step: Step) -> float:
    """Taken in from chips of the slice: weights forward and backward, activations of shared layers, gradients, the loss."""
    arch, f, t = step.arch, step.fsdp, step.tensor
    copies = step.data // step.slices  # within a slice
    gathered = step.micro_batches * 2 * step.weights * step.held / t * (f - 1) / f
    shared = 2 * (t - 1) / t * 4 * len(arch.layers) * step.tokens * arch.dim * step.width
    # In float32 also where weights are bfloat16: the compiler adds the chips' shares up before it rounds them.
    gradient = 4 * step.trained / t * (f - 1) / f + 2 * 4 * step.trained / (f * t) * (copies - 1) / copies
    loss = (f * t - 1) / (f * t) * step.tokens * f * arch.dim * (step.width + 4)
    looked_up = (f - 1) / f * (step.table * step.width / f + step.tokens * arch.dim * step.width)
    return gathered + shared + gradient + loss + looked_up


def dcn_bytes(step: Step) -> float:
    """Taken in from other slices: gradients of what is trained, which a slice's chips have split among them."""
    return 2 * (step.slices - 1) / step.slices * 4 * step.trained / (step.fsdp * step.tensor)


def memory(step: Step) -> dict[str, float]:
    """Bytes held by one chip, as `plan` names them; activations are what the policy keeps, one layer at work, and the
    gradients of all weights where these are trained."""
    arch, ways = step.arch, step.fsdp * step.tensor
    tables = step.table * (1 if arch.tied_head else 2)
    weights = (step.held * step.weights + step.table_width * tables) / ways
    gradients = 0.0
    if not step.frozen:
        weights = step.param_width * step.trained / ways
        gradients = (step.param_width + (4 if step.micro_batches > 1 else 0)) * step.trained / ways
    pairs = 4 * step.trained / ways if step.frozen else 0.0
    tokens = step.tokens / step.micro_batches
    kept = tokens * step.width * sum(kept_per_token(layer, arch, step.policy, step.tensor) for layer in arch.layers)
    layer = step.weights / len(arch.layers) / step.tensor * step.width
    at_work = tokens * step.width * max(2 * (x.ffn + x.heads * x.head_dim) for x in arch.layers) / step.tensor
    return {
        "weights_bytes_per_chip": weights,
        "lora_bytes_per_chip": pairs,
        "optimizer_bytes_per_chip": 8 * step.trained / ways,
        "batch_bytes_per_chip": 5 * 4 * step.tokens,
        "activations_bytes_per_chip": kept + at_work + (2 * layer if step.fsdp > 1 else 0) + LOGITS + gradients,
    }


LOGITS = 3 * 2**27  # a chunk's, their exponentials and their gradient (learn/loss.py's CHUNK_ELEMENTS in float32)
