"""Section timers on a clock and on a device's events that a test plays."""

import pytest
import torch

from largekd.monitoring.timers import Timers, event_factory


class Clock:
    """A device and its host that share one time, moved by the test."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reached = float("inf")
        self.waits = 0

    def __call__(self) -> float:
        return self.now

    def event(self) -> "Event":
        return Event(clock=self)


class Event:
    def __init__(self, *, clock: Clock) -> None:
        self.clock = clock
        self.at: float | None = None

    def record(self) -> None:
        self.at = self.clock.now

    def query(self) -> bool:
        assert self.at is not None
        return self.at <= self.clock.reached

    def synchronize(self) -> None:
        self.clock.waits += 1
        self.clock.reached = max(self.clock.reached, self.at or 0.0)

    def elapsed_time(self, end_event: "Event", /) -> float:
        assert self.at is not None and end_event.at is not None and end_event.query()
        return (end_event.at - self.at) * 1000


def test_host_sections_repeat_nest_and_reset():
    clock = Clock()
    timers = Timers(clock=clock)
    for _ in range(2):
        with timers.section("step"):
            clock.now += 1
            with timers.section("teacher"):
                clock.now += 3
    assert timers.per_step(steps=2) == {"perf/step_s": 4.0, "perf/teacher_s": 3.0}
    assert timers.read() == {}


def test_section_that_raises_is_counted():
    clock = Clock()
    timers = Timers(clock=clock)
    with pytest.raises(ValueError, match="stop"), timers.section("data"):
        clock.now += 2
        raise ValueError("stop")
    assert timers.read() == {"data": 2.0}


def test_device_sections_wait_only_when_read():
    clock = Clock()
    clock.reached = -1.0
    timers = Timers(events=clock.event, clock=clock)
    for _ in range(3):
        with timers.section("teacher"):
            clock.now += 2
        with timers.section("data", host=True):
            clock.now += 1
    assert clock.waits == 0
    assert timers.read() == {"teacher": pytest.approx(6.0), "data": 3.0}
    assert clock.waits == 3


def test_a_long_window_folds_finished_events_without_waiting():
    clock = Clock()
    timers = Timers(events=clock.event, clock=clock)
    for _ in range(2000):
        with timers.section("teacher"):
            clock.now += 1
    assert len(timers._pending) <= 512
    assert clock.waits == 0
    assert timers.read() == {"teacher": pytest.approx(2000.0)}


def test_unfinished_events_are_kept_until_read():
    clock = Clock()
    clock.reached = -1.0
    timers = Timers(events=clock.event, clock=clock)
    for _ in range(600):
        with timers.section("teacher"):
            clock.now += 1
    assert clock.waits == 0
    assert timers.read() == {"teacher": pytest.approx(600.0)}


def test_cpu_has_no_events():
    assert event_factory(device=torch.device("cpu")) is None


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_accelerator_events_measure_time():
    device = torch.accelerator.current_accelerator()
    assert device is not None
    timers = Timers(events=event_factory(device=device))
    with timers.section("matmul"):
        torch.ones(512, 512, device=device) @ torch.ones(512, 512, device=device)
    assert timers.read()["matmul"] > 0
