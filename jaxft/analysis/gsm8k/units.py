"""Units of measurement in a text, and the numbers that convert between units of one dimension."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Dimension:
    """Units with the words that name each, and how many of the second unit make one of the first."""

    units: dict[str, str]
    factors: dict[tuple[str, str], tuple[int, ...]]


# Words that mostly mean something else are left out: quarter (a fourth), second and yard in the singular (but 1 yard).
DIMENSIONS = {
    "time": Dimension(
        {"second": r"seconds|per second|\d+[ -]seconds?", "minute": "minutes?|mins?",
         "hour": "hours?|hourly|hrs?", "day": "days?|daily", "week": "weeks?|weekly", "month": "months?|monthly",
         "year": "years?|yearly|annual|annually", "decade": "decades?", "century": "century|centuries"},
        {("minute", "second"): (60,), ("hour", "second"): (3600,), ("hour", "minute"): (60,), ("day", "minute"): (1440,),
         ("day", "hour"): (24,), ("week", "hour"): (168,), ("week", "day"): (7,), ("month", "day"): (28, 29, 30, 31),
         ("month", "week"): (4,), ("year", "day"): (365, 366), ("year", "week"): (52,), ("year", "month"): (12,),
         ("decade", "year"): (10,), ("century", "year"): (100,)},
    ),
    "length": Dimension(
        {"inch": "inch|inches", "foot": "foot|feet|ft", "yard": r"yards|\d+[ -]yards?", "mile": "miles?",
         "millimeter": "millimeters?|millimetres?|mm", "centimeter": "centimeters?|centimetres?|cm",
         "meter": "meters?|metres?", "kilometer": "kilometers?|kilometres?|km"},
        {("foot", "inch"): (12,), ("yard", "inch"): (36,), ("yard", "foot"): (3,), ("mile", "foot"): (5280,),
         ("mile", "yard"): (1760,), ("centimeter", "millimeter"): (10,), ("meter", "centimeter"): (100,),
         ("meter", "millimeter"): (1000,), ("kilometer", "meter"): (1000,)},
    ),
    "mass": Dimension(
        {"ounce": "ounces?|oz", "pound": "pounds?|lbs?", "ton": "tons?", "milligram": "milligrams?|mg",
         "gram": r"grams?|\d+ ?g", "kilogram": "kilograms?|kilos?|kg"},
        {("pound", "ounce"): (16,), ("ton", "pound"): (2000, 2240), ("ton", "kilogram"): (1000,),
         ("gram", "milligram"): (1000,), ("kilogram", "gram"): (1000,)},
    ),
    "volume": Dimension(
        {"teaspoon": "teaspoons?|tsp", "tablespoon": "tablespoons?|tbsp", "ounce": "ounces?|oz", "cup": "cups?",
         "pint": "pints?", "quart": "quarts?", "gallon": "gallons?", "milliliter": "milliliters?|millilitres?|ml",
         "liter": "liters?|litres?"},
        {("tablespoon", "teaspoon"): (3,), ("cup", "tablespoon"): (16,), ("cup", "ounce"): (8,), ("pint", "cup"): (2,),
         ("pint", "ounce"): (16,), ("quart", "ounce"): (32,), ("quart", "cup"): (4,), ("quart", "pint"): (2,),
         ("gallon", "ounce"): (128,), ("gallon", "cup"): (16,), ("gallon", "pint"): (8,), ("gallon", "quart"): (4,),
         ("liter", "milliliter"): (1000,)},
    ),
    "money": Dimension(
        {"cent": "cents?|¢|penny|pennies", "nickel": "nickels?", "dime": "dimes?", "dollar": r"dollars?|\$"},
        {("nickel", "cent"): (5,), ("dime", "cent"): (10,), ("dime", "nickel"): (2,), ("dollar", "cent"): (100,),
         ("dollar", "nickel"): (20,), ("dollar", "dime"): (10,)},
    ),
}  # fmt: skip
_PATTERNS = {
    (dimension, unit): re.compile(rf"(?<![a-z])(?:{words})(?![a-z])")
    for dimension, of in DIMENSIONS.items()
    for unit, words in of.units.items()
}


def named(text: str) -> dict[str, set[str]]:
    """Dimension -> its units that `text` names; dimensions without any are left out."""
    lower, found = text.lower(), {}
    for (dimension, unit), pattern in _PATTERNS.items():
        if pattern.search(lower):
            found.setdefault(dimension, set()).add(unit)
    return found


def factors(units: Mapping[str, Set[str]], least: int = 1) -> set[Fraction]:
    """What converts between two units of a dimension, either way, where at least `least` of the two are in `units`."""
    whole = {
        Fraction(factor)
        for dimension, held in units.items()
        for pair, of_pair in DIMENSIONS[dimension].factors.items()
        for factor in of_pair
        if len(held.intersection(pair)) >= least
    }
    return whole | {1 / factor for factor in whole}
