"""The rows of a step depend on seed, data and global batch alone; positions can be saved and restored."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from largekd.contracts import Batch, counts_of
from largekd.data.loader import RowLoader, RowSettings, _ahead, evaluation_batches
from largekd.data.store import SampleStore
from largekd.errors import ConfigError, DataError

MakeStore = Callable[..., SampleStore]
SETTINGS = RowSettings(sequence_length=16, packing=True, global_batch_size=4, seed=3)
SPLITS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1))


def step_rows_seen(samples: SampleStore, settings: RowSettings, *, world: int, micro: int, epochs: int) -> list[list]:
    """For each step the rows of all ranks in rank order; checks that ranks run equally many micro-batches."""
    loaders = [
        RowLoader(samples, settings=settings, micro_batch_size=micro, rank=rank, world_size=world, max_epochs=epochs)
        for rank in range(world)
    ]
    steps = []
    for per_rank in zip(*loaders, strict=True):
        assert {len(batches) for batches in per_rank} == {settings.global_batch_size // world // micro}
        assert all(len(batch.segments) == batch.input_ids_BS.shape[0] == micro for own in per_rank for batch in own)
        steps.append([row for own in per_rank for batch in own for row in batch.segments])
    return steps


@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_a_step_do_not_depend_on_the_split(make_store: MakeStore, packing: bool) -> None:
    settings = replace(SETTINGS, packing=packing)
    rng = np.random.default_rng(0)
    for count in range(1, 2 * settings.global_batch_size + 2):
        # Samples longer than half a row cannot share one, so there are exactly `count` rows.
        samples = make_store(rng.integers(9, 17, count).tolist(), seed=count, masked=True)
        results = [step_rows_seen(samples, settings, world=w, micro=m, epochs=2) for w, m in SPLITS]
        assert all(result == results[0] for result in results)
        assert len(results[0]) == 2 * -(-count // 4)
        for epoch in range(2):
            steps = results[0][epoch * len(results[0]) // 2 :][: len(results[0]) // 2]
            seen = [segment.sample_id for rows in steps for row in rows for segment in row]
            assert sorted(seen) == list(range(count)), "every sample once in an epoch"


def test_counts_do_not_depend_on_the_split_and_a_rank_may_have_none(make_store: MakeStore) -> None:
    samples = make_store([10] * 5, masked=True)
    totals = []
    for world, micro in SPLITS:
        ranks = [
            RowLoader(samples, settings=SETTINGS, micro_batch_size=micro, rank=r, world_size=world, max_epochs=1)
            for r in range(world)
        ]
        counts = [[float(counts_of(step)[0]) for step in loader] for loader in ranks]
        totals.append([sum(step) for step in zip(*counts, strict=True)])
        if world > 1:
            assert counts[-1][-1] == 0 < counts[0][-1]
    assert all(total == totals[0] for total in totals)


def test_epochs_differ_seeds_differ_and_no_shuffle_keeps_the_order(make_store: MakeStore) -> None:
    samples = make_store([9] * 40)

    def order(**changes: object) -> list[list[int]]:
        loader = RowLoader(samples, settings=replace(SETTINGS, **changes), micro_batch_size=4, max_epochs=2)
        ids = [i for step in loader for batch in step for i in batch.sample_ids]
        return [ids[:40], ids[40:]]

    first, second = order()
    assert first != second
    assert order() == [first, second]
    assert order(seed=4)[0] != first
    assert order(shuffle=False) == [list(range(40))] * 2


def assert_same(left: list[list[Batch]], right: list[list[Batch]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.segments == b.segments
            for name in ("input_ids_BS", "labels_BS", "token_weight_BS", "counted_T"):
                assert getattr(a, name).equal(getattr(b, name)), name


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_restored_at_every_step_the_rest_is_equal(make_store: MakeStore, prefetch_steps: int) -> None:
    samples = make_store(np.random.default_rng(0).integers(1, 17, 40).tolist())

    def loader(**changes: int) -> RowLoader:
        options = {"micro_batch_size": 2, "max_epochs": 3, "prefetch_steps": prefetch_steps, **changes}
        return RowLoader(samples, settings=SETTINGS, **options)

    straight = list(loader())
    assert len(straight) == loader().total_steps() > 6
    for stop in range(len(straight) + 1):
        stopped = loader()
        steps = iter(stopped)
        for _ in range(stop):
            next(steps)
        state = json.loads(json.dumps(stopped.state()))
        steps.close()
        assert state["step"] == stop
        resumed = loader()
        resumed.restore(state)
        assert_same(list(resumed), straight[stop:])
        assert resumed.state()["step"] == len(straight)


def test_a_stopped_loader_continues_where_it_was(make_store: MakeStore) -> None:
    samples = make_store([9] * 20)
    loader = RowLoader(samples, settings=SETTINGS, micro_batch_size=4, max_steps=5)
    steps = iter(loader)
    first = [next(steps), next(steps)]
    steps.close()
    again = RowLoader(samples, settings=SETTINGS, micro_batch_size=4, max_steps=5)
    assert_same(first + list(loader), list(again))


def test_restore_allows_another_split_and_names_what_differs(make_store: MakeStore) -> None:
    samples = make_store([9] * 20)
    state = RowLoader(samples, settings=SETTINGS, micro_batch_size=4, max_steps=2).state()
    RowLoader(samples, settings=SETTINGS, micro_batch_size=1, rank=1, world_size=2, max_steps=9).restore(state)
    for changed in (
        {"seed": 4},
        {"global_batch_size": 8},
        {"packing": False},
        {"sequence_length": 32},
        {"shuffle": False},
    ):
        other = RowLoader(samples, settings=replace(SETTINGS, **changed), micro_batch_size=4, max_steps=2)
        ((name, value),) = changed.items()
        with pytest.raises(DataError, match=f"run: {name} was {state[name]!r}, is {value!r}. Restore"):
            other.restore(state)
        assert other.state()["step"] == 0
    elsewhere = RowLoader(make_store([9] * 20, seed=9), settings=SETTINGS, micro_batch_size=4, max_steps=2)
    with pytest.raises(DataError, match="fingerprint was"):
        elsewhere.restore(state)


def test_where_it_ends(make_store: MakeStore) -> None:
    samples = make_store([9] * 9)
    for max_steps, max_epochs, steps in ((2, None, 2), (7, None, 7), (None, 2, 6), (4, 2, 4), (50, 2, 6), (1, 9, 1)):
        loader = RowLoader(samples, settings=SETTINGS, micro_batch_size=4, max_steps=max_steps, max_epochs=max_epochs)
        assert loader.total_steps() == steps
        assert sum(1 for _ in loader) == steps
    assert loader.steps_per_epoch(epoch=0) == 3


def test_refusals(make_store: MakeStore) -> None:
    samples = make_store([9] * 9)
    with pytest.raises(ConfigError, match=r"global_batch_size = 4 must be a multiple of .* = 2 x 3"):
        RowLoader(samples, settings=SETTINGS, micro_batch_size=2, world_size=3, max_steps=1)
    with pytest.raises(ConfigError, match=r"max_steps or train\.max_epochs"):
        RowLoader(samples, settings=SETTINGS, micro_batch_size=2)
    with pytest.raises(DataError, match=r"9 positions, but train\.sequence_length = 8"):
        RowLoader(samples, settings=replace(SETTINGS, sequence_length=8), micro_batch_size=2, max_steps=1)


def test_the_thread_forwards_errors_in_order_and_ends(make_store: MakeStore) -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("page 3 is torn")

    received = []
    with pytest.raises(DataError, match="page 3 is torn"):
        received.extend(iter_into(received, _ahead(items(), depth=2)))
    assert received == [1, 2]
    loader = RowLoader(make_store([9] * 40), settings=SETTINGS, micro_batch_size=4, max_epochs=9)
    steps = iter(loader)
    next(steps)
    assert any(thread.name.startswith("rows") for thread in threading.enumerate())
    steps.close()
    assert not any(thread.name.startswith("rows") for thread in threading.enumerate())


def iter_into(target: list[int], items: Iterator[int]) -> list[int]:
    for item in items:
        target.append(item)
    return []


def test_no_more_than_the_asked_steps_are_made_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    stream = _ahead(items(), depth=2)
    for consumed in range(5):
        assert next(stream) == consumed
        assert len(made) <= consumed + 1 + 2
    stream.close()


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_sees_each_row_once_on_any_split(make_store: MakeStore, packing: bool) -> None:
    samples = make_store(np.random.default_rng(0).integers(1, 17, 23).tolist(), masked=True)
    reference: dict[int | None, set] = {}
    for max_rows in (None, 1, 5, 99):
        for world, micro in ((1, 1), (1, 3), (2, 2), (3, 4)):
            ranks = [
                list(
                    evaluation_batches(
                        samples,
                        sequence_length=16,
                        packing=packing,
                        micro_batch_size=micro,
                        rank=rank,
                        world_size=world,
                        max_rows=max_rows,
                    )
                )
                for rank in range(world)
            ]
            assert len({len(batches) for batches in ranks}) == 1
            rows = [row for batches in ranks for batch in batches for row in batch.segments if row]
            assert len(rows) == len(set(rows))
            assert reference.setdefault(max_rows, set(rows)) == set(rows)
    assert len(reference[5]) == 5
    assert reference[99] == reference[None]
    assert sorted(segment.sample_id for row in reference[None] for segment in row) == list(range(23))


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_look_at_the_next_step_consumes_nothing_and_a_step_can_be_taken_back(
    make_store: MakeStore, ahead: int
) -> None:
    samples = make_store([9] * 30)

    def fresh() -> RowLoader:
        return RowLoader(samples, settings=SETTINGS, micro_batch_size=2, max_steps=3, prefetch_steps=ahead)

    loader, plain = fresh(), list(fresh())
    assert loader.upcoming() is None
    steps = iter(loader)
    first = next(steps)
    before, following = loader.state(), loader.upcoming()
    assert loader.state() == before
    second = next(steps)
    assert second is following
    assert_same([first, second], plain[:2])
    loader.take_back()
    assert loader.state() == before
    assert_same(list(loader), plain[1:])
    assert loader.upcoming() is None
