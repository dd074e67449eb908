"""Two tokenizations of one text, cut into minimal spans that begin and end together.

Positions are bytes of the text, and a cut falls between characters only. Where the bytes of a tokenizer's tokens spell
the text, their running sum says where each token ends. That is exact, unlike the offsets that tokenizers report, which
may have lost spaces. Where they do not (a normalizer changed the text), the ends of the reported offsets say it, and
each span is compared with the text before it is believed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from largekd.data.store import SampleStore
from largekd.data.token_bytes import Surface

Ints = NDArray[np.int64]
# Sentencepiece tokenizers put a space before a text that is not in it.
ADDED_SPACE = b" "


class Piece(NamedTuple):
    """The teacher's tokens of some student tokens, and groups (G, 4): student [0, 1) and teacher [2, 3) places."""

    teacher_ids: NDArray[np.int32]
    groups: NDArray[np.int32]


@dataclass(frozen=True)
class Alignment:
    """The spans of a whole text: every token of both sides is in exactly one, in order.

    spans_N4: student [s0, s1) and teacher [t0, t1) tokens. equal_N: both sides spell the same bytes and a special token
    stands alone for one that is written alike; a span without that is in order, but not a group.
    """

    teacher_ids: NDArray[np.int32]
    spans_N4: Ints
    equal_N: NDArray[np.bool_]

    def with_affixes(self, *, student: tuple[int, int], teacher: tuple[list[int], list[int]]) -> "Alignment":
        """With begin and end tokens: their numbers on the student's side, their ids on the teacher's.

        Those that both sides have belong together, because they mean the same; begin tokens of one side stay alone.
        """
        begin, end = teacher
        shift = np.array([student[0], student[0], len(begin), len(begin)])
        inner = self.spans_N4 + shift
        first = [[0, student[0], 0, len(begin)]] if student[0] or begin else []
        last_s, last_t = student[0] + self._student_tokens, len(begin) + len(self.teacher_ids)
        last = [[last_s, last_s + student[1], last_t, last_t + len(end)]] if student[1] or end else []
        flags = (
            np.full(len(first), student[0] == len(begin) == 1),
            self.equal_N,
            np.full(len(last), student[1] == len(end) == 1),
        )
        return Alignment(
            teacher_ids=np.array([*begin, *self.teacher_ids.tolist(), *end], np.int32),
            spans_N4=np.concatenate([np.reshape(part, (-1, 4)) for part in (first, inner, last)]).astype(np.int64),
            equal_N=np.concatenate(flags),
        )

    @property
    def _student_tokens(self) -> int:
        return int(self.spans_N4[-1, 1]) if len(self.spans_N4) else 0

    def piece(self, *, start: int, stop: int) -> Piece:
        """The student's tokens [start, stop) with the teacher's tokens from the last span that ends at or before the
        first of them to the first span that begins at or after their end; a token that crosses their border is kept."""
        spans = self.spans_N4
        before = int(np.searchsorted(spans[:, 1], start, side="right")) if start else 0
        after = int(np.searchsorted(spans[:, 0], stop, side="left"))
        first = int(spans[before - 1, 3]) if before else 0
        last = int(spans[after, 2]) if after < len(spans) else len(self.teacher_ids)
        whole = self.equal_N & (spans[:, 0] >= start) & (spans[:, 1] <= stop)
        groups = spans[whole] - np.array([start, start, first, first])
        return Piece(teacher_ids=self.teacher_ids[first : max(first, last)], groups=groups.astype(np.int32))


@dataclass(frozen=True)
class Tokens:
    """One side: ids, and (tokens, 2) character offsets as the tokenizer reports them."""

    surface: Surface
    ids: NDArray[np.int32]
    offsets: Ints


class _Ends(NamedTuple):
    """Where tokens end, in bytes; `cuts` are the tokens after which a cut may fall; `exact`: spelled, not reported."""

    ends: Ints
    cuts: Ints
    exact: bool


def align(*, text: str, student: Tokens, teacher: Tokens) -> Alignment:
    """The minimal spans of `text` that begin and end with a token on both sides."""
    data = text.encode()
    starts_character = character_starts(data)
    sides = [(side, token_ends(side, data=data, starts_character=starts_character)) for side in (student, teacher)]
    own, theirs = (found.ends[found.cuts] for _, found in sides)
    common, *places = np.intersect1d(own, theirs, assume_unique=True, return_indices=True)
    # A cut at byte 0 would part the space that a tokenizer adds from the word it belongs to.
    inside = common > 0
    limits = [found.cuts[place][inside] + 1 for (_, found), place in zip(sides, places, strict=True)]
    common = common[inside]
    counts = [len(side.ids) for side, _ in sides]
    if [int(limit[-1]) if limit.size else 0 for limit in limits] != counts:
        limits = [np.append(limit, count) for limit, count in zip(limits, counts, strict=True)]
        common = np.append(common, len(data))
    spans = np.stack([edge for limit in limits for edge in (_shifted(limit), limit)], axis=-1)
    equal = _special_alone(spans, student=student, teacher=teacher)
    equal &= (spans[:, 0] < spans[:, 1]) & (spans[:, 2] < spans[:, 3])
    for column, (side, found) in enumerate(sides):
        if not found.exact:
            equal &= _spelled(side, spans=spans[:, 2 * column : 2 * column + 2], ends=common, data=data)
    return Alignment(teacher_ids=teacher.ids, spans_N4=spans, equal_N=equal)


def character_starts(data: bytes) -> NDArray[np.bool_]:
    """(bytes + 1,) where a character of `data`, a text's UTF-8, begins; and its end."""
    starts = np.ones(len(data) + 1, np.bool_)
    starts[:-1] = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
    return starts


def token_ends(side: Tokens, *, data: bytes, starts_character: NDArray[np.bool_]) -> _Ends:
    """Where the tokens of `side` end in `data`, a text's UTF-8; starts_character: as `character_starts`."""
    spelled = side.surface.spell(side.ids)
    exact = spelled in (data, ADDED_SPACE + data)
    if exact:
        ends = np.cumsum(side.surface.lengths[side.ids]) - (len(spelled) - len(data))
        clean = starts_character[np.maximum(ends, 0)]
    else:
        of_character = np.flatnonzero(starts_character)
        reported = np.maximum.accumulate(side.offsets[:, 1]) if len(side.ids) else np.zeros(0, np.int64)
        # Empty offsets have lost their place; they cannot begin before their end anyway.
        begins = np.where(side.offsets[:, 0] < side.offsets[:, 1], side.offsets[:, 0], len(of_character))
        later = np.append(np.minimum.accumulate(begins[::-1])[::-1][1:], len(of_character))[: len(side.ids)]
        ends, clean = of_character[reported], later >= reported
    # Of tokens that end together, as the parts of one character do, a cut can follow the last only.
    last = np.append(ends[1:] > ends[:-1], True)[: len(ends)]
    return _Ends(ends=ends, cuts=np.flatnonzero(clean & last), exact=exact)


def _shifted(limits: Ints) -> Ints:
    return np.concatenate([np.zeros(min(1, len(limits)), np.int64), limits[:-1]])


def _special_alone(spans: Ints, *, student: Tokens, teacher: Tokens) -> NDArray[np.bool_]:
    """False for spans where a special token meets anything but one special token.

    A teacher that reads the characters of a marker that it does not know has nothing to say about the marker.
    """
    counts = []
    for column, side in ((0, student), (2, teacher)):
        total = np.concatenate([[0], np.cumsum(side.surface.is_special[side.ids])])
        counts.append(total[spans[:, column + 1]] - total[spans[:, column]])
    single = (spans[:, 1] - spans[:, 0] == 1) & (spans[:, 3] - spans[:, 2] == 1)
    return ((counts[0] == 0) & (counts[1] == 0)) | (single & (counts[0] == counts[1]))


def _spelled(side: Tokens, *, spans: Ints, ends: Ints, data: bytes) -> NDArray[np.bool_]:
    """Whether the tokens of each span spell its part of the text, a space that the tokenizer added left aside."""
    equal = np.zeros(len(spans), np.bool_)
    begin = 0
    for place, ((first, last), end) in enumerate(zip(spans.tolist(), ends.tolist(), strict=True)):
        expected = data[begin:end]
        equal[place] = side.surface.spell(side.ids[first:last]) in (expected, ADDED_SPACE + expected)
        begin = end
    return equal


@dataclass(frozen=True)
class AlignmentReport:
    """Shares of the bytes of `samples` samples: in groups, and in groups with one student token."""

    samples: int
    aligned_frac: float
    single_frac: float

    def __str__(self) -> str:
        return (
            f"{self.aligned_frac:.2%} of the text's bytes are in groups of tokens that spell the same to teacher and "
            f"student, {self.single_frac:.2%} in groups with one student token ({self.samples:,} samples)"
        )


def alignment_report(
    samples: SampleStore, *, tokenizer: PreTrainedTokenizerBase, max_samples: int = 2000
) -> AlignmentReport:
    """How much of the first `max_samples` samples the teacher can speak of; `tokenizer`: the student's."""
    lengths = Surface(tokenizer, key="student.model").lengths
    count = min(len(samples), max_samples)
    total = aligned = single = 0
    for sample in range(count):
        before = np.concatenate([[0], np.cumsum(lengths[samples.ids(sample)])])
        first, last = samples.groups(sample)[:, :2].T
        in_group = before[last] - before[first]
        total += int(before[-1])
        aligned += int(in_group.sum())
        single += int(in_group[last - first == 1].sum())
    return AlignmentReport(samples=count, aligned_frac=aligned / max(1, total), single_frac=single / max(1, total))
