"""A batch in the teacher's tokens: its rows, and where the groups of both sides stand."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from largekd.contracts import IGNORE_LABEL, Batch, Segment, Translation
from largekd.data.packing import Row
from largekd.data.store import SampleStore

Ints = NDArray[np.int64]
# As in collation: fewer distinct shapes, and matrix units prefer them.
WIDTH_MULTIPLE = 8


class _Groups(NamedTuple):
    """All groups of a batch at flat positions of their tokens; a sample's last token stands at a position that is not
    its own. row_G: the batch's row; placed_G: every token has a position; predicted_G: every token is predicted."""

    student_G: Ints
    student_length_G: Ints
    teacher_G: Ints
    teacher_length_G: Ints
    row_G: Ints
    placed_G: NDArray[np.bool_]
    predicted_G: NDArray[np.bool_]

    def where(self, chosen: NDArray) -> "_Groups":
        return _Groups(*(column[chosen] for column in self))


def translate(rows: Sequence[Row], *, samples: SampleStore, width: int, counted_T: Ints) -> Translation:
    """`rows` of a batch that is `width` wide on the student's side, in the teacher's tokens.

    Args:
        counted_T: the batch's counted flat positions, ascending.
    """
    theirs = tuple(_teacher_row(row, samples=samples) for row in rows)
    used = max((sum(segment.length for segment in row) for row in theirs), default=0)
    shape = (len(rows), max(1, -(-used // WIDTH_MULTIPLE)) * WIDTH_MULTIPLE)
    teacher, next_ids = _teacher_batch(theirs, samples=samples, shape=shape)
    groups = _groups(rows, theirs, samples=samples, width=width, teacher_width=shape[1])
    placed = groups.where(groups.placed_G)
    numbers_G = 1 + np.arange(len(placed.row_G)) - np.searchsorted(placed.row_G, placed.row_G)
    tensors = {
        "student_start_G": placed.student_G,
        "student_length_G": placed.student_length_G,
        "teacher_start_G": placed.teacher_G,
        "teacher_length_G": placed.teacher_length_G,
        "student_group_BS": _spread(
            numbers_G, starts=placed.student_G, lengths=placed.student_length_G, shape=(len(rows), width)
        ),
        "teacher_group_BS": _spread(numbers_G, starts=placed.teacher_G, lengths=placed.teacher_length_G, shape=shape),
        **_scored(groups, counted_T=counted_T, positions=len(rows) * width, next_ids=next_ids),
    }
    return Translation(teacher=teacher, **{name: torch.from_numpy(value) for name, value in tensors.items()})


def _scored(groups: _Groups, *, counted_T: Ints, positions: int, next_ids: Ints) -> dict[str, Ints]:
    """The fields of scored groups and spans; next_ids: (B * S,) the token after each of the teacher's positions."""
    counted_before = np.zeros(positions + 1, np.int64)
    counted_before[counted_T + 1] = 1
    np.cumsum(counted_before, out=counted_before)
    able = groups.where(groups.predicted_G)
    # A token is predicted at the position before it.
    first_G = counted_before[able.student_G - 1]
    labels_G = counted_before[able.student_G - 1 + able.student_length_G] - first_G
    scored = labels_G == able.student_length_G
    able, first_L = able.where(scored), first_G[scored]
    single = able.student_length_G == 1
    signal_T = np.full(len(counted_T), -1, np.int64)
    signal_T[first_L[single]] = np.flatnonzero(single)
    spans = np.flatnonzero(~single)
    span_lengths = able.student_length_G[spans]
    row_N = _ranges(able.teacher_G - 1, lengths=able.teacher_length_G)
    return {
        "scored_first_L": first_L,
        "scored_length_L": able.student_length_G,
        "scored_row_L": able.teacher_G - 1,
        "scored_teacher_length_L": able.teacher_length_G,
        "signal_T": signal_T,
        "span_G": spans,
        "span_first_T": first_L[spans],
        "span_of_U": np.repeat(np.arange(len(spans)), span_lengths),
        "span_token_U": _ranges(first_L[spans], lengths=span_lengths),
        "row_N": row_N,
        "id_N": next_ids[row_N],
        "scored_N": np.repeat(np.arange(len(first_L)), able.teacher_length_G),
    }


def _groups(
    rows: Sequence[Row], theirs: Sequence[Row], *, samples: SampleStore, width: int, teacher_width: int
) -> _Groups:
    parts: list[list[NDArray]] = [[np.zeros(0, np.int64)] for _ in _Groups._fields]
    for place, (row, their_row) in enumerate(zip(rows, theirs, strict=True)):
        for own, their in zip(row, their_row, strict=True):
            first, last, their_first, their_last = samples.groups(own.sample_id).astype(np.int64).T
            columns = (
                place * width + own.offset + first,
                last - first,
                place * teacher_width + their.offset + their_first,
                their_last - their_first,
                np.full(len(first), place, np.int64),
                (last <= own.length) & (their_last <= their.length),
                (first > 0) & (their_first > 0),
            )
            for part, column in zip(parts, columns, strict=True):
                part.append(column)
    student, student_length, teacher, teacher_length, row_G, placed, predicted = (np.concatenate(p) for p in parts)
    return _Groups(
        student_G=student,
        student_length_G=student_length,
        teacher_G=teacher,
        teacher_length_G=teacher_length,
        row_G=row_G,
        # Joined with an empty column of integers.
        placed_G=placed.astype(np.bool_),
        predicted_G=predicted.astype(np.bool_),
    )


def _teacher_batch(theirs: tuple[Row, ...], *, samples: SampleStore, shape: tuple[int, int]) -> tuple[Batch, Ints]:
    """The teacher's rows, and flat the token that follows each position; a sample's last token is only there."""
    ids, following, positions = (np.zeros(shape, np.int64) for _ in range(3))
    segment_BS = np.zeros(shape, np.int32)
    for place, row in enumerate(theirs):
        used = 0
        for number, segment in enumerate(row, start=1):
            used = segment.offset + segment.length
            span = slice(segment.offset, used)
            tokens = samples.teacher_ids(segment.sample_id)
            ids[place, span], following[place, span] = tokens[:-1], tokens[1:]
            positions[place, span] = np.arange(segment.length)
            segment_BS[place, span] = number
        positions[place, used:] = np.arange(shape[1] - used)
    batch = Batch(
        input_ids_BS=torch.from_numpy(ids),
        labels_BS=torch.full(shape, IGNORE_LABEL, dtype=torch.int64),
        token_weight_BS=torch.zeros(shape, dtype=torch.float32),
        counted_T=torch.zeros(0, dtype=torch.int64),
        position_ids_BS=torch.from_numpy(positions),
        segments=theirs,
        segment_BS=torch.from_numpy(segment_BS),
    )
    return batch, following.reshape(-1)


def _teacher_row(row: Row, *, samples: SampleStore) -> Row:
    segments, offset = [], 0
    for segment in row:
        length = int(samples.teacher_lengths[segment.sample_id])
        segments.append(Segment(segment.sample_id, offset, length))
        offset += length
    return tuple(segments)


def _ranges(starts: Ints, *, lengths: Ints) -> Ints:
    """starts[0], starts[0] + 1, … for lengths[0] numbers, then the same from starts[1], and so on."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _spread(values: Ints, *, starts: Ints, lengths: Ints, shape: tuple[int, int]) -> Ints:
    """(B, S) with values[i] at the flat positions starts[i], + lengths[i], and 0 elsewhere."""
    spread = np.zeros(shape, np.int64)
    spread.reshape(-1)[_ranges(starts, lengths=lengths)] = np.repeat(values, lengths)
    return spread
