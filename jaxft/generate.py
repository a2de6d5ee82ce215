"""`python -m jaxft.generate --model NAME [--adapter FOLDER] --prompt TEXT`: what a model, with or without an adapter, says."""

from __future__ import annotations

import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jaxft
from jaxft import command_line
from jaxft.config import Model, Run
from jaxft.errors import UserError, run_verb, visible


@dataclass(frozen=True)
class Options:
    """Continue prompts with a base model, or with a base model and an adapter."""

    prompt: tuple[str, ...]
    """One or more texts; - reads one from standard input."""
    model: str | None = None
    """Hub id, local folder, or builtin:tiny; where None, the base that the adapter names."""
    adapter: str | None = None
    """A PEFT adapter folder."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, where neither adapter nor model brings one."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Sample from the k most likely tokens alone."""
    top_p: float | None = None
    """Sample from the most likely tokens that together have this probability."""
    samples: int = 1
    """Answers per prompt."""
    seed: int = 0
    """Of sampling."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these texts."""
    template: Literal["none", "plain", "chat"] = "none"
    """none continues the text as it stands; plain and chat ask it as training with that template does."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Of weights and activations."""
    quantize: Literal["none", "int8", "nf4", "int4"] = "none"
    """How the base's linear layers are held."""
    quantize_group: Literal[32, 64, 128] = 64
    """Inputs that share a scale of int4."""
    quantize_double: bool = False
    """Hold nf4's scales in eight bits too."""
    quantize_tables: bool = False
    """Hold embedding and head in int8 as well."""
    compilation_cache: str | None = Run.compilation_cache
    """Folder where compiled programs are kept for the next start; None keeps none."""


def main(argv: list[str]) -> None:
    """Prints one answer per prompt on stdout; on stderr what the base is held as, and how fast that was."""
    options = command_line.parse(Options, argv, prog="python -m jaxft.generate", description=Options.__doc__ or "")
    prompts = [sys.stdin.read() if p == "-" else p for p in options.prompt]
    from jaxft.evals.decode import Sampling, completions
    from jaxft.parallel.compilation import keep_compiled
    from jaxft.weights.model import held_as

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.samples, options.seed)
    keep_compiled(options.compilation_cache)
    about = ("quantize", "quantize_group", "quantize_double", "quantize_tables")
    held = {name: getattr(options, name) for name in about}
    base = _base(options)
    model, tokenizer = jaxft.load(base, options.dtype, options.adapter, options.tokenizer, **held)
    asked = prompts if options.template == "none" else _rendered(tokenizer, prompts, options.template)
    new = options.max_new_tokens
    began = time.perf_counter()
    found = completions(model, tokenizer, asked, max_new_tokens=new, sampling=sampling, stop=options.stop)
    seconds, tokens = time.perf_counter() - began, sum(count for _, count in found)
    words = held_as(Model(**held), model.dtype)
    print(
        f"{base}, held as {words}: {tokens:,} tokens in {seconds:.2f} s, compiling included, {tokens / seconds:,.0f} tokens/s",
        file=sys.stderr,
    )
    for answer, _ in found:
        answer = answer if options.template == "none" else answer.strip()
        print(visible(answer, but="\n\t") if sys.stdout.isatty() else answer)  # a model's words cannot drive a terminal


def _base(options: Options) -> str:
    if options.model:
        return options.model
    if options.adapter is None:
        raise UserError("--model: missing; give a Hub id, a local folder or builtin:tiny")
    from jaxft.weights.peft import base_name

    return base_name(Path(options.adapter))


def _rendered(tokenizer: Any, prompts: list[str], template: str) -> list[list[int]]:
    """The prompts as token ids, each asked as a user's turn under `template`."""
    from jaxft.data.chat import choose_template, prompt_tokens
    from jaxft.data.rows import Turn

    chosen = choose_template(template, tokenizer)
    return [prompt_tokens((Turn("user", prompt),), tokenizer, chosen) for prompt in prompts]


class _Verb(types.ModuleType):
    """Keeps `jaxft.generate(...)` callable after `import jaxft.generate` has put this module where the function was."""

    __call__ = staticmethod(jaxft.generate)


sys.modules[__name__].__class__ = _Verb

if __name__ == "__main__":
    run_verb(main)
