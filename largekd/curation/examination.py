"""What is found in answers: parsed texts, verdicts, spans."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol, TypedDict

from largekd.curation.answer_shards import Answer
from largekd.curation.records import Parsed, Verdict

# Rows that are examined together, so that programs can run beside each other.
_ROWS_TOGETHER = 64


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


def examine_rows(rows: Iterable[Sequence[Answer]], *, examiner: Examiner) -> Iterator[list[tuple[Answer, Examined]]]:
    """The answers of each row with what is found in them, row by row; many rows are examined at the same time."""
    left = iter(rows)
    while together := list(islice(left, _ROWS_TOGETHER)):
        found = iter(examiner.examine([answer for row in together for answer in row]))
        for row in together:
            yield [(answer, next(found)) for answer in row]
