"""A preview as lines for a terminal, in colour where it has colours, else with marks that tell the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from jaxft.errors import one_line
from jaxft.previews import content
from jaxft.previews.content import Bars, Check, Lines, Rows, Table
from jaxft.previews.facts import Bar, Preview, Shown
from jaxft.previews.pieces import Span, spans
from jaxft.reports.wording import whole

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LIMIT = 1024  # tokens of a row; the page shows more
BAR = 36  # characters of the longest bar
GUTTER, BOUNDARY, OPEN, CLOSE = "│ ", "¦", "[[", "]]"
TRAINED, SPECIAL, MARK, GOOD, BAD = "bold green", "reverse", "dim", "green", "bold yellow"


def show(preview: Preview, stream: TextIO, boundaries: bool = False) -> None:
    """Writes the preview to `stream`: wrapped and in colour on a terminal, plain text elsewhere."""
    from rich.console import Console

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    _put(console, _text(("preview of ", ""), (one_line(preview.title), "bold")))
    _put(console, _text((content.summary(preview), "")))
    for section in content.sections(preview):
        console.print()
        _put(console, _text((section.title, "bold")))
        for part in section.parts:
            _part(console, part, boundaries)


def coloured(console: Console) -> bool:
    """Whether styles reach the reader; where not, marks must tell."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def _text(*parts: tuple[str, str]) -> Text:
    from rich.text import Text

    return Text.assemble(*parts)


def _put(console: Console, text: Text, first: str = "", rest: str | None = None) -> None:
    """One paragraph; on a terminal wrapped, with `first` and then `rest` before its lines, elsewhere as it is."""
    rest = first if rest is None else rest
    if console.is_terminal:
        lines = text.wrap(console, max(20, console.width - len(rest)), overflow="fold")
    else:
        lines = text.split(allow_blank=True)
    for i, line in enumerate(lines):
        console.print(_text((rest if i else first, "")).append_text(line), soft_wrap=True)


def _part(console: Console, part: content.Part, boundaries: bool) -> None:
    match part:
        case Lines():
            for item in part.items:
                _put(console, _text((one_line(item), "")), "  ", "    ")
        case Check():
            mark, style = ("ok  ", GOOD) if part.ok else ("LOOK", BAD)
            _put(console, _text((mark, style), (f" {part.name}: {one_line(part.said)}", "")), "  ", "       ")
        case Table():
            _table(console, part)
        case Bars():
            _bars(console, part.bars)
        case Rows():
            _rows(console, part.rows, boundaries)


def _table(console: Console, table: Table) -> None:
    """Columns side by side, figures to the right; a last column of names takes the room that it needs."""
    cells = [[one_line(cell) for cell in row] for row in (table.header, *table.rows)]
    figures = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        if table.named:
            start = "  ".join([row[0].rjust(figures[0]), *(c.ljust(w) for c, w in zip(row[1:-1], figures[1:-1]))])
            _put(console, _text((row[-1], "")), f"  {start}  ", " " * (len(start) + 4))
        else:
            first, *others = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, figures)))
            _put(console, _text(("  ".join([first, *others]), "")), "  ")


def _bars(console: Console, bars: Sequence[Bar]) -> None:
    labels = [content.span_of(bar) for bar in bars]
    width, most = max(map(len, labels), default=0), max((bar.rows for bar in bars), default=0)
    for bar, label in zip(bars, labels):
        drawn = ("▒" if bar.beyond else "█") * round(BAR * bar.rows / most) or ("▏" if bar.rows else "")
        note = "  beyond the limit" if bar.beyond else ""
        _put(console, _text((label.rjust(width), ""), (f"  {drawn}", "cyan"), (f" {whole(bar.rows)}{note}", "")), "  ")


def _rows(console: Console, rows: Sequence[Shown], boundaries: bool) -> None:
    plain = not coloured(console)
    legend = [("trained" if not plain else f"{OPEN}trained{CLOSE}", "" if plain else TRAINED), (", not trained, ", "")]
    legend += [
        ("⟨special token⟩", SPECIAL),
        (", ↵ line break, ⇥ tab, · space at an edge, \\x1b a character by its code", ""),
    ]
    _put(console, _text(*legend, (f", {BOUNDARY} between tokens" if boundaries else "", "")), "  ")
    for number, shown in enumerate(rows, 1):
        console.print()
        _put(console, _text((one_line(content.headline(shown, number, len(rows))), "bold")), "  ", "    ")
        segments = (_marked if plain else _styled)(spans(shown.pieces, LIMIT), boundaries)
        _put(console, _text(*segments), f"  {GUTTER}")


def _styled(shown: Sequence[Span], boundaries: bool) -> Iterator[tuple[str, str]]:
    """Segments of text and style; neighbours in one style are one segment."""
    for style, run in groupby(_each(shown, boundaries), lambda segment: segment[1]):
        yield "".join(text for text, _ in run), style


def _each(shown: Sequence[Span], boundaries: bool) -> Iterator[tuple[str, str]]:
    for i, span in enumerate(shown):
        if boundaries and span.starts and i:
            yield BOUNDARY, MARK
        kind = {"special": SPECIAL, "mark": MARK, "gap": MARK}.get(span.kind, "")
        yield span.text, f"{TRAINED if span.trained else ''} {kind}".strip()


def _marked(shown: Sequence[Span], boundaries: bool) -> Iterator[tuple[str, str]]:
    """Without styles: each run of trained text between OPEN and CLOSE."""
    for trained, run in groupby(shown, lambda span: span.trained):
        text = "".join((BOUNDARY if boundaries and span.starts and i else "") + span.text for i, span in enumerate(run))
        if trained:
            end = "\n" * text.endswith("\n")  # the mark belongs to the line that it ends
            text = f"{OPEN}{text.removesuffix(end) if end else text}{CLOSE}{end}"
        yield text, ""
