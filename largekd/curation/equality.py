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
from largekd.curation.units import converted, leading_unit, money_of
from largekd.curation.wording import formed_apart, worded_apart


class Agreement(NamedTuple):
    """Whether an answer is the right one; None: unknown. `detail` tells what was compared."""

    same: bool | None
    detail: str


ROUNDING = 1e-6
"""Tolerances up to this one are for decimals that were rounded."""

Rule = Callable[[str, str], Agreement]
"""rule(gold, answer)."""

_ARTICLE = re.compile(r"^(?:the|an|a)\s+", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"^\W{0,3}(?:(?:option|choice|answer)\s+)?\(?([A-Ja-j])\)?(?=\W|$)")
_MARKED_LETTER = re.compile(r"\W{0,3}(?:(?:option|choice|answer)\s+)?(?:\([A-Ja-j]\)|[A-J][).:*])")
_OTHER_LETTER = re.compile(r"\([A-Ja-j]\)|(?<!\w)[A-J](?:[).:*]|$)")
_DENIED = re.compile(r"\b(?:not|wrong|incorrect|false)\b|n't\b", re.IGNORECASE)


def folded(text: str) -> str:
    """`text` without differences of case, white space, width, quotes, articles, LaTeX text and closing punctuation."""
    text = _TEXT.sub(r"\1", unicodedata.normalize("NFKC", text)).casefold()
    text = text.replace("’", "'").replace("−", "-").strip('$ \t\n"`*')
    if text[:1] == text[-1:] == "'":  # not the prime of x'
        text = text.strip("'")
    text = re.sub(r"\s+", " ", text).strip(" .,;:!")
    return _ARTICLE.sub("", text)


def exact(gold: str, answer: str) -> Agreement:
    """The same text but for `folded`."""
    same = folded(gold) == folded(answer) and (folded(gold) != "" or gold == answer)
    return Agreement(same, f"{gold!r} and {answer!r} as text")


def numeric(gold: str, answer: str, *, tolerance: float) -> Agreement:
    """The same number: |answer − gold| ≤ tolerance · |gold|; whole numbers are equal where that only allows rounding.

    Units and money are converted; a unit that one side alone has is the other's too; nouns do not count. 50% is 0.5,
    and 50 where the other side has no percent sign and is more than 1. Unknown where words of one side alone change
    its number ("less than 5").
    """
    apart = worded_apart(gold, answer)
    if apart is not None:
        return Agreement(False if apart.certain else None, f"{gold!r} and {answer!r}: {apart.why}")
    right, given = read_quantity(gold), read_quantity(answer)
    if right is None or given is None:
        which = "right answer" if right is None else "answer"
        return Agreement(None, f"the {which} {(gold if right is None else answer)!r} is no single number")
    values = [given.value]
    if right.percent != given.percent:
        values = _without_percent(right, given)
    converted_values = _converted(values, right=right.unit, given=given.unit)
    if converted_values is None:
        return Agreement(False, f"{gold!r} and {answer!r}: {given.unit} is no measure of {right.unit}")
    same = any(_near(value, right.value, tolerance=tolerance) for value in converted_values)
    return Agreement(same, f"{gold!r} and {answer!r} as numbers")


def _near(value: Fraction, right: Fraction, *, tolerance: float) -> bool:
    if tolerance <= ROUNDING and value.denominator == right.denominator == 1:
        return value == right
    limit = abs(right) * Fraction(tolerance)
    return abs(value - right) <= (limit or Fraction(tolerance))


def _converted(values: list[Fraction], *, right: str, given: str) -> list[Fraction] | None:
    """`values` of the unit `given` in the unit `right`, where both are units or money; None where that cannot be."""
    money = money_of(right), money_of(given)
    if money[0] is not None and money[1] is not None:
        if money[0].currency != money[1].currency and "" not in (money[0].currency, money[1].currency):
            return None
        return [value * money[1].worth / money[0].worth for value in values]
    units = leading_unit(right), leading_unit(given)
    if units[0] is None or units[1] is None:
        return values
    moved = [converted(value, unit=units[1], to=units[0]) for value in values]
    return [value for value in moved if value is not None] or None


def _without_percent(right: Quantity, given: Quantity) -> list[Fraction]:
    """Values that the answer can mean where one side alone has a percent sign."""
    if given.percent:
        # "50%" for 50 is the sign left out of the right answer; "0.5%" for 0.5 would be another number.
        return [given.value, given.value * 100] if abs(right.value) > 1 else [given.value]
    return [given.value, given.value / 100] if abs(given.value) > 1 else [given.value]


def symbolic(gold: str, answer: str, *, tolerance: float, mathematics: Mathematics) -> Agreement:
    """The same text, number or formula."""
    # 5! is a factorial in a right answer, and may be an exclamation in another.
    if exact(gold, answer).same and ("!" not in gold or gold.count("!") == answer.count("!")):
        return Agreement(True, f"{gold!r} and {answer!r} as text")
    if "!" not in gold + answer:
        found = numeric(gold, answer, tolerance=tolerance)
        if found.same is not None:
            return found
    apart = worded_apart(gold, answer) or formed_apart(gold, answer)
    if apart is not None:
        return Agreement(False if apart.certain else None, f"{gold!r} and {answer!r}: {apart.why}")
    compared = mathematics.equal(gold=gold, answer=answer)
    return Agreement(compared.equal, f"{gold!r} and {answer!r} as formulas" + (compared.why and f": {compared.why}"))


class Options(NamedTuple):
    """A row's options in order, and the labels that its data set gives them; none without."""

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def options_of(fields: Mapping[str, Any]) -> Options:
    """A list in `choices` or `options`, or {"text": […], "label": […]}, or {"A": …}."""
    found, labels = fields.get("choices", fields.get("options")), None
    if isinstance(found, Mapping):
        labels = found.get("label") if "text" in found else sorted(found)
        found = found.get("text", [found[key] for key in sorted(found)])
    texts, names = _strings(found), _strings(labels)
    return Options(texts, names if len(names) == len(texts) else ())


def _strings(value: object) -> tuple[str, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(map(str, value))
    return ()


def letter_of(text: str, *, options: Options) -> str | None:
    """The choice letter that `text` begins with, or that stands for the option or label it is; None for neither, and
    for a text that names several or denies its choice."""
    text = _TEXT.sub(r"\1", text).strip("$ \t\n")
    named = {place for place, option in enumerate(options.texts) if folded(option) == folded(text)}
    named |= {place for place, label in enumerate(options.labels) if label == text.strip(" ().:")}
    if named:
        return chr(ord("A") + named.pop()) if len(named) == 1 else None
    match = _LETTER.match(text)
    if match is None:
        return None
    rest = text[match.end() :].strip(" ).:-*")
    # "a dog" begins with a letter, but is no choice of A.
    if rest and (not _MARKED_LETTER.match(text) or _OTHER_LETTER.search(rest) or _DENIED.search(rest)):
        return None
    place = ord(match[1].upper()) - ord("A")
    is_label = match[1].upper() in options.labels
    place = options.labels.index(match[1].upper()) if is_label else place
    others = [other for other, option in enumerate(options.texts) if folded(option) == folded(rest) and other != place]
    if others or (options.texts and place >= len(options.texts)):
        return None
    return chr(ord("A") + place)


def choice(gold: str, answer: str, *, options: Options) -> Agreement:
    """The same letter; an option's text or label stands for its letter."""
    right, given = letter_of(gold, options=options), letter_of(answer, options=options)
    has_numbers = any(label.isdigit() for label in options.labels)
    if right is None and not has_numbers and gold.strip().isdecimal() and int(gold) < len(options.texts):
        right = chr(ord("A") + int(gold))
    if right is None or given is None:
        which = "right answer" if right is None else "answer"
        return Agreement(None, f"the {which} {(gold if right is None else answer)!r} is none of the choices")
    return Agreement(right == given, f"choices {right} and {given}")
