"""Numbers and equations in a solution's text, read exactly, with what is false among them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

ANNOTATION = re.compile(r"<<([^<>]*)>>")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?!\d)"
NUMBER = re.compile(_NUMBER)
_PIECE = 4000
# On one line, before an equals sign: numbers and operators. After it: a number, which may begin the next side, and some text.
# Looked for from the equals sign on, and without giving white space back: what repeats itself for long takes no longer.
_SIDE = re.compile(r"[\d\s()$.,%+\-*/x×÷·−–]+", re.ASCII)
_CLAIM = re.compile(rf"\s*+(-?\s*+\$?\s*+-?{_NUMBER})(.{{0,8}})", re.ASCII)
_TOKEN = re.compile(rf"\s*({_NUMBER}|[-+*/()%])")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "$": " "})
_TIMES = re.compile(r"(?<=[\d)%])(\s*)x(?=\s*[\d($.])")  # 3 x 4, but not 3x + 4
_RESULT = re.compile(rf"^[\s$-]*{_NUMBER}(?=[.,]?\s)")
# What shows, after the number, that it was not the whole side.
_GOES_ON = re.compile(r"\s*[-+*/x×÷^−–·]\s*[\w($.]|\s?(?:%|/|[A-Za-z]\b|:\d|\d{3}\b|cents?\b)")
_AMBIGUOUS = re.compile(r"/\s*\d+\s*/\s*\d")  # 2000 / 2/3 is meant as 2000 / (2/3) or not


def value(text: str) -> Fraction:
    """A number as NUMBER matches it, exactly and of any length: a model that repeats itself writes thousands of digits."""
    whole, _, part = text.replace(",", "").partition(".")
    if not (whole + part).isdecimal():
        raise ValueError(f"no number: {text[:40]!r}")
    return Fraction(_whole(whole + part), 10 ** len(part))


def _whole(digits: str) -> int:
    """Piece by piece, because Python reads no more than 4,300 digits at once."""
    found = 0
    for at in range(0, len(digits), _PIECE):
        piece = digits[at : at + _PIECE]
        found = found * 10 ** len(piece) + int(piece)
    return found


@dataclass(frozen=True)
class Equation:
    """`text` as written, the value of its left side, and what it claims, with how many decimals."""

    text: str
    computed: Fraction
    claimed: Fraction
    decimals: int

    @property
    def true(self) -> bool:
        """Whether the claim is the value, or the value rounded or cut to as many decimals as the claim shows.

        391 is not 390, but 10 / 3 is 3.33 and 7 / 2 is 3 or 4: only what cannot be written so short may be off.
        """
        step = Fraction(1, 10**self.decimals)
        exact = self.computed % step == 0
        return self.claimed == self.computed or (not exact and abs(self.claimed - self.computed) < step)


def equations(text: str) -> list[Equation]:
    """Equations of numbers alone in calculator annotations and in the text around them; what cannot be read is left out."""
    inside = [found for match in ANNOTATION.findall(text) if (found := _annotation(match))]
    return inside + list(_plain(ANNOTATION.sub("", text)))


def _annotation(text: str) -> Equation | None:
    left, _, right = text.rpartition("=")
    shown = re.fullmatch(rf"\s*-?\$?({_NUMBER})%?\s*", right)
    computed = evaluate(left) if shown else None
    if shown is None or computed is None:
        return None
    claimed = value(shown[1]) * (-1 if right.strip().startswith("-") else 1)
    return Equation(text, computed, claimed, _decimals(shown[1]))


def _plain(text: str) -> Iterator[Equation]:
    for line in text.split("\n"):
        parts, at = line.split("="), 0
        for part in parts[:-1]:
            at += len(part) + 1  # behind this equals sign
            match, run = _CLAIM.match(line, at), _last_run(part)
            if match is None or not run:
                continue
            start = at - 1 - len(run)
            left = _left(run, line[start - 1 : start] if start else "")
            # `2n + 3 = 9` and `hours * 4 = 12` are no equations of numbers, and `= 6 + 4` goes on after its 6.
            if left is None or _GOES_ON.match(match[2]) or _AMBIGUOUS.search(left):
                continue
            computed, shown = evaluate(left), NUMBER.search(match[1])
            if computed is not None and shown is not None:
                claimed = value(shown[0]) * (-1 if "-" in match[1] else 1)
                yield Equation(f"{left} = {match[1]}", computed, claimed, _decimals(shown[0]))


def _last_run(text: str) -> str:
    """The numbers and operators at the end of `text`."""
    runs = _SIDE.findall(text)
    return runs[-1] if runs and text.endswith(runs[-1]) else ""


def _left(run: str, before: str) -> str | None:
    """The left side in a run of numbers and operators after the character `before`; None where it begins outside."""
    if not run[0].isspace() and (before.isalnum() or before in ("^", "_", "%")):
        return None
    if before == "=" and evaluate(run) is None:  # `2+3 = 5, 5+4 = 9`: the run begins with the result before
        run = _RESULT.sub("", run, count=1)
    left = re.sub(r"^(?:[.,]?\s|\))+", "", run).rstrip()
    return None if left.startswith(tuple("+*/x×÷-−–·")) else left


def _decimals(text: str) -> int:
    return len(text.partition(".")[2])


def evaluate(text: str) -> Fraction | None:
    """The value of an expression of numbers, + - * / ( ) and %; None where it is none or has no operator."""
    text = _TIMES.sub(" *", text.translate(_SIGNS)).strip()
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            return None
        tokens.append(match[1])
        at = match.end()
    if not any(t in "+-*/" for t in tokens[1:]):
        return None
    try:
        tokens.reverse()  # a stack: the next token is the last one
        found = _sum(tokens)
    except (ValueError, ZeroDivisionError, IndexError, RecursionError):
        return None
    return None if tokens else found


def _sum(tokens: list[str]) -> Fraction:
    found = _product(tokens)
    while tokens and tokens[-1] in "+-":
        sign = tokens.pop()
        right = _product(tokens)
        found = found + right if sign == "+" else found - right
    return found


def _product(tokens: list[str]) -> Fraction:
    found = _factor(tokens)
    while tokens and tokens[-1] in ("*", "/"):
        sign = tokens.pop()
        right = _factor(tokens)
        found = found * right if sign == "*" else found / right
    return found


def _factor(tokens: list[str]) -> Fraction:
    first = tokens.pop()
    if first in "+-":
        found = _factor(tokens)
        return -found if first == "-" else found
    if first == "(":
        found = _sum(tokens)
        if tokens.pop() != ")":
            raise ValueError("unbalanced")
    else:
        found = value(first)  # ValueError where it is an operator
    while tokens and tokens[-1] == "%":
        tokens.pop()
        found /= 100
    return found
