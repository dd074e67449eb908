"""Rows to a `Batch`: the only place where labels are shifted.

Ids of fill are never looked at: masks come from segments, because a tokenizer's pad token may be its end token.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from largekd.contracts import IGNORE_LABEL, Batch, Origin, Segment
from largekd.data.packing import Row
from largekd.data.store import SampleStore
from largekd.data.translation import WIDTH_MULTIPLE, translate

FILL_ID = 0


class Samples(Protocol):
    """What is read of samples to write them in rows; see SampleStore, which has the teacher's tokens too."""

    @property
    def weights(self) -> Any:
        """Weight by sample id."""

    @property
    def teachers(self) -> NDArray[np.int64] | None:
        """Place of the teacher that a sample names by sample id, −1: none; None: no sample names one."""

    def ids(self, sample: int) -> NDArray[np.int32]:
        """Token ids."""

    def label_mask(self, sample: int) -> NDArray[np.uint8] | None:
        """1 where a token is a label; None: all."""

    def token_weights(self, sample: int) -> NDArray[np.float32] | None:
        """Weight of each token; None: 1."""


def collate(
    rows: Sequence[Row], *, samples: Samples, sequence_length: int, packing: bool, origin: Origin = "train"
) -> Batch:
    """One micro-batch of `rows`; an empty row is filler without a counted position.

    Packed: every row has `sequence_length` positions, `position_ids_BS` restart in every segment and in the tail, and
    there is no mask. Padded: rows are as wide as the longest, rounded up to a multiple of 8, and `attention_mask_BS`
    marks real positions; a filler row's mask is all ones, because attention over nothing is not a number.
    Samples that hold the teacher's tokens give a batch with a `translation`, those that may name one of several
    teachers one with `teacher_BS`.
    """
    width = sequence_length if packing else _padded_width(rows, sequence_length=sequence_length)
    shape = (len(rows), width)
    ids = np.full(shape, FILL_ID, np.int64)
    labels = np.full(shape, IGNORE_LABEL, np.int64)
    weights = np.zeros(shape, np.float32)
    positions = np.zeros(shape, np.int64)
    mask = np.zeros(shape, np.int64)
    numbers = np.zeros(shape, np.int32)
    teachers = None if samples.teachers is None else np.full(shape, -1, np.int64)
    for place, row in enumerate(rows):
        used = 0
        for number, segment in enumerate(row, start=1):
            _write(segment, samples=samples, ids=ids[place], labels=labels[place], weights=weights[place])
            used = segment.offset + segment.length
            positions[place, segment.offset : used] = np.arange(segment.length)
            numbers[place, segment.offset : used] = number
            if teachers is not None and samples.teachers is not None:
                teachers[place, segment.offset : used] = samples.teachers[segment.sample_id]
        positions[place, used:] = np.arange(width - used)
        mask[place, : used or width] = 1
    counted = np.flatnonzero((labels != IGNORE_LABEL) & (weights > 0))
    translation = None
    if isinstance(samples, SampleStore) and samples.is_translated:
        translation = translate(rows, samples=samples, width=width, counted_T=counted)
    return Batch(
        input_ids_BS=torch.from_numpy(ids),
        labels_BS=torch.from_numpy(labels),
        token_weight_BS=torch.from_numpy(weights),
        counted_T=torch.from_numpy(counted),
        attention_mask_BS=None if packing else torch.from_numpy(mask),
        position_ids_BS=torch.from_numpy(positions) if packing else None,
        segments=tuple(rows),
        segment_BS=torch.from_numpy(numbers),
        translation=translation,
        origin=origin,
        teacher_BS=None if teachers is None else torch.from_numpy(teachers),
    )


def _padded_width(rows: Sequence[Row], *, sequence_length: int) -> int:
    longest = max((segment.offset + segment.length for row in rows for segment in row), default=1)
    return min(-(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, sequence_length)


def _write(
    segment: Segment,
    *,
    samples: Samples,
    ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    weights: NDArray[np.float32],
) -> None:
    """Fills one segment's positions of one row: position t reads token t and is labelled with token t + 1."""
    place = slice(segment.offset, segment.offset + segment.length)
    tokens, mask = samples.ids(segment.sample_id), samples.label_mask(segment.sample_id)
    assert len(tokens) == segment.length + 1
    ids[place] = tokens[:-1]
    labels[place] = tokens[1:] if mask is None else np.where(mask[1:], tokens[1:], IGNORE_LABEL)
    weights[place] = samples.weights[segment.sample_id]
    of_tokens = samples.token_weights(segment.sample_id)
    if of_tokens is not None:
        weights[place] *= of_tokens[1:]
    weights[place][labels[place] == IGNORE_LABEL] = 0
