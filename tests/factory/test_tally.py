"""What the progress bar of a job tells: rows, tokens a second, cost, time that is left, the share of whole answers."""

import logging

from largekd.curation.records import Written
from largekd.factory.tally import Tally
from largekd.runtime.counters import SharedCounters


def written(finish, *, tokens=10, cost=0.0):
    return Written("key", "text", finish, 1, tokens, cost=cost)


def test_the_bar_tells_what_all_ranks_wrote(caplog):
    caplog.set_level(logging.INFO)
    now, counters = [100.0], SharedCounters()
    options = {"label": "answers", "total": 12, "done": 2, "clock": lambda: now[0]}
    first = Tally(counters=counters, show=True, **options)
    other = Tally(counters=counters, show=False, **options)
    for finish in ("stop", "stop", "length", "failed"):
        other.add(written(finish, tokens=0 if finish == "failed" else 10, cost=0.25))
    now[0] += 15.0
    first.add(written("stop", tokens=30, cost=1e-9))
    assert first.figures() == {"tokens/s": "4.0", "whole": "60%", "failed": "1", "cost": "1.0000"}
    (line,) = caplog.messages
    assert line.startswith("answers: row 7/12  tokens/s 4.0  whole 60%  failed 1  cost 1.0000  ETA ")
    first.close()
    other.close()


def test_what_costs_nothing_and_never_fails_is_told_shortly():
    tally = Tally(counters=SharedCounters(), label="answers", total=3, done=0, show=False)
    assert tally.figures() == {"tokens/s": "0.0"}
    tally.add(written("stop"))
    assert set(tally.figures()) == {"tokens/s", "whole"}
