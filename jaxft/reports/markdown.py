"""A report as GitHub-flavoured Markdown: `Quote`s in fences and `Code` in spans longer than any backticks inside, the rest
escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxft.reports.document import (
    Block,
    Bullets,
    Code,
    Columns,
    Details,
    Gallery,
    Heading,
    Inline,
    Part,
    Quote,
    Strong,
    Table,
    Text,
    Verdict,
    one_line,
    parts,
    state_of,
    visible,
)


def markdown(blocks: Sequence[Block]) -> str:
    """The document as GitHub-flavoured Markdown."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_md(block.text)}"
        case Text():
            return _md(block.text)
        case Bullets():
            return "\n".join(f"- {_md(item)}" for item in block.items)
        case Table():
            rule = ["---"] + ["---" if block.wordy(i) else "---:" for i in range(1, len(block.header))]
            rows = [[_md(cell) for cell in row] for row in (block.header, *block.rows)]
            return "\n".join("| " + " | ".join(cells) + " |" for cells in (rows[0], rule, *rows[1:]))
        case Quote():
            return f"{_md(block.label)}\n\n{fenced(block.text)}"
        case Columns():
            return "\n\n".join(map(_markdown, block.quotes))
        case Gallery():
            return "\n\n".join(f"![{_md(image.alt)}]({image.path})" for image in block.images)
        case Verdict():
            told = [_md(claim) for claim in block.claims]
            told += [f"**{_md(flag.name)}: {state_of(flag)}.** {_md(flag.words)}" for flag in block.flags]
            return "\n".join(f"> - {line}" for line in told)
        case Details():
            return f"{_md(block.summary)}\n\n" + "\n\n".join(map(_markdown, block.blocks))


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    text = visible(text)
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}text\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _md(text: Inline) -> str:
    return "".join(map(_md_part, parts(text)))


def _md_part(part: Part) -> str:
    match part:
        case Code():
            text = one_line(part.text).replace("|", "\\|")
            ticks = "`" * (1 + _longest_run(text))
            pad = " " if not text or text[0] == "`" or text[-1] == "`" else ""
            return f"{ticks}{pad}{text}{pad}{ticks}"
        case Strong():
            return f"**{_md_part(part.text)}**"
        case _:
            text = re.sub(r"([\\`*\[\]<>|&#~$])|(?<!\w)(_)|(_)(?!\w)", r"\\\g<0>", visible(part))
            return text.replace("\n", " ")
