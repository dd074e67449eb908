"""The final answer of a text, found by the marks that models put around it. Nothing is computed or completed.

Each finder returns pieces of the text, the last one first, and whether something closes them: an answer that is open at
the end of a text that was cut off may be the beginning of a longer one.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from largekd.curation.markings import Piece, trimmed


class Found(NamedTuple):
    """An answer: `piece` holds it, its mark begins at `mark`; closed: what follows it shows that it is whole;
    broken: what should close it is not there."""

    piece: Piece
    mark: int
    closed: bool
    broken: bool = False


Finder = Callable[[str], Iterator[Found]]
LONGEST = 300
# What is looked at behind a mark: a piece with more than twice LONGEST is no answer, and texts may be long and hostile.
_FAR = 1000

_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BOXED = re.compile(r"\\f?box(?:ed)?[ \t]*(?:\{|[ \t]([0-9A-Za-z])(?![0-9A-Za-z]))|\\boxed([0-9])(?![0-9])")
_LISTS = re.compile(r"[\s$]{0,9}(?:[,;]|[,;]?[ \t\n]{0,9}(?:\\text\{)?[ ]?(?:and|or)\b[ ]?\}?)[\s$]{0,9}")
_MOST_LISTED = 9
_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S[^\n]*)$", re.MULTILINE)
_NUMBER = r"[-+−]?[$€£¥₹]?[ \t]?[-+−]?(?:\d[\d,.٬٫ _]*(?:/\d+)?|[.]\d+)(?:[eE][-+]?\d+)?"
_PLAIN_NUMBER = re.compile(rf"{_NUMBER}[ \t]*%?(?:[ \t]+[^\W\d_]+){{0,3}}")
_HEADING_NUMBER = re.compile(r"\d+[.)][ \t]")
_LINE = re.compile(
    r"(?P<mark>\b(?:final[ \t]{1,4})?answer[ \t]{0,4}(?:\*\*|__)?[ \t]{0,4}[:：=][ \t]{0,4}(?:\*\*|__)?"
    r"|\banswer(?:[ \t]{1,4}to[ \t]{1,4}[^\n.:]{1,80})?[ \t]{1,4}(?:is|are|would[ \t]{1,4}be|equals)\b[ \t]{0,4}[:：]?"
    r"|^[ \t]{0,4}(?:#{1,6}[ \t]{0,4}|\*\*|__)[ \t]{0,4}(?:the[ \t]{1,4})?(?:final[ \t]{1,4})?answer[ \t]{0,4}"
    r"(?:\*\*|__)?[ \t]{0,4}$"
    r"|(?:Antwort|Réponse(?:[ \t]finale)?|Respuesta(?:[ \t]final)?|Resposta|Risposta|Ответ|答案|答え|答|الإجابة|उत्तर)"
    r"[ \t]{0,4}(?:\*\*)?[ \t]{0,4}(?:[:：]|是|为|は|ist\b|est\b|es\b)[ \t]{0,4}[:：]?(?:\*\*)?)",
    re.IGNORECASE | re.MULTILINE,
)
_NO_ANSWER = re.compile(r"(?:not|no longer|in the|as follows|below|given by|found by|that|let'?s)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<![ \t(.][^\W\d_])(?<!^[^\W\d_])[.!。](?=[ \t]+[^\W\d_a-z]|[ \t]*$)")
_DECORATION = re.compile(r"[ \t\r\n*_:]*")
_SPACES = re.compile(r"[ \t]*")
_CHOICE = re.compile(
    r"^[ \t]*(?:\*\*)?(?:(?:option|choice)[ \t]+)?(\([A-Ja-j]\)|[A-J](?=[.):]|\*\*|[ \t]*$))[^\n]*$", re.MULTILINE
)
_BOLD = re.compile(r"\*\*(?=\S)([^*\n]{1,80}?)(?<=\S)\*\*")
_JSON = re.compile(
    r'"(?:final_|correct_)?answer"[ \t\n]{0,40}:[ \t\n]{0,40}'
    # Not the 1 of 1,234, which is no JSON.
    r'("(?:[^"\\\n]|\\.)*"|-?\d[\d.eE+-]*(?=[ \t]{0,40}(?:[}\]\n]|,(?!\d)|$))|true|false)',
    re.IGNORECASE,
)
_ANY_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}%?")


def tags(text: str) -> Iterator[Found]:
    """`<answer>…</answer>`."""
    closing: re.Match[str] | None = None
    for match in reversed(list(_TAG.finditer(text))):
        if match[1]:
            closing = match
        elif closing is not None:
            yield Found(Piece(match.end(), closing.start()), match.start(), True)
            closing = None


def boxed(text: str) -> Iterator[Found]:
    """`\\boxed{…}` with balanced braces, and `\\boxed 5`; different boxes of a list are one answer."""
    closing, matches = _braces(text), list(_BOXED.finditer(text))
    for place in reversed(range(len(matches))):
        match = matches[place]
        if not match[0].endswith("{"):
            yield Found(Piece(*match.span(1 if match[1] else 2)), match.start(), match.end() < len(text))
        elif match.end() - 1 not in closing:
            yield Found(Piece(match.end(), len(text)), match.start(), False, broken=True)
        else:
            pieces = _listed(text, matches=matches, last=place, closing=closing)
            piece, mark = pieces[-1][0], pieces[0][1]
            if len({inner.of(text).strip() for inner, _ in pieces}) > 1:
                piece = Piece(mark, piece.end + 1)
            yield Found(piece, mark, True)


def _listed(
    text: str, *, matches: Sequence[re.Match[str]], last: int, closing: Mapping[int, int]
) -> list[tuple[Piece, int]]:
    """The contents and marks of the boxes that a list ends with in box `last`, as "\\boxed{1} and \\boxed{2}"."""
    found: list[tuple[Piece, int]] = []
    for match in reversed(matches[max(0, last - _MOST_LISTED) : last + 1]):
        end = closing.get(match.end() - 1)
        if end is None or (found and not _LISTS.fullmatch(text, end + 1, found[0][1])):
            break
        found.insert(0, (Piece(match.end(), end), match.start()))
    return found


def _braces(text: str) -> dict[int, int]:
    """The place of the closing brace of each opening one; LaTeX's escaped braces are neither."""
    pairs, opened = {}, []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            pairs[opened.pop()] = match.start()
    return pairs


def hashes(text: str) -> Iterator[Found]:
    """`#### 42`, on a line of its own."""
    for match in reversed(list(_HASHES.finditer(text))):
        yield Found(Piece(*match.span(1)), match.start(), match.end() < len(text))


def sure_hashes(text: str) -> Iterator[Found]:
    """As `hashes`, where it cannot be a heading: a number alone, or the last line."""
    end = len(text.rstrip())
    for found in hashes(text):
        words = found.piece.of(text).strip()
        last = found.piece.end >= end
        number = len(words) <= LONGEST and _PLAIN_NUMBER.fullmatch(words) and not _HEADING_NUMBER.match(words)
        if number or (last and not words.endswith(":")):
            yield found


def json_member(text: str) -> Iterator[Found]:
    """`"answer": …` of a JSON object; a text with escapes is none, because it would not be a piece of the text."""
    for match in reversed(list(_JSON.finditer(text))):
        start, end = match.span(1)
        if match[1].startswith('"'):
            start, end = start + 1, end - 1
            if json.dumps(text[start:end], ensure_ascii=False)[1:-1] != text[start:end]:
                continue
        yield Found(Piece(start, end), match.start(), match.end() < len(text))


def answer_line(text: str) -> Iterator[Found]:
    """`Answer: 5`, `The answer is 5.`, a heading "Final answer" with the answer below."""
    said, end_of_text = len(text.rstrip(" \t\r\n.*")), len(text.rstrip())
    for match in reversed(list(_LINE.finditer(text))):
        start = match.end()
        end = _end_of_line(text, start)
        if not text[start:end].strip(" \t*_:"):
            start = _past(_DECORATION, text, start)
            end = _end_of_line(text, start)
        start = min(_past(_SPACES, text, start), end)
        whole = text[end : end + 1] == "\n"
        bold = _BOLD.match(text, start, end)
        if bold is not None:
            yield Found(Piece(*bold.span(1)), match.start(), True)
            continue
        stop = _SENTENCE_END.search(text[start:end])
        if stop is not None and stop.start():
            # A full stop that ends the text may be a decimal point.
            end, whole = (
                start + stop.start(),
                stop.end() + start < end_of_text or not text[start + stop.start() - 1].isdigit(),
            )
        words = text[start:end]
        # A long "answer" with more below it is the beginning of a solution.
        if len(words.split()) > 12 and end < said and whole:
            continue
        if words.strip() and not _NO_ANSWER.match(words) and not words.rstrip().endswith(":"):
            yield Found(Piece(start, end), match.start(), whole)


def _past(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return found.end() if found else start


def _end_of_line(text: str, start: int) -> int:
    """Where the line ends, or so far behind `start` that it does not matter."""
    far = min(len(text), start + _FAR)
    end = text.find("\n", start, far)
    return far if end < 0 else end


def choice(text: str) -> Iterator[Found]:
    """A letter that begins a line: `(B)`, `B.`, `B) Paris`; the letter alone."""
    for match in reversed(list(_CHOICE.finditer(text))):
        yield Found(Piece(*match.span(1)), match.start(), match.end(1) < len(text))


def lone_choice(text: str) -> Iterator[Found]:
    """As `choice`, in the last line that says something, if nothing but the letter is there."""
    last = text.rstrip()
    for found in choice(last):
        line = last[last.rfind("\n") + 1 :]
        if found.mark >= len(last) - len(line) and not re.search(r"[^\W_]{2}|[^\W_].*[^\W_]", line):
            yield Found(found.piece, found.mark, len(last) < len(text))
        return


def bold_end(text: str) -> Iterator[Found]:
    """The only bold words of the last line, if they hold a digit or are the whole line."""
    last = text.rstrip()
    start = last.rfind("\n") + 1
    bold = list(_BOLD.finditer(last, start))
    if len(bold) == 1:
        words = bold[0][1]
        alone = not re.search(r"\w", last[start : bold[0].start()] + last[bold[0].end() :])
        if not words.endswith(":") and (alone or re.search(r"\d", words)):
            yield Found(Piece(*bold[0].span(1)), start, True)


def short_reply(text: str) -> Iterator[Found]:
    """A text that is one line with a number, or of up to five words, and nothing else."""
    piece = trimmed(text, 0, len(text))
    words = piece.of(text)
    number = len(words) <= 60 and _PLAIN_NUMBER.fullmatch(words.rstrip("."))
    if words and "\n" not in words and words[-1] not in ":?," and (number or len(words.split()) <= 5):
        yield Found(piece, piece.start, piece.end < len(text))


def last_number(text: str) -> Iterator[Found]:
    """The last number of the text."""
    for match in reversed(list(_ANY_NUMBER.finditer(text))):
        yield Found(Piece(*match.span()), match.start(), match.end() < len(text))


AUTO: tuple[Finder, ...] = (tags, boxed, sure_hashes, json_member, answer_line, lone_choice, bold_end, short_reply)
FINDERS: dict[str, tuple[Finder, ...]] = {
    "auto": AUTO,
    "boxed": (boxed,),
    "hashes": (hashes,),
    "answer_line": (answer_line,),
    "last_number": (last_number,),
    "choice": (tags, boxed, answer_line, choice),
    "none": (),
}

_EMPHASIS = ("**", "__", "$$", "$", "`", '"', "'", "*")
_PAIRS = (("\\(", "\\)"), ("\\[", "\\]"), ("“", "”"))


def cleaned(text: str, piece: Piece) -> Piece:
    """`piece` without white space, full stops, emphasis, quotes and mathematical delimiters around it."""
    while True:
        start, end = trimmed(text, *piece)
        words = text[start:end]
        while end > start and text[end - 1] in ".,;:。" and not words.endswith("..."):
            end -= 1
        words = text[start:end]
        if words.count("**") == 1 and len(words) > 2:
            # The other half was before the mark: "**Answer: 12**".
            start, end = start + 2 * words.startswith("**"), end - 2 * words.endswith("**")
            words = text[start:end]
        for left, right in (*((mark, mark) for mark in _EMPHASIS), *_PAIRS):
            size = len(left)
            inner = words[size : len(words) - len(right)]
            if (
                len(words) > size + len(right)
                and words.startswith(left)
                and words.endswith(right)
                and left not in inner
            ):
                start, end = start + size, end - len(right)
                break
        if (start, end) == tuple(piece):
            return piece
        piece = Piece(start, end)


def find_answer(text: str, /, *, format: str, cut: bool, alone: bool = True) -> Found | None:
    """The answer by the first finder of `format` that has one, cleaned.

    cut: the text was cut off; a last answer that is open is then none, and an earlier one was not the last.
    alone: the text is all that was written, so that it may be the answer as a whole.
    """
    for finder in FINDERS[format]:
        if finder is short_reply and not alone:
            continue
        for found in finder(text):
            if cut and not found.closed:
                return None
            piece = trimmed(text, *found.piece)
            if found.broken or piece.end - piece.start > 2 * LONGEST:
                continue
            piece = cleaned(text, piece)
            if piece.start < piece.end <= piece.start + LONGEST:
                return Found(piece, found.mark, found.closed)
    return None
