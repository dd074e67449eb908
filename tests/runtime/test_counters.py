"""Counters that ranks share, and ranks that stop together without collectives."""

import time

import pytest

from largekd.errors import ConfigError, LargeKDError
from largekd.runtime.counters import LooseRanks, SharedCounters
from largekd.runtime.ranks import Ranks, current_ranks
from largekd.runtime.shutdown import StopSignal


def deal(*, count: int) -> list[int]:
    """What this rank takes of `count` pieces of work."""
    counters, taken = SharedCounters(), []
    while (place := counters.add("work") - 1) < count:
        taken.append(place)
    return taken


def work(*, stopped: int | None = None, failing: int | None = None) -> tuple[bool, str]:
    """Work until it ends or is stopped: whether it was finished, and the error."""
    ranks, stop = current_ranks(), StopSignal(launched=False)
    loose = LooseRanks(ranks=ranks, stop=stop, silent_s=30, poll_s=0.02)
    try:
        with loose:
            for step in range(2000 if stopped is not None or failing is not None else 5):
                if loose.stopping():
                    break
                if step == 3 and stopped == ranks.rank:
                    stop.request(reason="test")
                if step == 3 and failing == ranks.rank:
                    raise ConfigError("cannot go on")
                # What the work counts must not be taken for the ranks' own numbers.
                loose.counters.add("stop")
                loose.counters.add("done")
                time.sleep(0.005)
    except ConfigError as error:
        return loose.finished, str(error)
    return loose.finished, ""


def test_work_is_dealt_once(one_rank, two_ranks):
    assert one_rank.run(deal, count=10) == [list(range(10))]
    for _ in range(2):
        parts = two_ranks.run(deal, count=50)
        assert sorted(parts[0] + parts[1]) == list(range(50))


def test_ranks_finish_together(two_ranks):
    assert two_ranks.run(work) == [(True, "")] * 2


def test_one_rank_that_is_told_to_stop_stops_both(two_ranks):
    assert two_ranks.run(work, stopped=1) == [(False, "")] * 2


def test_one_rank_that_fails_fails_both(two_ranks):
    assert two_ranks.run(work, failing=0) == [(False, "cannot go on"), (False, "rank 0: cannot go on")]


def test_a_silent_rank_is_named():
    now = iter(range(0, 10_000, 3))
    stop = StopSignal(launched=False)
    loose = LooseRanks(ranks=Ranks(rank=0, world_size=2), stop=stop, silent_s=20, poll_s=0.001, clock=lambda: next(now))
    with pytest.raises(LargeKDError, match="rank 1 has given no sign for 20 s"), loose:
        pass
