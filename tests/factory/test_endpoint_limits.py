"""Pace, cost and journal: the arithmetic behind limits, and what a crash leaves."""

import random
import signal
import subprocess
import sys
import threading
from dataclasses import asdict

import pytest
from factory.chat_fakes import chat_server, commit, make_ask, make_asks, make_config, write_all

from largekd.curation.records import Written
from largekd.factory.cost import CostMeter, Usage, estimated_usage, largest_usage
from largekd.factory.endpoint import JOURNAL
from largekd.factory.endpoint_journal import Journal
from largekd.factory.pace import Pace
from largekd.runtime.http import full_jitter_s


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


def sent_at(pace, clock, *, tokens, until_s):
    """When requests leave that always wait as long as they are told."""
    moments = []
    while True:
        wait_s = pace.try_take(tokens=tokens)
        if clock.now_s + wait_s > until_s:
            return moments
        clock.now_s += wait_s
        if not wait_s:
            moments.append(clock.now_s)


def test_requests_leave_evenly_and_no_more_than_allowed():
    clock = Clock()
    moments = sent_at(Pace(requests_per_minute=30, clock=clock), clock, tokens=5, until_s=1200.0)
    assert moments[:3] == pytest.approx([1000, 1002, 1004])
    for start in moments:
        assert sum(start <= moment < start + 59.9 for moment in moments) <= 30


def test_tokens_are_limited_and_the_tighter_limit_counts():
    clock = Clock()
    pace = Pace(requests_per_minute=600, tokens_per_minute=6000, clock=clock)
    assert sent_at(pace, clock, tokens=500, until_s=1021.0) == pytest.approx([1000, 1005, 1010, 1015, 1020])
    few = Pace(requests_per_minute=6, tokens_per_minute=6000, clock=clock)
    assert few.try_take(tokens=1) == 0 and few.try_take(tokens=1) == pytest.approx(10)


def test_tokens_that_were_not_used_are_given_back_and_idle_time_is_no_credit():
    clock = Clock()
    pace = Pace(tokens_per_minute=60, clock=clock)
    assert pace.try_take(tokens=100) == 0 and pace.try_take(tokens=1) == pytest.approx(100)
    pace.settle(unused=90)
    assert pace.try_take(tokens=1) == pytest.approx(10)
    clock.now_s += 1000
    assert pace.try_take(tokens=10) == 0 and pace.try_take(tokens=10) == pytest.approx(10)


def test_a_hold_stops_everything_for_its_time():
    clock = Clock()
    pace = Pace(clock=clock)
    assert pace.try_take(tokens=10**9) == 0
    pace.hold(seconds=30)
    pace.hold(seconds=5)
    assert pace.try_take(tokens=1) == pytest.approx(30)
    clock.now_s += 30
    assert pace.try_take(tokens=1) == 0


def test_pauses_are_drawn_from_zero_to_a_bound_that_doubles():
    draw = random.Random(0)
    for attempt, bound_s in ((0, 0.5), (1, 1.0), (4, 8.0), (7, 60.0), (5000, 60.0)):
        pauses = [full_jitter_s(attempt, first_s=0.5, longest_s=60.0, draw=draw) for _ in range(2000)]
        assert 0 <= min(pauses) < 0.01 * bound_s and 0.99 * bound_s < max(pauses) <= bound_s


def test_costs_are_reserved_at_their_most_and_settled_at_what_they_were():
    config = make_config("http://127.0.0.1:1", input_price=2.0, output_price=4.0, max_cost=1e-3)
    meter, ask = CostMeter(config), make_ask("a" * 84, max_new_tokens=100)
    most = (100 * 2 + 100 * 4) / 1e6
    assert meter.cost(largest_usage(ask)) == pytest.approx(most)
    assert meter.reserve(ask) and not meter.reserve(ask), "two might cost 0.0012"
    assert meter.settle(ask, usage=Usage(20, 10)) == pytest.approx(80e-6)
    assert meter.reserve(ask)
    assert meter.settle(ask, usage=None) == pytest.approx(most)
    assert meter.spent == pytest.approx(680e-6) and meter.uncertain == pytest.approx(most)
    assert not meter.reserve(ask)
    assert "stand for requests that broke off" in meter.summary()
    assert CostMeter(config, spent=3e-4).reserve(ask) and not CostMeter(config, spent=5e-4).reserve(ask)


def test_a_released_reservation_is_free_again():
    meter = CostMeter(make_config("http://127.0.0.1:1", input_price=0.0, output_price=1.0, max_cost=1.5e-4))
    ask = make_ask("x", max_new_tokens=100)
    for _ in range(3):
        assert meter.reserve(ask) and not meter.reserve(ask)
        meter.release(ask)
    assert meter.spent == 0


def test_no_text_has_more_tokens_than_bytes():
    ask = make_ask("héllo 日本")
    assert largest_usage(ask).prompt_tokens >= len("héllo 日本".encode())
    assert estimated_usage(ask, written="x" * 400).written_tokens == 100
    assert estimated_usage(make_ask("half \ud83d"), written="").prompt_tokens > 0


def written(key, text="text"):
    return Written(key, text, "stop", prompt_tokens=1, written_tokens=2, cost=0.5)


def test_a_journal_gives_back_what_no_shard_has_and_remembers_all_costs(tmp_path):
    path, committed = tmp_path / "sub" / "journal", set()
    journal = Journal(path, committed=lambda: committed)
    for number in range(4):
        journal.put(f"k{number}", cost=1.0, written=written(f"k{number}", "line\nline\u2028\ud83d"))
    journal.put("k0", cost=0.25, written=None)
    assert journal.received("k0") is None, "this process has it already"
    committed |= {"k1", "k2"}
    journal.close()
    with pytest.raises(OSError, match="closed"):
        journal.put("late", cost=1.0, written=None)
    again = Journal(path, committed=lambda: committed)
    assert again.spent == 4.25
    assert asdict(again.received("k0") or written("")) == asdict(written("k0", "line\nline\u2028\ud83d"))
    assert again.received("k1") is None and again.received("k3") is not None
    again.close()
    committed |= {"k0", "k3"}
    last = Journal(path, committed=lambda: committed)
    last.close()
    last.close()
    assert last.spent == 4.25 and len(path.read_text().splitlines()) == 1


def test_a_line_that_a_crash_cut_costs_that_line_alone(tmp_path, caplog):
    path = tmp_path / "journal"
    journal = Journal(path, committed=set)
    journal.put("a", cost=1.0, written=written("a"))
    journal.close()
    whole = path.read_bytes()
    for cut in [*range(1, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        opened = Journal(path, committed=set)
        opened.put("b", cost=1.0, written=written("b"))
        opened.close()
        found = Journal(path, committed=set)
        assert found.received("b") == written("b")
        assert found.received("a") is None and found.spent == 1.0
        found.close()
    assert "damaged" not in caplog.text
    lines = whole.split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1].replace(b"text", b"tamp"), *lines[2:]]))
    opened = Journal(path, committed=set)
    assert opened.received("a") is None and "1 damaged lines" in caplog.text
    opened.close()


def test_a_line_that_a_full_disk_cut_does_not_take_the_next_with_it(tmp_path, caplog):
    path = tmp_path / "journal"
    journal = Journal(path, committed=set)
    with path.open("ab") as other:
        other.write(b'0123456789abcdef {"key": "cu')
    journal.put("a", cost=1.0, written=written("a"))
    journal.close()
    assert "1 damaged lines" in caplog.text
    again = Journal(path, committed=set)
    assert again.received("a") == written("a") and again.spent == 1.0
    again.close()


def test_lines_of_several_threads_stay_whole(tmp_path):
    journal = Journal(tmp_path / "journal", committed=set)

    def put(name):
        for number in range(20):
            journal.put(f"{name}-{number}", cost=1.0, written=written(f"{name}-{number}", "x" * 5000))

    threads = [threading.Thread(target=put, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    again = Journal(tmp_path / "journal", committed=set)
    assert again.spent == 80 and all(again.received(f"{name}-19") for name in "abcd")
    again.close()


_KILLED = """
import os, signal, sys
from pathlib import Path
from factory.chat_fakes import make_asks, open_backend

url, folder, after = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
backend = open_backend(url, folder, concurrency=3)
for number, _ in enumerate(backend.write(iter(make_asks(30)), stopping=lambda: False)):
    # Nothing is committed by then.
    if number == after:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_pays_twice_for_no_more_than_was_under_way(tmp_path, repository):
    asks = make_asks(30)
    with chat_server() as server:
        for start, after in enumerate((4, 12, 20), start=1):
            command = [sys.executable, "-c", _KILLED, server.url, str(tmp_path), str(after)]
            path = f"{repository}:{repository / 'tests'}"
            died = subprocess.run(command, env={"PYTHONPATH": path}, timeout=120, check=False)
            assert died.returncode == -signal.SIGKILL
            assert len(server.completed) >= after
            assert server.completed.total() - len(server.completed) <= 3 * start
        found = write_all(server.url, tmp_path, asks)
        assert set(server.completed) == {ask.item.question for ask in asks} and len(found) == 30
        assert server.completed.total() <= 30 + 9
        before = server.completed.total()
        # And with everything committed nothing is left to ask or to keep.
        commit(tmp_path / "turns" / "answer_0", asks[:9], found)
        commit(tmp_path / "raw", asks[9:], found)
        assert write_all(server.url, tmp_path, []) == {}
        assert server.completed.total() == before
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 1
