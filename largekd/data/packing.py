"""Rows out of whole samples: packed best-fit decreasing within windows of the shuffled order, or one sample per row."""

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from largekd.contracts import Segment

Row = tuple[Segment, ...]
# A window holds at least this many samples, and enough of them for this many rows: the last, unfilled row of a
# window then wastes little, and samples stay near their place in the shuffled order.
WINDOW_SAMPLES = 16_384
WINDOW_ROWS = 256
BLOCK_BITS = 9
BLOCK_MASK = (1 << BLOCK_BITS) - 1


class Rows(Sequence[Row]):
    """A list of rows held as four arrays; a row's segments are made when it is asked for."""

    def __init__(
        self, *, samples: NDArray[np.int64], offsets: NDArray[np.int64], lengths: NDArray[np.int64], counts: NDArray
    ) -> None:
        """Args: segments in row order, and how many of them each row has."""
        self._samples, self._offsets, self._lengths = samples, offsets, lengths
        self._starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = slice(*self._starts[index % len(self) :][:2].tolist())
        columns = (self._samples[place].tolist(), self._offsets[place].tolist(), self._lengths[place].tolist())
        return tuple(map(Segment, *columns))

    def efficiency(self, *, sequence_length: int) -> float:
        """Share of the rows' positions that samples fill, in (0, 1]."""
        return float(self._lengths.sum()) / (len(self) * sequence_length)


def one_per_row(lengths: NDArray[np.int64], *, order: NDArray[np.int64]) -> Rows:
    """Rows of one sample each, in `order`."""
    return Rows(
        samples=order, offsets=np.zeros_like(order), lengths=lengths[order], counts=np.ones(len(order), np.int64)
    )


def pack(
    lengths: NDArray[np.int64], *, sequence_length: int, order: NDArray[np.int64], window: int | None = None
) -> Rows:
    """Rows of at most `sequence_length` positions that hold every sample of `order` once, whole.

    Within each window of the order the longest samples are placed first, each into the fullest row that has room
    (best-fit decreasing). Rows are listed by the place of their longest sample in the order, samples of a row by their
    own place. The result is a function of the arguments alone.

    Args:
        lengths: positions of each sample, 1 … sequence_length.
        window: samples that may share rows; None: 16,384, or as many as fill 256 rows on average.
    """
    assert lengths.size and lengths.min() >= 1 and lengths.max() <= sequence_length
    if window is None:
        window = max(WINDOW_SAMPLES, int(WINDOW_ROWS * sequence_length / lengths.mean()))
    parts, counts, offsets = [], [], []
    for start in range(0, len(order), window):
        placed, sizes = _pack_window(lengths[order[start : start + window]], sequence_length=sequence_length)
        samples = order[start : start + window][placed]
        ends = np.cumsum(lengths[samples])
        row_starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        before = np.concatenate(([0], ends))[row_starts]
        offsets.append(ends - lengths[samples] - np.repeat(before, sizes))
        parts.append(samples)
        counts.append(sizes)
    samples = np.concatenate(parts)
    return Rows(
        samples=samples, offsets=np.concatenate(offsets), lengths=lengths[samples], counts=np.concatenate(counts)
    )


def _pack_window(lengths: NDArray[np.int64], *, sequence_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the window in row order, and the number of samples in each row."""
    by_length = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    row_of[by_length] = _best_fit(lengths[by_length].tolist(), capacity=sequence_length)
    # A row's longest sample is its first in `by_length`, and rows are numbered by that order.
    _, firsts = np.unique(row_of[by_length], return_index=True)
    rank = np.empty(len(firsts), np.int64)
    rank[np.argsort(by_length[firsts], kind="stable")] = np.arange(len(firsts))
    row_rank = rank[row_of]
    return np.argsort(row_rank, kind="stable"), np.bincount(row_rank, minlength=len(firsts))


def _best_fit(lengths: list[int], *, capacity: int) -> list[int]:
    """The row of each sample: the open row with the least room that fits, the latest of equals, else a new row."""
    rows: list[int] = []
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = _RoomSet(capacity)
    opened = 0
    for length in lengths:
        room = rooms.at_least(length)
        if room is None:
            room, row = capacity, opened
            opened += 1
        else:
            row = stacks[room].pop()
            if not stacks[room]:
                rooms.flip(room)
        left = room - length
        if left:
            if not stacks[left]:
                rooms.flip(left)
            stacks[left].append(row)
        rows.append(row)
    return rows


class _RoomSet:
    """A set of integers 0 … capacity as bits in blocks, so that finding a successor costs the same at any capacity."""

    def __init__(self, capacity: int) -> None:
        self._blocks = [0] * ((capacity >> BLOCK_BITS) + 1)
        self._filled = 0

    def flip(self, room: int) -> None:
        """Adds `room`, or removes it if it is in the set."""
        block = room >> BLOCK_BITS
        was_empty = not self._blocks[block]
        self._blocks[block] ^= 1 << (room & BLOCK_MASK)
        if was_empty or not self._blocks[block]:
            self._filled ^= 1 << block

    def at_least(self, room: int) -> int | None:
        """The least member that is at least `room`."""
        block, place = room >> BLOCK_BITS, room & BLOCK_MASK
        bits = self._blocks[block] >> place
        if bits:
            return room + (bits & -bits).bit_length() - 1
        blocks = self._filled >> (block + 1)
        if not blocks:
            return None
        block += (blocks & -blocks).bit_length()
        bits = self._blocks[block]
        return (block << BLOCK_BITS) + (bits & -bits).bit_length() - 1
