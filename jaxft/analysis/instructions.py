"""Categories of instruction data by rules on the text: what kind of task a row is, and whether its answer can be checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHORT = 3
"""Words of an answer up to which it is very short."""
RULES = {
    "creative": r"\b(?:poems?|stor(?:y|ies)|songs?|haikus?|limericks?|sonnets?|lyrics|tales?|jokes?|slogans?|fictional)\b",
    "negative constraint": r"\b(?:without (?:using|the word|mentioning|including)|avoid(?:ing)?|do not|don't|must not)\b",
    "ethics or law": r"\b(?:ethic(?:s|al|ally)|moral(?:s|ity|ly)?|legal(?:ly)?|illegal|unethical|lawful)\b",
    "code": r"\b(?:code|python|javascript|java|sql|html|css|regex|algorithm|c\+\+|(?:function|program|script) that)(?!\w)",
    "arithmetic": r"\d\s*[-+*/×÷^]\s*\d|\b(?:calculate|compute|solve (?:the|this) equation|how many|square root|average of)\b",
    "transformation": r"^(?:rewrite|edit|change|convert|translate|rearrange|rephrase|replace|fix|correct|summari[sz]e)\b",
    "choice": r"^(?:classify|identify|categori[sz]e|choose|select|determine|detect)\b",
    "list": r"\b(?:list|name|brainstorm|come up with|give (?:me )?(?:two|three|four|five|six|seven|eight|nine|ten|\d+))\b",
}
_RULES = {name: re.compile(pattern) for name, pattern in RULES.items()}
_REFUSAL = re.compile(
    r"\bas an ai\b|\bi'm sorry\b|\bi am sorry\b|\bi cannot\b|\bi can't\b|\bi am unable\b|\bi'm unable\b|\blanguage model\b"
)
# The forbidden words, where the instruction quotes them.
_FORBIDDEN = re.compile(
    r"\b(?:without (?:using|the word|mentioning)|avoid(?:ing)?|do not use|don't use)\b[^.\"'“]{0,30}"
    r"[\"'“]([^\"'”]{1,30})[\"'”]",
    re.I,
)
_CHECKED_BY = {"arithmetic": "the number", "code": "running it", "choice": "the label"}


@dataclass(frozen=True)
class Instruction:
    """`verb` is the first word of the instruction; `kinds` are all RULES that fit it, in their order.

    `input_given`: there is an input beside it. `answer_words` counts words. `refusal`: the answer speaks as one that
    declines. `forbidden`: words that the instruction forbids in quotes, and `broken` those of them that the answer has.
    `gradable`: what could check the answer by machine, or None: a poem's quality nothing can.
    """

    verb: str
    kinds: tuple[str, ...]
    input_given: bool
    answer_words: int
    refusal: bool
    forbidden: tuple[str, ...]
    broken: tuple[str, ...]
    gradable: str | None


def instruction(text: str, answer: str, given: str = "") -> Instruction:
    """Reads one row: what is asked, the answer, and the input beside it."""
    lower = text.lower().strip()
    kinds = tuple(name for name, pattern in _RULES.items() if pattern.search(lower))
    verb = re.match(r"[a-z']+", lower)
    forbidden = tuple(m[1].strip().lower() for m in _FORBIDDEN.finditer(text))
    broken = tuple(w for w in forbidden if re.search(rf"(?<!\w){re.escape(w)}(?!\w)", answer.lower()))
    gradable = "the forbidden words" if forbidden else next((_CHECKED_BY[k] for k in kinds if k in _CHECKED_BY), None)
    return Instruction(
        verb=verb[0] if verb else "",
        kinds=kinds,
        input_given=bool(given.strip()),
        answer_words=len(answer.split()),
        refusal=bool(_REFUSAL.search(answer.lower().replace("’", "'"))),
        forbidden=forbidden,
        broken=broken,
        gradable=None if "creative" in kinds else gradable,
    )


def classes(found: Instruction) -> dict[str, str]:
    """Dimension -> class, for `hardness.table` and `outliers.excess`."""
    words = found.answer_words
    length = "very short" if words <= SHORT else "below 50" if words < 50 else "50–199" if words < 200 else "200+"
    return {
        **{name: "yes" if name in found.kinds else "no" for name in RULES},
        "refusal": "yes" if found.refusal else "no",
        "input": "yes" if found.input_given else "no",
        "words of the answer": length,
    }


def verbs(rows: Sequence[Instruction], least: int = 30) -> list[str]:
    """The verb of each row where at least `least` rows share it, else `other`."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.verb] = counts.get(row.verb, 0) + 1
    return [row.verb if counts[row.verb] >= least else "other" for row in rows]


def of_rows(rows: Sequence[Mapping[str, str]]) -> list[Instruction]:
    """Reads rows with Alpaca's fields: `instruction`, `output`, and `input` where there is one."""
    return [instruction(row["instruction"], row["output"], row.get("input") or "") for row in rows]
