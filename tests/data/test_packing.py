"""Rows hold every sample once, whole, and waste little."""

import time
from itertools import pairwise

import numpy as np
import pytest

from largekd.contracts import Segment
from largekd.data.packing import _best_fit, one_per_row, pack


def test_random_samples_are_placed_once_without_overlap() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        sequence_length = int(rng.integers(1, 40))
        lengths = rng.integers(1, sequence_length + 1, rng.integers(1, 120))
        order = rng.permutation(len(lengths))
        rows = pack(lengths, sequence_length=sequence_length, order=order, window=int(rng.integers(1, 150)))
        assert sorted(segment.sample_id for row in rows for segment in row) == list(range(len(lengths)))
        for row in rows:
            assert row[0].offset == 0
            for segment, following in pairwise(row):
                assert following.offset == segment.offset + segment.length
            assert row[-1].offset + row[-1].length <= sequence_length
            assert all(segment.length == lengths[segment.sample_id] for segment in row)


def test_a_subset_of_samples_and_the_order_are_respected() -> None:
    rows = pack(np.array([3, 9, 3, 9]), sequence_length=9, order=np.array([3, 2, 0]))
    assert list(rows) == [(Segment(3, 0, 9),), (Segment(2, 0, 3), Segment(0, 3, 3))]
    assert list(one_per_row(np.array([3, 9]), order=np.array([1, 0]))) == [(Segment(1, 0, 9),), (Segment(0, 0, 3),)]


def test_best_fit_against_a_plain_search() -> None:
    rng = np.random.default_rng(3)
    for capacity in (7, 511, 512, 513, 3000):
        lengths = np.sort(rng.integers(1, capacity + 1, 200))[::-1].tolist()
        room: list[int] = []
        expected_rooms = []
        for length in lengths:
            fits = [left for left in room if left >= length]
            if fits:
                room[room.index(min(fits))] -= length
            else:
                room.append(capacity - length)
            expected_rooms.append(sorted(room))
        rows = _best_fit(lengths, capacity=capacity)
        used = np.bincount(rows, weights=lengths)
        assert sorted((capacity - used).astype(int).tolist()) == expected_rooms[-1]


def test_windows_do_not_share_rows_and_keep_the_orders_neighbourhood() -> None:
    lengths = np.full(100, 3)
    rows = pack(lengths, sequence_length=8, order=np.arange(100), window=10)
    assert all(len({segment.sample_id // 10 for segment in row}) == 1 for row in rows)
    assert [row[0].sample_id // 10 for row in rows] == sorted(row[0].sample_id // 10 for row in rows)


def test_rows_are_not_sorted_by_length() -> None:
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 101, 5000)
    rows = pack(lengths, sequence_length=100, order=np.arange(5000))
    longest = np.array([max(segment.length for segment in row) for row in rows])
    halves = longest[: len(rows) // 2].mean(), longest[len(rows) // 2 :].mean()
    assert abs(halves[0] - halves[1]) < 3


@pytest.mark.parametrize("sequence_length", [512, 2048, 8192])
def test_text_pieces_fill_97_percent(sequence_length: int) -> None:
    rng = np.random.default_rng(1)
    documents = np.exp(rng.normal(6.3, 1.2, 20_000)).astype(np.int64) + 2
    full, rest = divmod(documents, sequence_length)
    lengths = np.concatenate([np.full(full.sum(), sequence_length), rest[rest > 0]])
    rows = pack(lengths, sequence_length=sequence_length, order=rng.permutation(len(lengths)))
    assert rows.efficiency(sequence_length=sequence_length) > 0.97


@pytest.mark.slow
def test_a_million_samples_take_seconds() -> None:
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 2049, 1_000_000)
    began = time.process_time()
    rows = pack(lengths, sequence_length=2048, order=rng.permutation(len(lengths)))
    assert time.process_time() - began < 15
    assert rows.efficiency(sequence_length=2048) > 0.99


def test_rows_behave_like_a_list() -> None:
    rows = pack(np.array([5, 4, 3]), sequence_length=5, order=np.arange(3))
    assert len(rows) == 3
    assert rows[-1] == rows[2] == list(rows)[2]
    assert rows[1:9] == [rows[1], rows[2]]
    with pytest.raises(IndexError):
        rows[3]
