"""jaxft: JAX/TPU-first LoRA fine-tuning of Hugging Face checkpoints.

>>> model, tokenizer = jaxft.load("meta-llama/Llama-3.2-1B", dtype="bfloat16")
>>> jaxft.generate(model, tokenizer, ["Once upon a time"], max_new_tokens=20)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__version__ = "0.1.0"


def load(
    name_or_folder: str,
    dtype: str = "float32",
    adapter: str | None = None,
    tokenizer: str | None = None,
    *,
    quantize: str = "none",
    quantize_group: int = 64,
    quantize_double: bool = False,
    quantize_tables: bool = False,
) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a Hub id, local folder or builtin:tiny, with a PEFT adapter folder on top where given.

    `model(tokens, positions=None, segment_ids=None)` gives float32 logits `[B,S,V]`. `dtype` is that of weights and
    activations: float32, bfloat16, or auto for the checkpoint's own. `tokenizer` names another than the model's or the
    adapter's. `quantize` (none, int8, nf4, int4) is how the base's linear layers are held, `quantize_group` the inputs that
    share a scale of int4, `quantize_double` holds nf4's scales in eight bits, `quantize_tables` embedding and head in int8.
    Raises `jaxft.errors.UserError`.
    """
    from jaxft.data.chat import load_tokenizer
    from jaxft.weights.model import load_decoder

    model, folder = load_decoder(
        name_or_folder, dtype, adapter, tokenizer=tokenizer, quantize=quantize, quantize_group=quantize_group,
        quantize_double=quantize_double, quantize_tables=quantize_tables,
    )  # fmt: skip
    return model, load_tokenizer(folder)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What `model` adds to each prompt, up to its end-of-text token; greedy at temperature 0, else sampled from `seed`."""
    from jaxft.evals.decode import Sampling, complete

    sampling = Sampling(temperature=temperature, seed=seed)
    return complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling)
