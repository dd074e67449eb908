"""Units of measurement in answers, converted by pint; other words ("apples") are no units."""

import re
from fractions import Fraction
from functools import cache
from typing import Any

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
    names = [name if name in _KNOWN else name.lower() for name in _WORD.findall(words)]
    if not all(name in _KNOWN for name in names):
        return None
    rest = iter(names)
    expression = _WORD.sub(lambda _: _alias(next(rest)), words)
    try:
        return str(_registry().parse_units(expression))
    except (pint.UndefinedUnitError, pint.DefinitionSyntaxError, ValueError, TypeError):
        return None


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
