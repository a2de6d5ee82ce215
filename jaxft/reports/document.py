"""A report as blocks, which `markdown` and `html` render, each making text from anywhere harmless in its own way."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

JOINERS = "\u200c\u200d"  # format characters that Persian, Indic scripts and emoji need


@dataclass(frozen=True)
class Code:
    """A name or a value, set in fixed width."""

    text: str


@dataclass(frozen=True)
class Strong:
    """Words that carry the paragraph."""

    text: str


Part = str | Code | Strong
Inline = Part | Sequence[Part]


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's."""

    level: int
    text: Inline


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: Inline


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[Inline]


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row. `figures` aligns the others to the right, but for those whose
    numbers are in `words`: they hold text."""

    header: Sequence[Inline]
    rows: Sequence[Sequence[Inline]]
    figures: bool = True
    words: Sequence[int] = ()

    def wordy(self, column: int) -> bool:
        """Whether a column holds text."""
        return not self.figures or column in self.words


@dataclass(frozen=True)
class Quote:
    """Text from data, shown as it is, under a label of ours."""

    label: str
    text: str


@dataclass(frozen=True)
class Columns:
    """Quotes side by side where the page is wide enough."""

    quotes: Sequence[Quote]


@dataclass(frozen=True)
class Image:
    """A PNG for light and one for dark paper; Markdown shows the file at `path`."""

    path: str
    alt: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Gallery:
    """Images side by side where the page is wide enough."""

    images: Sequence[Image]


@dataclass(frozen=True)
class Flag:
    """Something to look out for: `raised` True, False, or None where it was not measured."""

    name: str
    raised: bool | None
    words: Inline


@dataclass(frozen=True)
class Verdict:
    """The claims, a sentence each, and the flags; in HTML a box."""

    claims: Sequence[Inline]
    flags: Sequence[Flag]


@dataclass(frozen=True)
class Details:
    """What few readers need: in HTML closed until they open it."""

    summary: Inline
    blocks: Sequence[Block]


Block = Heading | Text | Bullets | Table | Quote | Columns | Gallery | Verdict | Details


def visible(text: str) -> str:
    """`text` with control, direction-changing and unpaired surrogate characters spelled out (`\\x1b`)."""
    text = text.replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or c in JOINERS or not _hidden(c) else ascii(c)[1:-1] for c in text)


def _hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def parts(text: Inline) -> list[Part]:
    """A paragraph's pieces."""
    return [text] if isinstance(text, (str, Code, Strong)) else list(text)


def one_line(text: str) -> str:
    """Visible text without line breaks."""
    return " ".join(visible(text).split())


def plain(text: Inline) -> str:
    """A paragraph for a terminal, without markup."""
    return visible("".join(part if isinstance(part, str) else part.text for part in parts(text)))


def terminal(verdict: Verdict) -> str:
    """A verdict as lines for a terminal."""
    flags = [f"{flag.name}: {state_of(flag)}. {plain(flag.words)}" for flag in verdict.flags]
    return "\n".join(f"  - {one_line(line)}" for line in (*map(plain, verdict.claims), *flags))


def state_of(flag: Flag) -> str:
    """A flag's state in words."""
    return {True: "raised", False: "not raised", None: "not measured"}[flag.raised]
