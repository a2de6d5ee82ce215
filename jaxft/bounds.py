"""How much a file of somebody else's may hold, by what it would take in memory once it is read."""

from __future__ import annotations

from pathlib import Path

from jaxft.errors import UserError

SHOWN = b"[{,"  # each begins a value: text of ten megabytes makes lists of hundreds


def values_in(content: bytes) -> int:
    """About how many values JSON text holds, without reading it as JSON; what stands within strings counts too."""
    return sum(content.count(byte.to_bytes()) for byte in SHOWN)


def bounded(file: Path, most_bytes: int, most_values: int) -> bytes:
    """A JSON file's content. Raises UserError where it is more, and OSError."""
    size = file.stat().st_size
    if size > most_bytes:
        raise UserError(f"{file}: {size:,} bytes; expected at most {most_bytes:,}")
    content = file.read_bytes()
    check_values(content, most_values, str(file))
    return content


def check_values(content: bytes, most_values: int, what: str) -> None:
    """Raises UserError where JSON text holds more values."""
    if (found := values_in(content)) > most_values:
        raise UserError(
            f"{what}: some {found:,} values in {len(content):,} bytes of JSON; expected at most {most_values:,}"
        )
