"""`python -m jaxft.export --adapter FOLDER --out FOLDER [--merge]`: an adapter in PEFT's format, or base and adapter as one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxft import command_line, config, disk
from jaxft.errors import UserError, run_verb

if TYPE_CHECKING:
    from jaxft.weights.model import Source


@dataclass(frozen=True)
class Options:
    """Write an adapter anew in PEFT's format, or merge it into its base as a checkpoint that transformers loads."""

    adapter: str
    """A PEFT adapter folder, or a run folder."""
    out: str
    """Folder to write; it must not exist, or be empty."""
    merge: bool = False
    """Write a whole checkpoint: base weights with the adapter worked in."""
    model: str | None = None
    """Hub id, local folder, or builtin:tiny; where None, the base that the adapter names."""
    revision: str | None = None
    """Branch, tag or commit of the base on the Hub."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, where neither adapter nor model brings one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the merged weights; auto keeps each as the base stores it."""


def main(argv: list[str]) -> None:
    """Writes the folder and says what it holds."""
    about = Options.__doc__ or ""
    options = command_line.parse(Options, argv, prog="python -m jaxft.export", description=about, flags=True)
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; give a new folder")
    from jaxft.weights.model import find
    from jaxft.weights.peft import base_name

    adapter = _adapter_folder(Path(options.adapter))
    name = options.model or base_name(adapter)
    source = find(config.Model(name, revision=options.revision, tokenizer=options.tokenizer, adapter=str(adapter)))
    (_merge if options.merge else _write_adapter)(options, out, name, source)


def _adapter_folder(folder: Path) -> Path:
    """`folder`, or the adapter of the run in it."""
    return (
        folder / "adapter"
        if not (folder / "adapter_config.json").is_file() and (folder / "adapter").is_dir()
        else folder
    )


def _held_in_training(adapter: Path) -> str:
    """How the run beside an adapter held its base; none where there is no such run."""
    try:
        return str(json.loads((adapter.parent / "config.json").read_text("utf-8"))["model"]["quantize"])
    except (OSError, ValueError, KeyError, TypeError):
        return "none"


def _tokenizer_folder(options: Options, source: Source) -> Path:
    return source.tokenizer if options.tokenizer else source.tokenizer_beside_adapter


def _merge(options: Options, out: Path, name: str, source: Source) -> None:
    import numpy as np

    from jaxft.weights import merged

    dtype: Any = None if options.dtype == "auto" else _numpy_dtype(options.dtype)
    tensors = merged.merged(source.files, source.adapter, source.arch, dtype)
    settings = merged.config_for(source.folder, name, source.arch, source.plan, dtype)
    with disk.new_folder(out, sum(t.nbytes for t in tensors)) as folder:
        merged.save(folder, tensors, settings, source.folder, _tokenizer_folder(options, source))
    dtypes = ", ".join(sorted({np.dtype(t.dtype).name for t in tensors}))
    print(f"merged: {out} ({len(tensors)} tensors, {sum(t.nbytes for t in tensors) / 1e9:.3g} GB, {dtypes})")
    held = _held_in_training(_adapter_folder(Path(options.adapter)))
    if held != "none":
        print(
            f"merged into the base's own weights; in training they were held as {held}, which the adapter made up for"
        )


def _numpy_dtype(name: str) -> Any:
    import jax.numpy as jnp

    return jnp.dtype(name)


def _write_adapter(options: Options, out: Path, name: str, source: Source) -> None:
    from jaxft.weights import merged, peft

    with disk.new_folder(out) as folder:
        peft.rewrite(folder, source.adapter, source.arch, name, source.commit or options.revision)
        merged.copy_files(_tokenizer_folder(options, source), folder)
    print(f"adapter: {out} ({peft.vllm_verdict(source.plan, source.arch)})")


if __name__ == "__main__":
    run_verb(main)
