"""Weights of parts of answers: reasoning between markers, the final answer after one; parts that a record names."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from largekd.config.data import SpanWeightConfig
from largekd.data.named_parts import NamedPart, locate_named_parts, read_named_parts
from largekd.data.spans import Tokens, character_starts, token_ends
from largekd.data.templates import Conversation, Span
from largekd.data.token_bytes import Surface


class TokenWeights:
    """Per-token weights of conversations; a token takes the weight of its first character."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        entries: Sequence[SpanWeightConfig],
        named: Mapping[str, float] | None = None,
        key: str = "data.train",
    ) -> None:
        """Raises DataError for a slow tokenizer, which does not tell where its tokens stand."""
        self._surface = Surface(tokenizer, key=f"{key}.span_weights" if entries else f"{key}.named_span_weights")
        self.entries = tuple(entries)
        self.named = dict(named or {})

    @property
    def settings(self) -> tuple[Any, ...]:
        """Everything that decides the weights."""
        return (self.entries, tuple(self.named.items())) if self.named else self.entries

    def named_parts(self, spans: Any, *, messages: Any) -> tuple[NamedPart, ...]:
        """The parts in a record's column of spans, as `read_named_parts`; none where no weight has a name."""
        return read_named_parts(spans, messages=messages) if self.named else ()

    def of(self, talk: Conversation, *, named: Sequence[NamedPart] = ()) -> NDArray[np.float32]:
        """(tokens,) weights: 1 but where an entry says otherwise; of two that say so, the later; then `named` parts.

        Raises:
            UnusableRecordError: the chat template changed the text that the named parts are of.
        """
        assert talk.offsets is not None
        answers = [self._without_end_of_turn(talk.text, answer) for answer in talk.answers]
        weights = character_weights(talk.text, answers=answers, entries=self.entries)
        places = locate_named_parts(named, text=talk.text, end=answers[-1].end if answers else len(talk.text))
        for name, weight in self.named.items():
            for place in (place for part, place in zip(named, places, strict=True) if part.name == name):
                weights[place.start : place.end] = weight
        data = talk.text.encode()
        starts_character = character_starts(data)
        tokens = Tokens(surface=self._surface, ids=talk.ids, offsets=talk.offsets)
        found = token_ends(tokens, data=data, starts_character=starts_character)
        # Offsets may have lost a token's leading space; the end of the token before it has not.
        starts = np.concatenate([[0], found.ends[:-1]]).astype(np.int64)[: len(talk.ids)]
        character = np.cumsum(starts_character)[np.minimum(starts, len(data) - 1)] - 1
        return weights[character]

    def _without_end_of_turn(self, text: str, answer: Span) -> Span:
        """`answer` without the token that the template closes it with, which no entry is about unless it names it."""
        said = text[answer.start : answer.end].rstrip()
        markers = {marker for entry in self.entries for marker in (entry.start, entry.end)}
        for place in self._surface.special:
            token = self._surface.pieces[place].decode("utf-8", "replace")
            if token not in markers and said.endswith(token):
                return Span(answer.start, answer.start + len(said) - len(token))
        return answer


def character_weights(
    text: str, *, answers: Sequence[Span], entries: Sequence[SpanWeightConfig]
) -> NDArray[np.float32]:
    """(characters,) weights of `text`; only its answers can have others than 1."""
    weights = np.ones(len(text), np.float32)
    for answer in answers:
        for entry in entries:
            for start, end in _occurrences(text, answer=answer, entry=entry):
                weights[start:end] = entry.weight
    return weights


def _occurrences(text: str, *, answer: Span, entry: SpanWeightConfig) -> Iterator[tuple[int, int]]:
    """Characters of `answer` that `entry` is about."""
    place = answer.start
    # Templates of reasoning models open a thought in the prompt.
    in_prompt = text[: answer.start].rstrip().endswith(entry.start)
    opened = (place, place) if in_prompt else _find(text, entry.start, span=answer, place=place)
    while opened is not None:
        closed = None if entry.end is None else _find(text, entry.end, span=answer, place=opened[1])
        inner_end, place = closed if closed is not None else (answer.end, answer.end)
        yield (opened[0], place) if entry.include_markers else (opened[1], inner_end)
        opened = _find(text, entry.start, span=answer, place=place)


def _find(text: str, marker: str, *, span: Span, place: int) -> tuple[int, int] | None:
    found = text.find(marker, place, span.end)
    return None if found < 0 else (found, found + len(marker))
