"""Generated word problems in GSM8K's row format: 16 templates of one to three steps, with every number drawn at random.

They are made up so that the first run needs no download. Scores on them say that a pipeline works, not how well a model
reasons: the held-out rows share the training rows' templates.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from jaxft.errors import UserError

NAMES = (
    "Amy", "Ann", "Ben", "Dan", "Eva", "Ian", "Kim", "Leo", "Max", "Mia", "Nora", "Omar", "Sam", "Sue", "Tom", "Zoe",
)  # fmt: skip
NOUNS = (
    "apples", "balls", "books", "cakes", "cards", "coins", "cups", "eggs", "hats", "keys", "masks", "nuts", "pens",
    "plums", "shells", "toys",
)  # fmt: skip
SIZES = {"train": 4000, "test": 200, "fresh": 200}
"""Rows per split: test is for tuning and fresh for reporting, so that no choice was made on what is reported."""
SEEDS = {"train": "word problems, train", "test": "word problems, test", "fresh": "word problems, for the report"}

Draw = random.Random
Problem = tuple[str, list[str], int]


def rows(split: str = "train", count: int | None = None) -> list[dict[str, str]]:
    """The first `count` rows of `split` (train, test, fresh) as `{"question": ..., "answer": ...}`; None is all.

    No question occurs twice in a split, and none in two splits. Raises UserError for another split, or more rows than
    the split has.
    """
    if split not in SIZES:
        raise UserError(f"generated:word_problems: no split {split!r}; it has {', '.join(SIZES)}")
    size = SIZES[split] if count is None else count
    if not 0 <= size <= SIZES[split]:
        raise UserError(f"generated:word_problems: {count} rows asked of {split}, which has {SIZES[split]}")
    seen: set[str] = set()
    for name in SIZES:
        made = _split(name, size if name == split else SIZES[name], seen)
        if name == split:
            break
    return made


def normalised(question: str) -> str:
    """The question in lower case with letters and digits only, for telling whether two are the same."""
    return re.sub(r"[^a-z0-9]+", " ", question.lower()).strip()


def _split(name: str, size: int, seen: set[str]) -> list[dict[str, str]]:
    draw, made = random.Random(SEEDS[name]), []
    while len(made) < size:
        question, steps, result = draw.choice(TEMPLATES)(draw)
        key = normalised(question)
        if key not in seen:
            seen.add(key)
            made.append({"question": question, "answer": "\n".join([*steps, f"#### {result}"])})
    return made


def _sum(a: int, b: int) -> str:
    return f"<<{a}+{b}={a + b}>>{a + b}"


def _difference(a: int, b: int) -> str:
    return f"<<{a}-{b}={a - b}>>{a - b}"


def _product(a: int, b: int) -> str:
    return f"<<{a}*{b}={a * b}>>{a * b}"


def _quotient(a: int, b: int) -> str:
    return f"<<{a}/{b}={a // b}>>{a // b}"


def _gift(draw: Draw) -> Problem:
    (name, giver), noun = draw.sample(NAMES, 2), draw.choice(NOUNS)
    a, b = draw.randint(3, 60), draw.randint(2, 39)
    question = f"{name} has {a} {noun}. {giver} gives {name} {b} more. How many {noun} does {name} have now?"
    return question, [f"Now {name} has {_sum(a, b)} {noun}."], a + b


def _loss(draw: Draw) -> Problem:
    name, noun = draw.choice(NAMES), draw.choice(NOUNS)
    a = draw.randint(12, 99)
    b = draw.randint(2, a - 2)
    question = f"{name} has {a} {noun} and loses {b} of them. How many {noun} are left?"
    return question, [f"Now {name} has {_difference(a, b)} {noun} left."], a - b


def _boxes(draw: Draw) -> Problem:
    noun, a, b = draw.choice(NOUNS), draw.randint(2, 10), draw.randint(2, 10)
    question = f"There are {a} boxes with {b} {noun} in each box. How many {noun} are there in all?"
    return question, [f"There are {_product(a, b)} {noun} in all."], a * b


def _sharing(draw: Draw) -> Problem:
    name, noun, b, c = draw.choice(NAMES), draw.choice(NOUNS), draw.randint(2, 10), draw.randint(2, 10)
    question = f"{name} shares {b * c} {noun} equally among {b} friends. How many {noun} does each friend get?"
    return question, [f"Each friend gets {_quotient(b * c, b)} {noun}."], c


def _change(draw: Draw) -> Problem:
    name, noun, a, b = draw.choice(NAMES), draw.choice(NOUNS), draw.randint(2, 9), draw.randint(2, 9)
    paid = draw.choice([p for p in (20, 50, 90) if p >= a * b + 2])
    question = (
        f"{name} buys {a} {noun} at {b} dollars each and pays with {paid} dollars. "
        f"How many dollars does {name} get back?"
    )
    steps = [f"The {noun} cost {_product(a, b)} dollars.", f"So {name} gets {_difference(paid, a * b)} dollars back."]
    return question, steps, paid - a * b


def _passing_on(draw: Draw) -> Problem:
    (name, giver, friend), noun = draw.sample(NAMES, 3), draw.choice(NOUNS)
    a, b = draw.randint(3, 50), draw.randint(3, 40)
    c = draw.randint(2, a + b - 2)
    question = (
        f"{name} has {a} {noun}. {giver} gives {name} {b} more. Then {name} gives {c} to {friend}. "
        f"How many {noun} does {name} have left?"
    )
    steps = [f"First {name} has {_sum(a, b)} {noun}.", f"Then {name} has {_difference(a + b, c)} {noun} left."]
    return question, steps, a + b - c


def _boxes_and_more(draw: Draw) -> Problem:
    name, noun = draw.choice(NAMES), draw.choice(NOUNS)
    a, b, c = draw.randint(2, 9), draw.randint(2, 9), draw.randint(2, 18)
    question = (
        f"{name} has {a} boxes with {b} {noun} each and {c} {noun} more. How many {noun} does {name} have in all?"
    )
    steps = [f"The boxes hold {_product(a, b)} {noun}.", f"In all {name} has {_sum(a * b, c)} {noun}."]
    return question, steps, a * b + c


def _more_than(draw: Draw) -> Problem:
    (name, other), noun, a, b = draw.sample(NAMES, 2), draw.choice(NOUNS), draw.randint(2, 35), draw.randint(2, 25)
    question = f"{name} has {a} {noun}. {other} has {b} {noun} more than {name}. How many {noun} do they have together?"
    steps = [f"First {other} has {_sum(a, b)} {noun}.", f"Together they have {_sum(a, a + b)} {noun}."]
    return question, steps, a + a + b


def _times_as_many(draw: Draw) -> Problem:
    (name, other), noun, a, b = draw.sample(NAMES, 2), draw.choice(NOUNS), draw.randint(2, 9), draw.randint(2, 9)
    question = f"{name} has {a} {noun}. {other} has {b} times as many. How many {noun} do they have together?"
    steps = [f"First {other} has {_product(a, b)} {noun}.", f"Together they have {_sum(a, a * b)} {noun}."]
    return question, steps, a + a * b


def _hourly(draw: Draw) -> Problem:
    name, noun, a, b = draw.choice(NAMES), draw.choice(NOUNS), draw.randint(3, 10), draw.randint(3, 10)
    c = draw.randint(2, a * b - 2)
    question = f"{name} makes {a} {noun} an hour for {b} hours and sells {c} of them. How many {noun} are left?"
    steps = [f"First {name} makes {_product(a, b)} {noun}.", f"Then {name} has {_difference(a * b, c)} {noun} left."]
    return question, steps, a * b - c


def _weeks(draw: Draw) -> Problem:
    name, a, b = draw.choice(NAMES), draw.randint(2, 10), draw.randint(2, 20)
    question = f"{name} is away for {a} weeks and {b} days. How many days is {name} away in all?"
    steps = [f"The weeks are {_product(a, 7)} days.", f"In all {name} is away {_sum(a * 7, b)} days."]
    return question, steps, a * 7 + b


def _pooling(draw: Draw) -> Problem:
    (name, other), noun, c, each = draw.sample(NAMES, 2), draw.choice(NOUNS), draw.randint(2, 9), draw.randint(3, 9)
    a = draw.randint(2, c * each - 2)
    b = c * each - a
    question = (
        f"{name} has {a} {noun} and {other} has {b} {noun}. They share them equally among {c} friends. "
        f"How many {noun} does each friend get?"
    )
    steps = [f"Together they have {_sum(a, b)} {noun}.", f"Each friend gets {_quotient(a + b, c)} {noun}."]
    return question, steps, each


def _wages(draw: Draw) -> Problem:
    name, noun, a, b = draw.choice(NAMES), draw.choice(NOUNS), draw.randint(3, 9), draw.randint(3, 9)
    c, d = draw.randint(2, a * b - 2), draw.randint(2, 20)
    question = (
        f"{name} earns {a} dollars an hour for {b} hours, buys {noun} for {c} dollars and finds {d} dollars. "
        f"How many dollars does {name} have now?"
    )
    steps = [
        f"First {name} earns {_product(a, b)} dollars.",
        f"Then {name} has {_difference(a * b, c)} dollars left.",
        f"Now {name} has {_sum(a * b - c, d)} dollars.",
    ]
    return question, steps, a * b - c + d


def _two_kinds(draw: Draw) -> Problem:
    first, second = draw.sample(NOUNS, 2)
    a, b, c, d = (draw.randint(2, 7) for _ in range(4))
    question = (
        f"There are {a} boxes with {b} {first} each and {c} bags with {d} {second} each. "
        f"How many {first} and {second} are there in all?"
    )
    steps = [
        f"The boxes hold {_product(a, b)} {first}.",
        f"The bags hold {_product(c, d)} {second}.",
        f"In all there are {_sum(a * b, c * d)}.",
    ]
    return question, steps, a * b + c * d


def _half(draw: Draw) -> Problem:
    (name, friend), noun, half, b = draw.sample(NAMES, 2), draw.choice(NOUNS), draw.randint(2, 20), draw.randint(2, 40)
    question = (
        f"{name} has {2 * half} {noun}, gives half of them to {friend} and finds {b} more. "
        f"How many {noun} does {name} have now?"
    )
    steps = [f"First {name} gives {_quotient(2 * half, 2)} {noun}.", f"Now {name} has {_sum(half, b)} {noun}."]
    return question, steps, half + b


def _sale(draw: Draw) -> Problem:
    name, noun = draw.choice(NAMES), draw.choice(NOUNS)
    size, bags, price, d = draw.randint(2, 9), draw.randint(2, 9), draw.randint(2, 9), draw.randint(2, 18)
    question = (
        f"{name} has {d} dollars, puts {size * bags} {noun} into bags of {size} and sells each bag for {price} "
        f"dollars. How many dollars does {name} have now?"
    )
    steps = [
        f"There are {_quotient(size * bags, size)} bags.",
        f"The bags sell for {_product(bags, price)} dollars.",
        f"Now {name} has {_sum(bags * price, d)} dollars.",
    ]
    return question, steps, bags * price + d


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    _gift, _loss, _boxes, _sharing, _change, _passing_on, _boxes_and_more, _more_than, _times_as_many, _hourly, _weeks,
    _pooling, _wages, _two_kinds, _half, _sale,
)  # fmt: skip
