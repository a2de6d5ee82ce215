"""`python -m jaxft.preview --config NAME [--html FILE] [--rows N]`: a run's rows as they will be trained, without weights."""

from __future__ import annotations

import sys
from pathlib import Path

from jaxft import command_line, config, disk
from jaxft.errors import UserError, one_line, run_verb
from jaxft.models.arch import Arch

PROG = "python -m jaxft.preview"
OWN = {
    "html": ("FILE", "writes the same as one page, which loads nothing"),
    "rows": ("N", "rows shown token by token, beside the longest; 0 shows none (3)"),
    "tokens": ("", "marks where each token begins"),
}


def main(argv: list[str]) -> None:
    """Prints the preview, and writes it as a page where one is asked for."""
    name, overrides, own = command_line.split(argv, PROG, OWN)
    rows = _rows(own.get("rows", "3"))
    page = _target(own["html"]) if "html" in own else None
    run(config.load(name, overrides), name, rows, page, boundaries="tokens" in own)


def _rows(value: str) -> int:
    if not value.isdecimal() or not value.isascii():
        raise UserError(f"--rows: expected a whole number of rows, 0 or more, found {value!r}")
    return int(value)


def _target(name: str) -> Path:
    """The page's file. Raises UserError for what is no name of a page: --html must not write over rows."""
    file = Path(name).expanduser()
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html: {name}: expected a file name that ends with .html")
    if file.is_dir():
        raise UserError(f"--html: {name} is a folder; give a file in it")
    return file


def run(settings: config.Config, name: str, rows: int, page: Path | None, boundaries: bool) -> None:
    """Reads rows and tokenizer as training does, and no weight; shows what they come to. Raises UserError."""
    from jaxft.data import chat, dataset
    from jaxft.data import rows as data_rows
    from jaxft.previews import facts, terminal
    from jaxft.previews.page import page as rendered

    splits = data_rows.load(settings.data, settings.run.seed)
    arch, folder = _model(settings.model)
    tokenizer = chat.load_tokenizer(folder)
    data = dataset.build(settings, splits, tokenizer, arch.vocab_size, arch.max_positions)
    preview = facts.gather(f"{name} ({settings.model.name})", settings, splits, data, tokenizer, rows)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # rows hold characters that a narrow encoding has not
    terminal.show(preview, sys.stdout, boundaries)
    if page is not None:
        _write(page, rendered(preview, boundaries).encode())


def _model(model: config.Model) -> tuple[Arch, Path]:
    """The architecture that config.json describes, and the tokenizer's folder; weights stay where they are."""
    from jaxft.weights import hub, keras

    preset = keras.is_preset(model.name)
    folder = (
        keras.open_preset(model.name).folder if preset else hub.local_folder(model.name, model.revision, weights=False)
    )
    arch, named = hub.read_arch(folder), model.tokenizer
    return arch, hub.local_folder(named, key="model.tokenizer", weights=False) if named else folder


def _write(file: Path, page: bytes) -> None:
    disk.write_all({file: page}, f"--html: {file}")
    print(f"\npage: {one_line(file)}")


if __name__ == "__main__":
    run_verb(main)
