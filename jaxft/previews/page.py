"""A preview as one HTML page that loads nothing and needs no script."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from jaxft.errors import one_line
from jaxft.previews import content
from jaxft.previews.content import Bars, Check, Lines, Rows, Table
from jaxft.previews.facts import Bar, Preview, Shown
from jaxft.previews.pieces import Span, spans
from jaxft.reports.wording import whole

LIMIT = 8192  # tokens of a row
CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(preview: Preview, boundaries: bool = False) -> str:
    """The whole page. All text that is not ours is escaped, its control and direction-changing characters spelled out."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = [f"<h1>Preview of <code>{_line(preview.title)}</code></h1>"]
    body.append(f'<p class="summary">{_line(content.summary(preview))}</p>')
    for section in content.sections(preview):
        body += [f"<section>\n<h2>{_line(section.title)}</h2>", *_parts(section.parts, boundaries), "</section>"]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CSP}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>Preview of {_line(preview.title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _line(text: object) -> str:
    return html.escape(one_line(text), quote=True)


def _parts(parts: Sequence[content.Part], boundaries: bool) -> Iterator[str]:
    checks = [part for part in parts if isinstance(part, Check)]
    if checks:
        yield '<ul class="checks">' + "".join(map(_check, checks)) + "</ul>"
    for part in parts:
        match part:
            case Lines(items=[only]):
                yield f"<p>{_line(only)}</p>"
            case Lines():
                yield "<ul>" + "".join(f"<li>{_line(item)}</li>" for item in part.items) + "</ul>"
            case Table():
                yield _table(part)
            case Bars():
                yield _bars(part.bars)
            case Rows():
                yield from _rows(part.rows, boundaries)


def _check(check: Check) -> str:
    kind, verdict = ("", "ok") if check.ok else (' class="look"', "look")
    return f'<li{kind}><span class="verdict">{verdict}</span> <strong>{_line(check.name)}</strong>: {_line(check.said)}</li>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_line(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{_line(row[0])}</th>' + "".join(f"<td>{_line(cell)}</td>" for cell in row[1:]) + "</tr>\n"
        for row in table.rows
    )
    kind = "named" if table.named else "figures"
    return f'<div class="scroll"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>'


def _bars(bars: Sequence[Bar]) -> str:
    most = max((bar.rows for bar in bars), default=1) or 1
    rows = "".join(_bar(bar, 1000 * bar.rows / most) for bar in bars)
    return f'<table class="bars"><tbody>\n{rows}</tbody></table>'


def _bar(bar: Bar, length: float) -> str:
    drawn = f'<rect width="{length:.1f}" height="16"/>'
    drawn = f'<svg viewBox="0 0 1000 16" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>'
    kind, note = (' class="beyond"', ", beyond the limit") if bar.beyond else ("", "")
    return (
        f'<tr{kind}><th scope="row">{_line(content.span_of(bar))}</th><td>{drawn}</td>'
        f"<td>{_line(whole(bar.rows))}{note}</td></tr>\n"
    )


def _rows(rows: Sequence[Shown], boundaries: bool) -> Iterator[str]:
    checked = " checked" if boundaries else ""
    yield (
        '<p class="legend"><mark>trained</mark>, not trained, <span class="special">⟨special token⟩</span>, '
        '<span class="hidden">↵</span> line break, <span class="hidden">⇥</span> tab, <span class="hidden">·</span> '
        'space at an edge, <span class="hidden">\\x1b</span> a character by its code</p>'
    )
    yield f'<input type="checkbox" id="boundaries"{checked}> <label for="boundaries">show where each token begins</label>'
    for number, shown in enumerate(rows, 1):
        yield f"<h3>{_line(content.headline(shown, number, len(rows)))}</h3>"
        yield f"<pre>{''.join(_runs(spans(shown.pieces, LIMIT)))}</pre>"


def _runs(shown: Sequence[Span]) -> Iterator[str]:
    """Runs of trained text in `mark`, tokens in `i`."""
    for trained, run in groupby(shown, lambda span: span.trained):
        text = "".join(_tokens(list(run)))
        yield f"<mark>{text}</mark>" if trained else text


def _tokens(run: Sequence[Span]) -> Iterator[str]:
    """Each token's spans in one element; the first span of a run always begins a token or is a gap."""
    opened = False
    for span in run:
        if opened and (span.starts or span.kind == "gap"):
            yield "</i>"
            opened = False
        if span.starts:
            yield "<i>"
            opened = True
        yield _span(span)
    if opened:
        yield "</i>"


def _span(span: Span) -> str:
    text = html.escape(span.text, quote=True)
    kind = {"special": "special", "mark": "hidden", "gap": "gap"}.get(span.kind)
    return f'<span class="{kind}">{text}</span>' if kind else text
