"""Units of measurement in answers, converted by pint; other words ("apples") are no units."""

import re
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import pint

# Only these words reach pint, which would read a unit into almost any noun: it takes "cats" for centi-atmospheres.
_NAMES = (
    "m meter metre mm millimeter millimetre cm centimeter centimetre km kilometer kilometre inch ft foot yd yard",
    "mi mile g gram kg kilogram mg milligram ton tonne lb pound oz ounce s second ms millisecond min minute h hour",
    "day week month year L liter litre ml mL milliliter millilitre gallon pint quart cup mph N newton J joule kJ",
    "kilojoule calorie kcal W watt kW kilowatt V volt A ampere ohm Hz hertz kHz MHz GHz Pa pascal kPa atm bar",
    "K kelvin mol mole rad radian deg degree C coulomb eV",
)
_ALIASES = {
    **{"in": "inch", "inches": "inch", "feet": "foot", "lbs": "pound", "l": "liter", "gal": "gallon", "cal": "calorie"},
    **{"sec": "second", "secs": "second", "mins": "minute", "hr": "hour", "hrs": "hour", "°": "degree"},
    **{"kph": "kilometer/hour", "amp": "ampere", "amps": "ampere", "t": "tonne"},
}
_WORDS = frozenset(word for line in _NAMES for word in line.split())
_KNOWN = _WORDS | {f"{word}s" for word in _WORDS if len(word) > 2} | frozenset(_ALIASES)
_WORD = re.compile(r"[^\W\d_]+|°")
_POWER_WORDS = (
    (re.compile(r"\b(?:square|sq\.?)[ ]+(\w+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu\.?)[ ]+(\w+)"), r"\1^3"),
    (re.compile(r"\b(\w+)[ ]+squared\b"), r"\1^2"),
    (re.compile(r"\b(\w+)[ ]+cubed\b"), r"\1^3"),
    (re.compile(r"[ ]+(?:per|an?)[ ]+"), "/"),
)
_SHAPE = re.compile(r"(?:[^\W\d_]+|°)(?:\^-?\d)?(?:[ ]?[*/ ][ ]?(?:[^\W\d_]+|°)(?:\^-?\d)?){0,3}")


@cache
def _registry() -> pint.UnitRegistry[Any]:
    return pint.UnitRegistry()


@cache
def read_unit(text: str, /) -> str | None:
    """The unit, as pint writes it, that `text` names ("km/h", "square meters", "m^2"); None for any other words."""
    words = text.strip(" .").replace("µ", "u")
    for pattern, written in _POWER_WORDS:
        words = pattern.sub(written, words)
    if not words or len(words) > 60 or not _SHAPE.fullmatch(words):
        return None
    # "5 M" are millions, not metres.
    names = [name if name in _KNOWN or len(name) == 1 else name.lower() for name in _WORD.findall(words)]
    if not all(name in _KNOWN for name in names):
        return None
    rest = iter(names)
    expression = _WORD.sub(lambda _: _alias(next(rest)), words)
    try:
        return str(_registry().parse_units(expression))
    except (pint.UndefinedUnitError, pint.DefinitionSyntaxError, ValueError, TypeError):
        return None


def leading_unit(text: str, /) -> str | None:
    """The unit that `text` is or begins with ("feet tall"); of "in" alone, which begins "in total", none."""
    words = text.split()
    for count in range(min(len(words), 3), 0, -1):
        found = read_unit(" ".join(words[:count]))
        if found is not None and (count == len(words) or words[:count] != ["in"]):
            return found
    return read_unit(text)


class Money(NamedTuple):
    """A coin or note: its worth in a currency; "" for cents, which several have."""

    currency: str
    worth: Fraction


_HUNDREDTH = Fraction(1, 100)
_MONEY = {
    **dict.fromkeys(("dollar", "dollars", "usd", "bucks"), Money("dollar", Fraction(1))),
    **dict.fromkeys(("cent", "cents"), Money("", _HUNDREDTH)),
    **dict.fromkeys(("penny", "pennies"), Money("dollar", _HUNDREDTH)),
    **dict.fromkeys(("euro", "euros", "eur"), Money("euro", Fraction(1))),
    **dict.fromkeys(("sterling", "pound", "pounds", "gbp"), Money("sterling", Fraction(1))),
    "pence": Money("sterling", _HUNDREDTH),
    "yen": Money("yen", Fraction(1)),
    **dict.fromkeys(("rupee", "rupees"), Money("rupee", Fraction(1))),
}


def money_of(text: str, /) -> Money | None:
    """What `text` begins with, where that is money."""
    words = text.casefold().split()
    return _MONEY.get(words[0].strip(".,;")) if words else None


def _alias(name: str) -> str:
    return _ALIASES.get(name, name)


def converted(value: Fraction, *, unit: str, to: str) -> Fraction | None:
    """`value` of `unit` in `to`, as exactly as floats are; None where the dimensions differ."""
    if unit == to:
        return value
    try:
        return value * Fraction(_registry().Quantity(1.0, unit).to(to).magnitude)
    except (pint.DimensionalityError, pint.OffsetUnitCalculusError):
        return None
