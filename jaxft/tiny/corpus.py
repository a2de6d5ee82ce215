"""The generated corpus that the embedded base model is trained on: arithmetic, short stories, recall and copying.

It holds none of GSM8K's marks and no question with its answer, so that the base cannot do the word problems of
`jaxft.tiny.problems` before it is fine-tuned. It uses their names, nouns and most of their words, because an adapter
cannot make up for a word whose embedding was never trained.
"""

from __future__ import annotations

import random

from jaxft.errors import UserError
from jaxft.tiny.problems import NAMES, NOUNS

SIZE = 96_000
"""Documents, of about 50 tokens each: 4,500 steps of 16 x 112 tokens see them one and a half times."""

Draw = random.Random
OPENINGS = ("Today", "Once", "One day", "Now", "In this story", "First")
# Names come after a space or a line break alike in the target task, but a word's token holds its leading space; so
# documents and lines begin with one of these and every name is always the same token.


def rows(split: str = "train", count: int | None = None) -> list[dict[str, str]]:
    """The first `count` documents as `{"text": ...}`; None is all. Raises UserError for any split but train."""
    if split != "train":
        raise UserError(f"generated:corpus: no split {split!r}; it has train")
    draw = random.Random("base corpus")
    makers, shares = zip(*MIX, strict=True)
    return [{"text": make(draw)} for make in draw.choices(makers, shares, k=SIZE)[:count]]


def _operands(draw: Draw, sign: str) -> tuple[int, int, int]:
    """Two operands and the result: sums and differences within 100, products and quotients of the table to ten."""
    if sign in "+-":
        total = round(100 * draw.random() ** 0.7)
        part = draw.randint(0, total)
        return (part, total - part, total) if sign == "+" else (total, part, total - part)
    a, b = draw.randint(2, 10), draw.randint(2, 10)
    return (a, b, a * b) if sign == "*" else (a * b, a, b)


def _facts(draw: Draw) -> str:
    facts = []
    for sign in draw.choices("+-*/", (30, 38, 17, 15), k=draw.choice((5, 5, 10))):
        a, b, c = _operands(draw, sign)
        facts.append(f"{a}{sign}{b}={c}.")
    return " ".join(facts)


def _facts_in_words(draw: Draw) -> str:
    words = {
        "+": ("{a} and {b} are {c}.", "{b} more than {a} is {c}."),
        "-": ("{a} less {b} is {c}.", "Take {b} from {a} and {c} are left."),
        "*": ("{a} times {b} is {c}.", "{a} boxes of {b} hold {c}.", "{a} bags with {b} each hold {c}."),
        "/": ("{a} shared among {b} is {c} each.", "{a} put into bags of {b} fill {c} bags."),
    }
    sentences = []
    for sign in draw.choices("+-*/", k=4):
        a, b, c = _operands(draw, sign)
        sentences.append(draw.choice(words[sign]).format(a=a, b=b, c=c))
    if draw.random() < 0.3:
        half = draw.randint(2, 25)
        sentences.append(f"Half of {2 * half} is {half}. {2 * half}/2={half}.")
    if draw.random() < 0.2:
        weeks = draw.randint(2, 10)
        sentences.append(f"In {weeks} weeks there are {7 * weeks} days. {weeks}*7={7 * weeks}.")
    return " ".join(sentences)


def _story(draw: Draw) -> str:
    """One person's running total, each change worked and then told with the name and the noun again."""
    (name, other), noun = draw.sample(NAMES, 2), draw.choice((*NOUNS, "dollars"))
    opening = draw.choice(OPENINGS)
    if draw.random() < 0.5:
        a, b, have = _operands(draw, "*")
        how = draw.choice((
            f"gets {a} boxes with {b} {noun} in each", f"buys {a} bags with {b} {noun} each",
            f"{'earns' if noun == 'dollars' else 'makes'} {a} {noun} an hour for {b} hours",
        ))  # fmt: skip
        work = f"{a}*{b}={have}."
        told = [f"{opening} {name} {how}. {work}", f"So {name} has {have} {noun}."]
    else:
        have = draw.randint(3, 90)
        told = [f"{opening} {name} has {have} {noun}."]
    for _ in range(draw.randint(1, 2)):
        change, have = _change(draw, name, other, noun, have)
        told.append(change)
    return draw.choice((" ", "\n")).join(told)


def _change(draw: Draw, name: str, other: str, noun: str, have: int) -> tuple[str, int]:
    then, now = draw.choice(("Then", "Next", "So", "Now")), draw.choice(("Now", "So", "Then", "In all"))
    divisors = [d for d in range(2, 11) if have % d == 0 and 2 <= have // d <= 10]
    kind = draw.choice("+-+-/" if divisors else "+-")
    if kind == "/":
        parts = draw.choice(divisors)
        each = have // parts
        shared = f"{then} {name} shares the {have} {noun} equally among {parts} friends. {have}/{parts}={each}."
        separator = draw.choice((" ", "\n"))
        return f"{shared}{separator}Each friend gets {each} {noun}.", each
    if (kind == "+" and have < 98) or have < 5:
        more = draw.randint(2, 100 - have)
        how = draw.choice((
            f"{name} finds {more} more", f"{other} gives {name} {more} {noun}", f"{name} buys {more} more",
        ))  # fmt: skip
        return f"{then} {how}. {have}+{more}={have + more}. {now} {name} has {have + more} {noun}.", have + more
    less = draw.randint(2, have - 2)
    how = draw.choice((
        f"{name} gives {less} to {other}", f"{name} loses {less} of them", f"{name} sells {less} {noun}",
    ))  # fmt: skip
    left = draw.choice((" left", ""))
    return f"{then} {how}. {have}-{less}={have - less}. {now} {name} has {have - less} {noun}{left}.", have - less


def _recall(draw: Draw) -> str:
    """Numbers tied to names and nouns, told again in another order, and some of them put together."""
    count = draw.choice((2, 3, 3, 4))
    names, nouns = draw.sample(NAMES, count), draw.sample(NOUNS, count)
    if draw.random() < 0.4:
        nouns = [nouns[0]] * count
    numbers = [draw.randint(2, 50) for _ in range(count)]
    facts = [f"{a} has {n} {b}" for a, n, b in zip(names, numbers, nouns, strict=True)]
    told = [f"{draw.choice(OPENINGS)} {', '.join(facts[:-1])} and {facts[-1]}."]
    for i in draw.sample(range(count), draw.randint(1, count)):
        told.append(f"The {numbers[i]} {nouns[i]} are from {names[i]}." if draw.random() < 0.4 else f"So {facts[i]}.")
    if draw.random() < 0.7:
        i, j = draw.sample(range(count), 2)
        total = numbers[i] + numbers[j]
        what = f" {nouns[i]}" if nouns[i] == nouns[j] else ""
        told.append(f"Together {names[i]} and {names[j]} have {numbers[i]}+{numbers[j]}={total}.")
        told.append(f"So they have {total}{what}.")
    return draw.choice((" ", " ", "\n")).join(told)


SIGNS = {
    "+": ("plus", "and", "together with"),
    "-": ("less", "without"),
    "*": ("times",),
    "/": ("shared among",),
}


def _orders(draw: Draw) -> str:
    """Numbers tied to names or things, then orders to work with two of them and with the result."""
    numbers, steps = _chain(draw)
    extra = draw.choice((0, 0, 1))
    if draw.random() < 0.5:
        keys = draw.sample(NAMES, len(numbers) + extra)
        nouns = draw.choices((*NOUNS, "dollars"), k=len(keys))
        facts = [f"{k} has {{}} {n}" for k, n in zip(keys, nouns, strict=True)]
    else:
        things = draw.sample(
            (*NOUNS, "boxes", "bags", "friends", "dollars", "days", "hours", "weeks"), len(numbers) + extra
        )
        facts, keys = [f"{{}} {t}" for t in things], [f"the {t}" for t in things]
    numbers += [draw.randint(2, 60) for _ in range(extra)]
    said = [fact.format(n) for fact, n in zip(facts, numbers, strict=True)]
    draw.shuffle(said)
    if keys[0].startswith("the"):
        said[0] = f"{draw.choice((f'{draw.choice(NAMES)} has', 'there are'))} {said[0]}"
    told = [f"{draw.choice(OPENINGS)} {draw.choice((', ', ' and ')).join(said)}."]
    for i, (sign, work) in enumerate(steps):
        first = keys[0] if i == 0 else draw.choice(("that", "this", "it"))
        told.append(f"So {first} {draw.choice(SIGNS[sign])} {keys[i + 1]}: {work}.")
    return draw.choice((" ", "\n")).join(told)


def _chain(draw: Draw) -> tuple[list[int], list[tuple[str, str]]]:
    """The numbers of one to three operations, each on the result before it, and the operations' signs and work."""
    sign = draw.choice("+-*/")
    a, b, have = _operands(draw, sign)
    numbers, steps = [a, b], [(sign, f"{a}{sign}{b}={have}")]
    for _ in range(draw.choice((0, 1, 1, 2))):
        divisors = [d for d in range(2, 11) if have % d == 0 and 2 <= have // d <= 10]
        sign = draw.choice("+-" + "*" * (2 <= have <= 10) + "/" * bool(divisors))
        if sign == "+":
            b = draw.randint(0, 100 - have)
        elif sign == "-":
            b = draw.randint(0, have)
        else:
            b = draw.randint(2, 10) if sign == "*" else draw.choice(divisors)
        result = {"+": have + b, "-": have - b, "*": have * b, "/": have // max(b, 1)}[sign]
        steps.append((sign, f"{have}{sign}{b}={result}"))
        numbers.append(b)
        have = result
    return numbers, steps


def _copying(draw: Draw) -> str:
    """Names and nouns to be said again, in order or picked out."""
    count = draw.randint(2, 5)
    names, nouns = draw.sample(NAMES, count), [draw.choice(NOUNS) for _ in range(count)]
    does = draw.choices(("has", "buys", "sells", "makes", "finds", "gets", "gives", "loses"), k=count)
    facts = [" ".join(f) for f in zip(names, does, nouns, strict=True)]
    told = [f"{draw.choice(OPENINGS)} {', '.join(facts)}."]
    if draw.random() < 0.4:
        return f"{told[0]} Again: {', '.join(facts)}."
    endings = (
        "So {0} {1} {2}.",
        "Then {0} has {2}.",
        "First {0} {1} {2}.",
        "The {2} are from {0}.",
        "In all {0} has {2}.",
    )
    for i in draw.choices(range(count), k=count):
        told.append(draw.choice(endings).format(names[i], does[i], nouns[i]))
    return draw.choice((" ", "\n")).join(told)


def _repeating(draw: Draw) -> str:
    """A list of names, nouns and numbers said several times: what teaches a small model to copy at all."""
    words = [draw.choice((*NAMES, *NAMES, *NOUNS, str(draw.randint(2, 99)))) for _ in range(draw.randint(3, 8))]
    said = " ".join(words)
    return f"Again: {' '.join([said + '.'] * (4 if len(words) < 5 else 3))}"


def _sentences(draw: Draw) -> str:
    """Words of the problems in bare sentences; a question is never answered."""
    forms = (
        "How many {x} does {a} have?", "How many {x} are there in all?", "How many {x} are left?",
        "How many {x} does each friend get?", "How many {x} do they have together?", "{n} {x} cost {m} dollars.",
        "The boxes hold {x} and the bags hold {y}.", "{a} pays with {n} dollars and gets {m} back.",
        "{a} is away for {n} weeks and {m} days.", "{a} has {n} times as many {x} as {b}.",
        "{a} puts {n} {x} into bags.", "They share them equally.", "{a} gives half of them to {b}.",
        "{a} sells each bag for {n} dollars.", "{a} earns {n} dollars an hour.", "The bags sell for {n} dollars.",
        "There are {n} boxes with {m} {x} in each box.", "{a} buys {n} {x} at {m} dollars each.",
        "{a} has {n} {x} more than {b}.", "The weeks are {n} days.", "Each friend gets {n} {x}.",
    )  # fmt: skip
    told = []
    for form in draw.sample(forms, draw.randint(2, 4)):
        (a, b), (x, y) = draw.sample(NAMES, 2), draw.sample(NOUNS, 2)
        told.append(form.format(a=a, b=b, x=x, y=y, n=draw.randint(2, 50), m=draw.randint(2, 50)))
    return f"{draw.choice(OPENINGS)}:" + draw.choice((" ", "\n")) + " ".join(told)


MIX = (
    (_facts, 20), (_facts_in_words, 6), (_story, 22), (_recall, 16), (_orders, 22), (_repeating, 5), (_copying, 6),
    (_sentences, 3),
)  # fmt: skip
"""Makers and their shares of the documents, in per cent."""
