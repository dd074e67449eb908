"""What models mark their texts with: thoughts, fenced code. All places are characters of the text."""

import re
from dataclasses import dataclass
from typing import NamedTuple


class Piece(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int

    def of(self, text: str) -> str:
        """The characters themselves."""
        return text[self.start : self.end]


@dataclass(frozen=True)
class Thought:
    """Where a text thinks: `inner` between the tags; the visible text begins at `after`, which is None if the closing
    tag is missing."""

    inner: Piece
    after: int | None


_TAGS = r"think(?:ing)?|thoughts?|reasoning|scratchpad|seed:think"
_OPEN = re.compile(rf"<(?:{_TAGS})>|\[THINK\]|<\|begin_of_thought\|>", re.IGNORECASE)
_CLOSE = re.compile(rf"</(?:{_TAGS})>|\[/THINK\]|<\|end_of_thought\|>", re.IGNORECASE)


def find_thought(text: str) -> Thought | None:
    """The thought that a text opens with; its end is the last closing tag.

    A text without an opening tag, but with a closing one, was opened by the prompt. A tag that a text only mentions
    later opens nothing.
    """
    opened = _OPEN.search(text)
    if opened is not None and text[: opened.start()].strip():
        opened = None
    closed = next(reversed(list(_CLOSE.finditer(text))), None)
    if closed is not None:
        return Thought(inner=trimmed(text, opened.end() if opened else 0, closed.start()), after=closed.end())
    if opened is not None:
        return Thought(inner=trimmed(text, opened.end(), len(text)), after=None)
    return None


def trimmed(text: str, start: int, end: int) -> Piece:
    """Characters [start, end) of `text` without white space at either end; empty at `start` if nothing is left."""
    inner = text[start:end]
    left = len(inner) - len(inner.lstrip())
    if left == len(inner):
        return Piece(start, start)
    return Piece(start + left, start + len(inner.rstrip()))


class Fence(NamedTuple):
    """A block of code: `body` between the lines that open and close it; `whole` with them."""

    language: str
    body: Piece
    whole: Piece
    closed: bool


_FENCE = re.compile(r"^[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[^\s`{]*)[^\n`]*$", re.MULTILINE)
_PYTHON = frozenset({"python", "py", "python3", "py3"})
_LIKE_PYTHON = re.compile(r"^(?:def |import |from \w|class |print\(|for |while |if |\w+ *= *\S|@\w)", re.MULTILINE)


def find_fences(text: str) -> tuple[Fence, ...]:
    """All blocks of code in order; one that nothing closes goes on to the end of the text."""
    fences = []
    opened: re.Match[str] | None = None
    for line in _FENCE.finditer(text):
        if opened is None or (line["language"] and line["mark"][0] == opened["mark"][0]):
            opened = line
        elif line["mark"].startswith(opened["mark"]) and not line["language"]:
            fences.append(_fence(opened, end=line.start(), after=line.end(), closed=True))
            opened = None
    if opened is not None:
        fences.append(_fence(opened, end=len(text), after=len(text), closed=False))
    return tuple(fences)


def _fence(opened: re.Match[str], *, end: int, after: int, closed: bool) -> Fence:
    start = min(opened.end() + 1, end)
    last_break = closed and end > start
    return Fence(opened["language"].lower(), Piece(start, end - last_break), Piece(opened.start(), after), closed)


def find_program(text: str, fences: tuple[Fence, ...], *, cut: bool) -> Fence | None:
    """The last whole program in Python; blocks without a language count if none names Python and they look like it.

    cut: the text was cut off, so that a block that nothing closes is not whole. In a finished text it is: its last
    line may have been the stop string.
    """
    whole = [fence for fence in fences if (fence.closed or not cut) and fence.body.of(text).strip()]
    named = [fence for fence in whole if fence.language in _PYTHON]
    if named:
        return named[-1]
    unnamed = [fence for fence in whole if not fence.language and _LIKE_PYTHON.search(fence.body.of(text))]
    return unnamed[-1] if unnamed else None


def without(text: str, fences: tuple[Fence, ...]) -> str:
    """`text` with its blocks of code blanked, of the same length and with the same lines."""
    parts, place = [], 0
    for fence in fences:
        parts.append(text[place : fence.whole.start])
        parts.append(re.sub(r"[^\n]", " ", fence.whole.of(text)))
        place = fence.whole.end
    return "".join([*parts, text[place:]])
