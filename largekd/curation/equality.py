"""When two answers are the same: by text, by number and unit, by formula, by choice letter.

Each rule returns whether they agree, None where it cannot tell, and what it compared.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from largekd.curation.mathematics import Mathematics
from largekd.curation.numbers import Quantity, read_quantity
from largekd.curation.units import converted, read_unit


class Agreement(NamedTuple):
    """Whether an answer is the right one; None: unknown. `detail` tells what was compared."""

    same: bool | None
    detail: str


Rule = Callable[[str, str], Agreement]
"""rule(gold, answer)."""

_ARTICLE = re.compile(r"^(?:the|an|a)\s+", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"^\W{0,3}(?:(?:option|choice|answer)\s+)?\(?([A-Ja-j])\)?(?=\W|$)")


def folded(text: str) -> str:
    """`text` without differences of case, white space, width, quotes, articles, LaTeX text and closing punctuation."""
    text = _TEXT.sub(r"\1", unicodedata.normalize("NFKC", text)).casefold()
    text = text.replace("’", "'").replace("−", "-").strip("$ \t\n\"'`*")
    text = re.sub(r"\s+", " ", text).strip(" .,;:!")
    return _ARTICLE.sub("", text)


def exact(gold: str, answer: str) -> Agreement:
    """The same text but for `folded`."""
    return Agreement(folded(gold) == folded(answer), f"{gold!r} and {answer!r} as text")


def numeric(gold: str, answer: str, *, tolerance: float) -> Agreement:
    """The same number: |answer − gold| ≤ tolerance · |gold|.

    Units are converted; a unit that one side alone has is the other's too; nouns and currencies do not count. 50% is
    0.5; and 50, where the other side has no percent sign and is at least 1.
    """
    right, given = read_quantity(gold), read_quantity(answer)
    if right is None or given is None:
        which = "right answer" if right is None else "answer"
        return Agreement(None, f"the {which} {(gold if right is None else answer)!r} is no single number")
    units = read_unit(right.unit) if right.unit else None, read_unit(given.unit) if given.unit else None
    values = [given.value]
    if right.percent != given.percent:
        values = _without_percent(right, given)
    if units[0] is not None and units[1] is not None and right.unit != given.unit:
        moved = [converted(value, unit=units[1], to=units[0]) for value in values]
        values = [value for value in moved if value is not None]
        if not values:
            return Agreement(False, f"{gold!r} and {answer!r}: {units[1]} is no measure of {units[0]}")
    limit = abs(right.value) * Fraction(tolerance)
    same = any(abs(value - right.value) <= (limit or Fraction(tolerance)) for value in values)
    return Agreement(same, f"{gold!r} and {answer!r} as numbers")


def _without_percent(right: Quantity, given: Quantity) -> list[Fraction]:
    """Values that the answer can mean where one side alone has a percent sign."""
    if given.percent:
        # "50%" for 50 is the sign left out of the right answer; "0.5%" for 0.5 would be another number.
        return [given.value, given.value * 100] if abs(right.value) >= 1 else [given.value]
    return [given.value, given.value / 100] if abs(given.value) >= 1 else [given.value]


def symbolic(gold: str, answer: str, *, tolerance: float, mathematics: Mathematics) -> Agreement:
    """The same text, number or formula."""
    if exact(gold, answer).same:
        return Agreement(True, f"{gold!r} and {answer!r} as text")
    if "!" not in gold + answer:  # a factorial, where formulas are compared; else an exclamation
        found = numeric(gold, answer, tolerance=tolerance)
        if found.same is not None:
            return found
    compared = mathematics.equal(gold=gold, answer=answer)
    return Agreement(compared.equal, f"{gold!r} and {answer!r} as formulas" + (compared.why and f": {compared.why}"))


def options_of(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The row's options in order: a list in `choices` or `options`, or {"text": […]}, or {"A": …}; none without."""
    found = fields.get("choices", fields.get("options"))
    if isinstance(found, Mapping):
        found = found.get("text", [found[key] for key in sorted(found)])
    if isinstance(found, Sequence) and not isinstance(found, str | bytes):
        return tuple(str(one) for one in found)
    return ()


def letter_of(text: str, *, options: Sequence[str]) -> str | None:
    """The choice letter that `text` begins with, or that stands for the option it is; None for neither."""
    places = [place for place, option in enumerate(options) if folded(option) == folded(text)]
    if len(places) == 1:
        return chr(ord("A") + places[0])
    match = _LETTER.match(text.strip())
    if match is None:
        return None
    rest = text.strip()[match.end() :].strip(" ).:-*")
    letter = match[1].upper()
    # "a dog" begins with a letter, but is no choice of A.
    marked = re.match(r"\W{0,3}(?:(?:option|choice|answer)\s+)?(?:\([A-Ja-j]\)|[A-J][).:*]|[A-Ja-j]\W*$)", text.strip())
    if not marked and rest:
        return None
    return None if options and ord(letter) - ord("A") >= len(options) else letter


def choice(gold: str, answer: str, *, options: Sequence[str]) -> Agreement:
    """The same letter; an option's text stands for its letter."""
    right, given = letter_of(gold, options=options), letter_of(answer, options=options)
    if right is None and gold.strip().isdigit() and int(gold) < len(options):
        right = chr(ord("A") + int(gold))
    if right is None or given is None:
        which = "right answer" if right is None else "answer"
        return Agreement(None, f"the {which} {(gold if right is None else answer)!r} is none of the choices")
    return Agreement(right == given, f"choices {right} and {given}")
