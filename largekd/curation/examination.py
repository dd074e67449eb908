"""What is found in answers: parsed texts, verdicts, spans."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypedDict

from largekd.curation.answer_shards import Answer
from largekd.curation.records import Parsed, Verdict


class Span(TypedDict):
    """Characters start … end - 1 of a target: `reasoning`, `answer` or `program`."""

    name: str
    start: int
    end: int


class Examined(NamedTuple):
    """What an answer holds, and whether it is right."""

    parsed: Parsed
    verdict: Verdict


class Examiner(Protocol):
    """Parses and verifies."""

    def examine(self, answers: Sequence[Answer]) -> list[Examined]:
        """Each answer's contents and verdict. `answers` are whole rows, so that samples can vote; failed ones have an
        empty text."""
        ...

    def spans(self, parsed: Parsed, text: str) -> list[Span]:
        """Where `parsed` stands in its text."""
        ...
