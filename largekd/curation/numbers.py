"""Numbers as people and models write them, read exactly: `1,234.5`, `1 3/4`, `\\frac{1}{2}`, `3 × 10^5`, `50%`."""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from largekd.curation.units import read_unit

LONGEST = 200
LARGEST_EXPONENT = 300

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SIGNS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "—": "-",
        "‐": "-",
        "⁄": "/",
        "∕": "/",
        "÷": "/",
        "٫": ".",
        "٬": ",",
        "×": "*",
        "·": "*",
        "⋅": "*",
    }
)
_LATEX = (
    (re.compile(r"\\[dtc]?frac[ \t]*\{([^{}]*)\}[ \t]*\{([^{}]*)\}"), r" \1/\2 "),
    (re.compile(r"\\[dt]?frac[ \t]*(\d)[ \t]*(\d)"), r" \1/\2 "),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|operatorname|mbox|rm)[ \t]*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:approx|sim|simeq|left|right|displaystyle|bf|rm)(?![a-zA-Z])"), " "),
    (re.compile(r"\^\{?\\circ\}?|\\degree(?![a-zA-Z])|\\circ(?![a-zA-Z])"), "°"),
    (re.compile(r"\\[,;:! ]|~|\\q?quad"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\^[ \t]*\{[ \t]*([-+]?\d+)[ \t]*\}"), r"^\1"),
    (re.compile(r"\\([%$#&])"), r"\1"),
    (re.compile(r"\\[()\[\]]"), " "),
)
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
_SHORT_SCALES = frozenset({"M", "B", "k", "bn", "mn", "mil"})
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:[ \u00a0\u202f_]\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)[ ]*(?P<currency>[$€£¥₹]?)[ ]*(?P<inner>[-+]?)[ ]*"
    rf"(?:(?P<whole>\d+)[ ]+(?P<over>\d+)[ ]*/[ ]*(?P<under>\d+)"
    rf"|(?P<top>{_DIGITS})(?:[ ]*/[ ]*(?P<bottom>-?(?:{_DIGITS})))?"
    rf"(?:[eE](?P<exp>[-+]?\d{{1,4}})(?![\w.])|[ ]*\*+[ ]*10[ ]*(?:\^|\*\*)[ ]*\(?(?P<power>[-+]?\d{{1,4}})\)?)?)"
    rf"(?P<alone>(?:\^|\*\*)\(?(?P<own>[-+]?\d{{1,3}})\)?)?"
    rf"[ ]*(?P<percent>%|percent\b|per cent\b)?(?:[ ]*(?P<scale>{'|'.join(_SCALES)})\b)?",
    re.IGNORECASE,
)
_EUROPEAN = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d{1,2})(?![\d.,])|(?<![\d.,])0,(\d+)(?![\d.,])")
_LEFT_SIDE = re.compile(r"^[ ]*(?:[^\W\d]\w{0,15}(?:\([\w, ]{1,15}\))?[ ]*)?(?:=|≈|:)(?!=)")
_AROUND = re.compile(r"^[ ]*(?:approximately|approx\.?|about|roughly|around|exactly|only|≈|~)[ ]*", re.IGNORECASE)
_NEGATIVE = re.compile(r"\b(?:minus|negative)[ ]+(?=[\d.$])", re.IGNORECASE)
_ELLIPSIS = re.compile(r"\.\.|…|\\[lc]?dots")
_OPERATOR = re.compile(r"^[-,:]|[\^*/+=<>≤≥≠±∓√\\()\[\]{}|]")
_SIGN_BEFORE = re.compile(r"[\\<>≤≥≠±∓]|[\d^*/+=√()\[\]{}-]$")


@dataclass(frozen=True)
class Quantity:
    """An exact value, 50% as 1/2, with the words after it: a unit or a noun."""

    value: Fraction
    percent: bool = False
    unit: str = ""


def plain(text: str) -> str:
    """`text` with LaTeX's markup of numbers, digits of other scripts and typographic signs in ASCII."""
    text = re.sub(r"([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda match: "^" + match[1].translate(_SUPERSCRIPTS), text)
    # "1½" would become "11/2".
    text = "".join(f" {c}" if unicodedata.decomposition(c).startswith("<fraction>") else c for c in text)
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    text = "".join(str(unicodedata.digit(c)) if c.isdigit() and not c.isascii() else c for c in text)
    for pattern, written in _LATEX:
        text = pattern.sub(written, text)
    return re.sub(r"\s+(?=\^)|(?<=\s)\s+", "", re.sub(r"\s", " ", text.replace("**", "^").strip(" $`").strip()))


def read_quantity(text: str, /) -> Quantity | None:
    """The number that `text` is, or the only one that it holds; None for no or several numbers, or a huge one."""
    if len(text) > LONGEST:
        return None
    currency = re.search(r"^[-−]?\s*\\?\$\s*[-−]?\s*\d", text.strip()) is not None and not text.strip().endswith("$")
    if _ELLIPSIS.search(text):
        return None
    words = _NEGATIVE.sub("-", _AROUND.sub("", plain(text)))
    words = _AROUND.sub("", _LEFT_SIDE.sub("", words)).strip()
    words = _EUROPEAN.sub(lambda m: f"{m[1].replace('.', '')}.{m[2]}" if m[1] else f"0.{m[3]}", words)
    words = words[:-1] if words.endswith(".") else words
    match = _NUMBER.match(words)
    if match is None:
        places = _numbers(words)
        match = places[0] if len(places) == 1 else None
    if match is None:
        return None
    before, rest = words[: match.start()], words[match.end() :].strip(" $.,;!")
    glued = words[match.end() - 1].isdigit() and words[match.end() : match.end() + 1].isalpha()
    known = read_unit(rest) is not None
    if _numbers(rest) or _SIGN_BEFORE.search(before.rstrip(" $")):
        return None
    # "R2" is a remainder, "_8" a base.
    if rest in _SHORT_SCALES:
        return None
    if not known and (glued or _OPERATOR.search(rest) or re.search(r"\d", rest)):
        return None
    value = _value(match)
    if value is None:
        return None
    if not rest and (currency or match["currency"]):
        rest = _CURRENCIES.get(match["currency"] or "$", "dollar")
    return Quantity(value=value, percent=bool(match["percent"]), unit=rest)


def _numbers(words: str) -> list[re.Match[str]]:
    # A digit right after a letter or a hat belongs to a name or unit: "x2", "m^2", "CO2".
    found = _NUMBER.finditer(words)
    return [one for one in found if not re.search(r"[\w^.]-?$", words[: one.end() - len(one[0].lstrip())])]


def _value(match: re.Match[str]) -> Fraction | None:
    negative = (match["sign"] == "-") != (match["inner"] == "-")
    if match["whole"]:
        if not int(match["under"]):
            return None
        value = int(match["whole"]) + Fraction(int(match["over"]), int(match["under"]))
    else:
        value = Fraction(_digits(match["top"]))
        if match["bottom"]:
            under = Fraction(_digits(match["bottom"]))
            if not under:
                return None
            value /= under
    exponent = int(match["exp"] or match["power"] or 0)
    own = int(match["own"] or 1)
    if abs(exponent) > LARGEST_EXPONENT or abs(own) > LARGEST_EXPONENT or (own != 1 and value > 10**6):
        return None
    if own < 0 and not value:
        return None
    value = value**own * Fraction(10) ** exponent * _SCALES.get((match["scale"] or "").lower(), 1)
    value = value / 100 if match["percent"] else value
    return -value if negative else value


def _digits(text: str) -> str:
    digits = re.sub(r"[,_\s]", "", text)
    return digits + "0" if digits.endswith(".") else digits
