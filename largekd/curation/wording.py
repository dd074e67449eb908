"""What tells two answers apart although their numbers or formulas agree: words such as "not" and "less than",
opposites, relations, signs of two values, bases. Equality of numbers and of formulas looks at none of these."""

import re
from typing import NamedTuple

from largekd.curation.mathematics import LONGEST, latex_of


class Difference(NamedTuple):
    """certain: the answers differ; else they may, and are not known to be the same."""

    certain: bool
    why: str


_NUMBER = r"(?=\s+(?:of\s+)?(?:the\s+)?[-$\\]*[\d.])"
_CHANGES = re.compile(
    r"\b(?:not|never|cannot|neither|nor|wrong|incorrect|at\s+(?:least|most)|up\s+to|(?:square|cube)\s+root"
    r"|(?:more|less|fewer|greater|larger|smaller|higher|lower)\s+than|or\s+(?:more|less|fewer|above|below))\b|n['’]t\b"
    rf"|\b(?:over|under|above|below|exceeds|half|third|quarter|twice|double|triple|thrice|times){_NUMBER}"
    r"|(?<=\d)\s+(?:squared|cubed)\b",
    re.IGNORECASE,
)
_OPPOSITES = (
    ("am", "pm"),
    ("increase increases increased gain gains gained profit more", "decrease decreases decreased loss lost less fewer"),
    ("left", "right"),
    ("up upward", "down downward"),
    ("north", "south", "east", "west"),
    ("before earlier", "after later"),
    ("above", "below"),
    ("ahead", "behind"),
    ("older", "younger"),
    ("bc bce", "ad ce"),
    ("clockwise", "counterclockwise anticlockwise"),
)
_POLES = {
    word: (axis, pole)
    for axis, poles in enumerate(_OPPOSITES)
    for pole, words in enumerate(poles)
    for word in words.split()
}
_NOON = re.compile(r"\b([ap])\.\s?m\b\.?", re.IGNORECASE)
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit)\s*\{([^{}]*)\}")
_WORD = re.compile(r"[^\W\d_]+")
_NAMED = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z])\s*=\s*(?=[-+]?(?:[\d.]|\\[dt]?frac|\\sqrt|\\pi))")

_UNEQUAL = re.compile(r"\\neq?(?![a-zA-Z])")
_ORDERED = re.compile(r"\\(?:leq?|geq?|lt|gt|leqslant|geqslant)(?![a-zA-Z])|[<>]")
_INTERVAL = re.compile(r"[\[(][^()\[\]]*,|\\(?:in|cup|cap|infty|setminus|mathbb)(?![a-zA-Z])")
_TWO_VALUES = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")
_SEVERAL = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])|,|;|\b(?:or|and)\b")
_BASE = re.compile(r"[0-9A-Fa-f]_\{?\s*(?:\\text\{)?(\d+|two|eight|ten|sixteen)")
_DIGIT_IN_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit)\s*\{[^{}]*\d")
_PLAIN_WORDS = re.compile(r"[^\W\d_]+(?: [^\W\d_]+)*")


def worded_apart(gold: str, answer: str) -> Difference | None:
    """What the words around two numbers say; None where they say nothing, and for long texts."""
    if max(len(gold), len(answer)) > LONGEST:
        return None
    right, given = (_LATEX_TEXT.sub(r" \1 ", _NOON.sub(r"\1m", text)) for text in (gold, answer))
    names = set(_NAMED.findall(right)), set(_NAMED.findall(given))
    if len(names[0]) == len(names[1]) == 1 and names[0] != names[1]:
        return Difference(True, f"{names[0].pop()} is not {names[1].pop()}")
    poles = _poles(right), _poles(given)
    for axis in poles[0].keys() & poles[1].keys():
        if poles[0][axis] != poles[1][axis]:
            return Difference(True, "one says the opposite of the other")
    changes = _changes(right), _changes(given)
    if changes[0] != changes[1]:
        return Difference(False, f"only one says {', '.join(sorted(changes[0] ^ changes[1]))!r}")
    return None


def _poles(text: str) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for word in _WORD.findall(text.casefold()):
        if word in _POLES:
            axis, pole = _POLES[word]
            found.setdefault(axis, set()).add(pole)
    return found


def _changes(text: str) -> set[str]:
    return {" ".join(match[0].casefold().split()) for match in _CHANGES.finditer(text)}


def formed_apart(gold: str, answer: str) -> Difference | None:
    """What the forms of two formulas say and a comparison of their values passes over; None where they say nothing."""
    if max(len(gold), len(answer)) > LONGEST:
        return None
    right, given = latex_of(gold), latex_of(answer)
    for pattern, other, what in (
        (_UNEQUAL, _INTERVAL, "unequal"),
        (_ORDERED, _INTERVAL, "an inequality"),
        (_TWO_VALUES, _SEVERAL, "two values"),
    ):
        for one, second in ((right, given), (given, right)):
            if pattern.search(one) and not pattern.search(second) and not other.search(second):
                return Difference(True, f"only one is {what}")
    bases = _BASE.findall(right), _BASE.findall(given)
    if bases[1] and bases[0] != bases[1]:
        return Difference(bool(bases[0]), "the bases of their numbers differ")
    if _is_tuple(right) != _is_tuple(given) and _is_set(right) != _is_set(given):
        return Difference(False, "one is a set, the other has an order")
    names = set(_NAMED.findall(right)), set(_NAMED.findall(given))
    if names[0] != names[1] and max(map(len, names)) > 1:
        return Difference(False, "only one names its values")
    if any(_DIGIT_IN_TEXT.search(text) for text in (right, given)):
        return Difference(False, "a text with digits is no formula")
    return _words_apart(right, given)


def _is_tuple(latex: str) -> bool:
    return latex.removeprefix("\\left").startswith(("(", "[")) and "," in latex


def _is_set(latex: str) -> bool:
    return latex.removeprefix("\\left").startswith("\\{") and "," in latex


def _words_apart(right: str, given: str) -> Difference | None:
    """Words would be products of letters, the same in any order."""
    words = [" ".join(_LATEX_TEXT.sub(r"\1", text).casefold().split()) for text in (right, given)]
    if not any(_PLAIN_WORDS.fullmatch(text) and len(text) > 2 for text in words) or words[0] == words[1]:
        return None
    return Difference(sorted(words[0]) != sorted(words[1]), "other words")
