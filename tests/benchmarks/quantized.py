"""What quantising the base costs: `python -m tests.benchmarks.quantized [--schemes int8 nf4 …] [options of jaxft.train]`.

For the base as stored and for each scheme: bits of a linear weight; the largest difference of a logit on the first held-out
rows, in standard deviations of the logits; the base's perplexity on the held-out rows; and the best validation loss of a whole
training run. Prints Markdown. Where a group does not divide a module's inputs, that module stays as it is, which is said.

`--model FOLDER --text FILE … ` measures logits and perplexity on those texts (blank lines part them) instead; `--text told:64`
on so many that the stored model tells, sampled at temperature 1. With `--no-run` nothing is trained.

`--compile v5e-8` has the TPU's compiler make Gemma 2 9B's step with each base, in turn and `--rounds` times, and prints the
user's CPU seconds of lowering and compiling.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

SCHEMES = {
    "none": [],
    "int8": ["--model.quantize", "int8"],
    "int4, groups of 32": ["--model.quantize", "int4", "--model.quantize_group", "32"],
    "int4, groups of 64": ["--model.quantize", "int4"],
    "nf4": ["--model.quantize", "nf4"],
    "nf4, double": ["--model.quantize", "nf4", "--model.quantize_double", "True"],
}
TOKENS, ROWS = 256, 16  # of a text at most, and texts at once


def fitting(name: str, overrides: list[str], config: str) -> tuple[list[str], str]:
    """The scheme's options and its name, where modules whose inputs its groups do not divide stay as they are."""
    from jaxft import config as configs
    from jaxft.weights import model

    settings = configs.load(config, [*overrides, *SCHEMES[name]]).model
    if settings.quantize != "int4" or settings.quantize_skip:
        return [*overrides, *SCHEMES[name]], name
    shapes = model.find(dataclasses.replace(settings, quantize="none")).arch.linear_shapes()
    odd = sorted({path.rpartition(".")[2] for path, (inputs, _) in shapes.items() if inputs % settings.quantize_group})
    if not odd:
        return [*overrides, *SCHEMES[name]], name
    return [*overrides, *SCHEMES[name], "--model.quantize_skip", *odd], f"{name}, not {', '.join(odd)}"


def losses(overrides: list[str], config: str) -> tuple[float, float]:
    """Validation loss of the base, and the best one of the run."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "jaxft.train", "--config", config, *overrides, "--run.dir", name]
        subprocess.run(command, check=True, stdout=sys.stderr)
        lines = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
    found = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return found[0], min(found)


def held_out(settings):
    """`(tokens, positions, segments)` of the first held-out rows, each `[B,S]`."""
    from jaxft import train

    batch = next(iter(train.prepare(settings).data.validation.evaluation_batches(None)))
    return [(batch.tokens, batch.positions, batch.segments)]


def batches(texts: list[str], tokenizer):
    """The same of texts, each after a BOS and cut to TOKENS; segment 0 fills up."""
    import numpy as np

    rows = [
        [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:TOKENS] for text in texts
    ]
    for first in range(0, len(rows), ROWS):
        tokens, segments = np.zeros((2, ROWS, TOKENS), np.int32)
        for i, row in enumerate(rows[first : first + ROWS]):
            tokens[i, : len(row)], segments[i, : len(row)] = row, 1
        yield tokens, np.broadcast_to(np.arange(TOKENS, dtype=np.int32), tokens.shape), segments


def texts_of(names: list[str], folder: str, tokenizer) -> list[str]:
    """Those of the files, or that the stored model tells."""
    found: list[str] = []
    for name in names:
        if not name.startswith("told:"):
            found += [part.strip() for part in Path(name).read_text("utf-8").split("\n\n") if part.strip()]
            continue
        import jaxft
        from jaxft.evals.decode import Sampling, completions

        model, _ = jaxft.load(folder, "float32")
        sampling = Sampling(temperature=1.0, samples=int(name.removeprefix("told:")), seed=0)
        told = completions(
            model, tokenizer, [[tokenizer.bos_token_id]], max_new_tokens=TOKENS - 1, sampling=sampling, stop=()
        )
        found += [text for text, _ in told]
    return found


def measured(overrides: list[str], config: str, texts: list[str] | None):
    """The base's float32 logits `[N,V]` at the real tokens, mean bits of a linear weight, and the texts' perplexity."""
    import jax
    import numpy as np

    from jaxft import config as configs
    from jaxft.data.chat import load_tokenizer
    from jaxft.parallel.mesh import make_mesh
    from jaxft.plans.row import held_bytes
    from jaxft.weights import model

    settings = configs.load(config, [*overrides, "--model.dtype", "float32"])
    source = model.find(dataclasses.replace(settings.model, adapter=None))
    decoder = model.materialise(source, make_mesh(devices=jax.devices()[:1])).decoder()
    fed = held_out(settings) if texts is None else batches(texts, load_tokenizer(source.folder))
    kept, nll, count = [], 0.0, 0
    for tokens, positions, segments in fed:
        logits = np.asarray(decoder(tokens, positions, segments))
        real = np.asarray(segments) > 0
        kept.append(logits[real])
        if texts is not None:
            likely = logits[:, :-1] - np.asarray(jax.nn.logsumexp(logits[:, :-1], axis=-1))[..., None]
            own = np.take_along_axis(likely, tokens[:, 1:, None], axis=-1)[..., 0]
            nll, count = nll - float(own[real[:, 1:]].sum(dtype=np.float64)), count + int(real[:, 1:].sum())
    return np.concatenate(kept), 8 * held_bytes(source), math.exp(nll / count) if count else None


def compiling(where: str, rows: int, rounds: int, overrides: list[str]) -> None:
    """Prints a row per base: user's CPU seconds in each round, and the mean over that of bfloat16."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxft import config as configs
    from tests.benchmarks.step import traceable

    policy = configs.load("gemma2_9b.py", overrides).model.remat
    names = ["none", "int8", "int4, groups of 64", "nf4"]
    spent: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):  # the compiler's own start, once
        for name in names if turn >= 0 else names[:1]:
            settings = configs.load("gemma2_9b.py", [*overrides, *SCHEMES[name]])
            began = os.times().user
            _, found = traceable(
                settings, where, rows, "dots" if policy == "auto" else policy, 1024 if turn >= 0 else 256
            )
            found.step.lower(*found.inputs).compile()
            if turn >= 0:
                spent[name].append(os.times().user - began)
                print(f"{name}: {spent[name][-1]:.1f}", file=sys.stderr, flush=True)
    print("| base | user's CPU seconds to lower and compile | of bfloat16's |\n|---|---|---|")
    for name, seconds in spent.items():
        ratio = sum(seconds) / sum(spent["none"])
        print(f"| {'bfloat16' if name == 'none' else name} | {', '.join(f'{s:.0f}' for s in seconds)} | {ratio:.2f} |")


def main() -> None:
    """One row per scheme."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--config", default="tiny_cpu.py")
    parser.add_argument("--model", help="a folder or Hub id instead of the config's")
    parser.add_argument("--text", nargs="+", help="files, or told:N")
    parser.add_argument("--no-run", action="store_true", help="train nothing")
    parser.add_argument("--compile", metavar="TOPOLOGY")
    parser.add_argument("--rows", type=int, default=8, help="of 1,024 tokens, with --compile")
    parser.add_argument("--rounds", type=int, default=2)
    arguments, overrides = parser.parse_known_args()
    if arguments.compile:
        compiling(arguments.compile, arguments.rows, arguments.rounds, overrides)
    else:
        qualities(arguments, [*overrides, *(["--model.name", arguments.model] if arguments.model else [])])
    print(
        f"\n{datetime.date.today()}, Python {platform.python_version()}, {platform.processor() or platform.machine()}"
    )


def qualities(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """The table of bits, logits, perplexity and loss."""
    texts = None
    if arguments.text:
        from jaxft.data.chat import load_tokenizer

        texts = texts_of(arguments.text, arguments.model, load_tokenizer(Path(arguments.model)))
    heads = ["base", "bits a weight", "largest logit difference"]
    heads += ["perplexity of the texts", "change"] if texts else []
    heads += [] if arguments.no_run else ["perplexity of held-out rows", "best validation loss", "ratio"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    stored, _, plain = measured(overrides, arguments.config, texts)
    reference = None
    for name in ["none", *(scheme for scheme in arguments.schemes if scheme != "none")]:
        options, said = fitting(name, overrides, arguments.config)
        found, bits, perplexity = measured(options, arguments.config, texts)
        cells = [said, f"{bits:.2f}", f"{abs(found - stored).max() / stored.std():.3f}"]
        if perplexity is not None:
            cells += [f"{perplexity:.3f}", f"{perplexity / plain - 1:+.2%}"]
        if not arguments.no_run:
            base, best = losses(options, arguments.config)
            reference = reference or best
            cells += [f"{math.exp(base):.3f}", f"{best:.4f}", f"{best / reference:.3f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
