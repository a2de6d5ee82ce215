"""What a preview says, in plain words: sections that the terminal and the page both show.

Texts here are raw: names, origins and words of rows may hold anything, and each renderer makes them harmless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxft.previews.checks import Faults
from jaxft.previews.facts import Bar, Packing, Preview, Shown
from jaxft.previews.overlap import WORDS, Shared
from jaxft.reports.wording import share, whole


@dataclass(frozen=True)
class Lines:
    """Paragraphs."""

    items: Sequence[str]


@dataclass(frozen=True)
class Check:
    """One property of all rows, whether it holds, and what was found."""

    ok: bool
    name: str
    said: str


@dataclass(frozen=True)
class Table:
    """Figures under a header; the last column is text where `named`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    named: bool = False


@dataclass(frozen=True)
class Bars:
    """A histogram."""

    bars: Sequence[Bar]


@dataclass(frozen=True)
class Rows:
    """Rows token by token."""

    rows: Sequence[Shown]


Part = Lines | Check | Table | Bars | Rows


@dataclass(frozen=True)
class Section:
    """A title and what stands under it."""

    title: str
    parts: Sequence[Part]


def summary(preview: Preview) -> str:
    """The preview in two sentences."""
    train, packing = preview.counts["train"], preview.packing
    wrong = [check.name for check in checks(preview) if not check.ok]
    verdict = f"To look at: {', '.join(wrong)}." if wrong else "All checks hold."
    return (
        f"{whole(train.kept)} rows to train on with the template {preview.template}: {whole(train.tokens)} tokens, "
        f"{_share(train.trained_tokens, train.tokens)} of them trained, in {_steps(packing.steps)}. {verdict}"
    )


def sections(preview: Preview) -> list[Section]:
    """All that is shown, in the order in which it is read; the rows last, because they are long."""
    found = [
        Section("What training will say", [Lines(preview.notes)]),
        Section("Checks", checks(preview)),
        Section("Counts", [_counts(preview)]),
        Section("Sequences", [Lines(_packing(preview.packing))]),
        Section("Lengths", [Lines([_lengths(preview)]), Bars(preview.bars)]),
        Section("Longest rows", [_longest(preview)]),
    ]
    return [*found, Section("Rows", [Rows(preview.shown)])] if preview.shown else found


def checks(preview: Preview) -> list[Check]:
    """BOS, end of answers, special tokens in the data, and what validation shares with training."""
    found = [_bos(preview), _end(preview), _spoken(preview)]
    if preview.overlap is None:
        return [*found, Check(False, "validation", "no rows are held out, so nothing will tell when to stop")]
    duplicates, grams, rows = preview.overlap.duplicates, preview.overlap.grams, preview.overlap.rows
    said = f"{whole(duplicates.rows)} of {whole(rows)} validation rows are also training rows (case and space aside)"
    found.append(Check(not duplicates.rows, "duplicates", said + _pair(duplicates)))
    said = (
        f"{whole(grams.rows)} of {whole(rows)} validation rows ({_share(grams.rows, rows)}) share {WORDS} words in a row "
        f"with a training row; {whole(preview.overlap.measured)} are long enough to"
    )
    return [*found, Check(not grams.rows, f"{WORDS}-gram overlap", said + _pair(grams))]


def _bos(preview: Preview) -> Check:
    found = preview.beginning
    if found.token is None:
        return Check(True, "BOS", "the tokenizer has none, so no row begins with one")
    wanted = f"exactly one {found.token}" if found.wanted else f"no {found.token}, which the tokenizer does not add"
    said = f"every row begins with {wanted}"
    if found.wrong.rows:
        said = f"{_rows(found.wrong)} not begin with {wanted}"
    if found.again.rows:
        said += f"; {_rows(found.again, 'has', 'have')} another further in"
    return Check(not found.wrong.rows, "BOS", said)


def _end(preview: Preview) -> Check:
    found = preview.ending
    tokens = ", ".join(f"{token} ({whole(count)} answers)" for token, count in found.tokens) or "none found"
    if not found.missing.rows:
        return Check(True, "end of turn", f"every answer ends with a trained end token: {tokens}")
    said = f"{_rows(found.missing)} not end every answer with a trained end token"
    if found.cut:
        which = "all" if found.cut == found.missing.rows else f"{whole(found.cut)} of them"
        said += f"; {which} because they are cut at {whole(preview.max_length)} tokens"
    return Check(False, "end of turn", f"{said}; end tokens: {tokens}")


def _spoken(preview: Preview) -> Check:
    if not preview.spoken.rows:
        return Check(True, "special tokens", "no row's own text spells one")
    said = f"{_rows(preview.spoken, 'spells', 'spell')} one in the text itself, where it is read as that token"
    return Check(False, "special tokens", said)


def _rows(faults: Faults, one: str = "does", several: str = "do") -> str:
    """`1 row (file:3) does`, `12 rows (first: file:3) do`."""
    if faults.rows == 1:
        return f"1 row ({faults.first}) {one}"
    return f"{whole(faults.rows)} rows (first: {faults.first}) {several}"


def _pair(shared: Shared) -> str:
    if not shared.rows:
        return ""
    return f". For example {shared.validation}, and {shared.train} of those trained on: “{shared.text:.200}”"


def _counts(preview: Preview) -> Table:
    of = preview.counts.values()
    limit = whole(preview.max_length)
    rows = [
        ("rows", *(whole(c.kept + c.dropped) for c in of)),
        (f"cut at {limit} tokens", *(_part(c.cut, c.kept + c.dropped) for c in of)),
        ("dropped", *(_part(c.dropped, c.kept + c.dropped) for c in of)),
        ("rows left", *(whole(c.kept) for c in of)),
        ("tokens in them", *(whole(c.tokens) for c in of)),
        ("trained tokens", *(_part(c.trained_tokens, c.tokens) for c in of)),
        ("tokens per row", *(f"{c.tokens / c.kept:,.1f}" for c in of)),
        ("longest, before any cut", *(whole(c.longest) for c in of)),
    ]
    return Table(("", *preview.counts), rows)


def _packing(packing: Packing) -> list[str]:
    lengths = ", ".join(map(whole, packing.lengths))
    how = (
        f"packed into {whole(packing.sequences)} sequences of {lengths} positions"
        if packing.packed
        else f"{whole(packing.sequences)} sequences of one row each, padded to {lengths} positions"
    )
    steps = f"{_steps(packing.steps)} in all"
    if packing.steps < packing.steps_of_epochs:
        steps += (
            f", where optim.max_steps ends them; {packing.epochs:g} epochs would be {whole(packing.steps_of_epochs)}"
        )
    else:
        steps += f", for {packing.epochs:g} epochs"
    return [
        f"Rows are {how}, {share(packing.fill)} full",
        f"{_steps(packing.steps_per_epoch)} of {whole(packing.batch_size)} sequences in the first epoch; {steps}",
    ]


def _steps(count: int) -> str:
    return f"{whole(count)} step{'s' * (count != 1)}"


def _lengths(preview: Preview) -> str:
    return f"Training rows by tokens, before any cut; at most {whole(preview.max_length)} are kept"


def _longest(preview: Preview) -> Table:
    rows = [(whole(row.whole), fate(row.whole, row.tokens), row.part, row.origin) for row in preview.longest]
    return Table(("tokens", "", "", "from"), rows, named=True)


def fate(before: int, tokens: int) -> str:
    """What became of a row of so many tokens."""
    return "dropped" if not tokens else f"cut to {whole(tokens)}" if tokens < before else "whole"


def headline(shown: Shown, number: int, of: int) -> str:
    """The line above a row."""
    row = shown.known
    cut = "" if row.tokens == row.whole else f" of {whole(row.whole)}"
    return (
        f"{number} of {of} ({shown.why}): {whole(row.tokens)}{cut} tokens, {whole(shown.trained)} trained; {row.part}, "
        f"{row.origin}"
    )


def span_of(bar: Bar) -> str:
    """A bar's lengths."""
    return whole(bar.low) if bar.low == bar.high else f"{whole(bar.low)} to {whole(bar.high)}"


def _share(part: int, of: int) -> str:
    return share(part / of if of else 0.0)


def _part(part: int, of: int) -> str:
    return f"{whole(part)} ({_share(part, of)})" if part else "0"
