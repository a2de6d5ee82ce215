"""Whether weights are the bytes that the Hub holds: damage that keeps a file's length is not seen otherwise.

The Hub's cache names the blob of a large file after its SHA-256 (huggingface.co/docs/huggingface_hub, "Understand caching"), so
that no network is needed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from jaxft.errors import UserError

SHA256 = re.compile("[0-9a-f]{64}")


def sha256(file: Path) -> str:
    """Of a file's content, read piece by piece."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(files: Iterable[Path]) -> int:
    """The number of files, all as the Hub names them. Raises UserError for one that differs, or whose digest is not known."""
    count = 0
    for file in sorted(set(files)):
        blob = file.resolve()
        if not SHA256.fullmatch(blob.name):
            raise UserError(
                f"model.verify: {file}: no SHA-256 of it is known here, only of files in the Hub's cache; "
                "give model.name as a Hub id, or leave model.verify out"
            )
        found = sha256(blob)
        if found != blob.name:
            raise UserError(
                f"{file}: its SHA-256 is {found}, the Hub's is {blob.name}: it is damaged; remove {blob} and run the same "
                "command again, which downloads it"
            )
        count += 1
    return count
