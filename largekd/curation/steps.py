"""The steps of a reasoning: numbered, bulleted, under headings, or its paragraphs."""

import re

_MARKS = (
    # "Step 2:", "**Step 2 - add**", "## Step 2."
    re.compile(
        r"^[ \t]{0,24}(?:#{1,6}[ \t]{0,9})?(?:[-*][ \t]{1,9})?(?:\*\*|__)?[ \t]{0,9}"
        r"(?:step|schritt|étape|paso|passo|шаг|步骤|ステップ)[ \t]{0,9}\d{1,2}\b",
        re.IGNORECASE | re.MULTILINE,
    ),
    # "2.", "2)", "(2)", "**2.**"
    re.compile(r"^[ \t]{0,24}(?:#{1,6}[ \t]{0,24})?(?:\*\*)?\(?\d{1,2}[.)](?:\*\*)?(?=[ \t]|$)", re.M),
    # "- ", "* ", "• "
    re.compile(r"^[ \t]{0,24}[-*•+–][ \t]+", re.M),
    re.compile(r"^[ \t]{0,24}#{1,6}[ \t]+", re.M),
)
_CLOSERS = re.compile(r"^(?:[ \t]{0,24}(?:\*\*|__|[:.)\-–—])(?=\s|\*\*|$))*[ \t]{0,24}")


def split_steps(reasoning: str) -> tuple[str, ...]:
    """Parts of `reasoning`, each a piece of it without its mark; what stands before the first mark is none.

    The first of these that occurs at least twice decides: "Step 1", numbers, bullets, headings; else paragraphs.
    Marks that are indented deeper than the least indented belong to the step they are in.
    """
    for mark in _MARKS:
        found = list(mark.finditer(reasoning))
        if len(found) >= 2:
            least = min(_indent(match[0]) for match in found)
            outer = [match for match in found if _indent(match[0]) == least]
            if len(outer) >= 2:
                return _between(reasoning, outer)
    return tuple(part.strip() for part in re.split(r"\n[ \t]{0,24}\n", reasoning) if part.strip())


def _indent(mark: str) -> int:
    return len(mark) - len(mark.lstrip(" \t"))


def _between(reasoning: str, marks: list[re.Match[str]]) -> tuple[str, ...]:
    ends = [mark.start() for mark in marks[1:]] + [len(reasoning)]
    parts = []
    for mark, end in zip(marks, ends, strict=True):
        part = reasoning[mark.end() : end]
        closer = _CLOSERS.match(part)
        part = part[closer.end() if closer else 0 :].strip()
        if part:
            parts.append(part)
    return tuple(parts)
