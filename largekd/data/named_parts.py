"""Named parts of an answer: characters of a message's content, found again in the rendered conversation."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from largekd.data.quarantine import UnusableRecordError
from largekd.data.templates import Span


class NamedPart(NamedTuple):
    """Characters [start, end) of the `content` of a conversation's last assistant message."""

    name: str
    start: int
    end: int
    content: str


def read_named_parts(spans: Any, *, messages: Any) -> tuple[NamedPart, ...]:
    """The parts that a record's column of spans names, a list of {name, start, end} or the same as JSON; None: none.

    `messages` have been checked already.

    Raises:
        UnusableRecordError: something else, or characters that the last assistant message does not have.
    """
    if isinstance(spans, str):
        try:
            spans = json.loads(spans)
        except json.JSONDecodeError as error:
            raise UnusableRecordError(f"spans are not JSON: {error.msg} at column {error.colno}") from error
    if not spans:
        return ()
    if not isinstance(spans, list):
        raise UnusableRecordError(f"spans are a {type(spans).__name__}, expected a list of name, start and end")
    contents = [message.get("content") or "" for message in messages if message["role"] == "assistant"]
    if not contents:
        raise UnusableRecordError("has spans, but no assistant message that they are of")
    return tuple(_part(span, content=contents[-1]) for span in spans)


def _part(span: Any, *, content: str) -> NamedPart:
    if not isinstance(span, dict) or not isinstance(span.get("name"), str):
        raise UnusableRecordError(f"a span is {json.dumps(span, default=str)[:80]}, expected name, start and end")
    start, end = span.get("start"), span.get("end")
    if type(start) is not int or type(end) is not int or not 0 <= start <= end <= len(content):
        raise UnusableRecordError(
            f"span {span['name']!r} is [{start}, {end}), but the last assistant message has {len(content)} characters"
        )
    return NamedPart(name=span["name"], start=start, end=end, content=content)


def locate_named_parts(parts: Sequence[NamedPart], *, text: str, end: int) -> tuple[Span, ...]:
    """Characters of `text`, a rendered conversation whose last answer ends at `end`, of each of `parts`.

    Templates strip messages and set thoughts apart, so white space does not count when the content is looked for.

    Raises:
        UnusableRecordError: the content is not there otherwise.
    """
    if not parts:
        return ()
    content = parts[0].content
    written = [place for place, character in enumerate(text[:end]) if not character.isspace()]
    wanted = [place for place, character in enumerate(content) if not character.isspace()]
    found = "".join(text[place] for place in written).rfind("".join(content[place] for place in wanted))
    if found < 0:
        raise UnusableRecordError(
            "the chat template changes the last assistant message, so its spans cannot be found; remove "
            "named_span_weights, or choose another chat_template"
        )
    place_in_text = dict(zip(wanted, written[found : found + len(wanted)], strict=True))
    return tuple(_moved(part, text=text, place_in_text=place_in_text) for part in parts)


def _moved(part: NamedPart, *, text: str, place_in_text: dict[int, int]) -> Span:
    """`part` in the rendered text, from its first character to its last that are no white space,
    and one space before them."""
    inside = [place for place in range(part.start, part.end) if place in place_in_text]
    if not inside:
        return Span(0, 0)
    start, end = place_in_text[inside[0]], place_in_text[inside[-1]] + 1
    # Tokens begin with the space before a word, and belong to their first character.
    return Span(start - text[:start].endswith(" "), end)
