"""Seconds spent in named sections of a step, without waiting for the device in the hot loop."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


class TimingEvent(Protocol):
    """A mark in a device's stream, as `torch.Event(enable_timing=True)`."""

    def record(self) -> None:
        """Puts the mark at the end of the work that is queued now."""

    def query(self) -> bool:
        """Whether the device has passed the mark; does not wait."""

    def synchronize(self) -> None:
        """Waits until the device has passed the mark."""

    def elapsed_time(self, end_event: "TimingEvent", /) -> float:
        """Milliseconds between this mark and `end_event`; both must have been passed."""


EventFactory = Callable[[], TimingEvent]

# Beyond this many unread pairs the finished ones are folded into the sums, so that a long window holds few events.
_PENDING_PAIRS = 512


def event_factory(*, device: torch.device) -> EventFactory | None:
    """A maker of timing events for `device`; None for the CPU and where `torch.accelerator` finds nothing."""
    if device.type == "cpu" or not torch.accelerator.is_available():
        return None
    # The stubs of torch.Event describe its arguments as positional only.
    return lambda: torch.Event(device, enable_timing=True)  # type: ignore[call-overload,return-value,unused-ignore]


class Timers:
    """Sums of seconds per section between two reads.

    With `events` a section lasts from its first to its last mark in the device's stream, which includes the time the
    device waited for the host. Without, and for sections entered with `host=True` (data loading, whole steps), it is
    wall time on the host. Sections may nest and repeat.
    """

    def __init__(self, *, events: EventFactory | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._events = events
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, TimingEvent, TimingEvent]] = []

    @contextmanager
    def section(self, name: str, *, host: bool = False) -> Iterator[None]:
        """Adds the duration of the `with` block to section `name`, also when the block raises."""
        if self._events is None or host:
            start = self._clock()
            try:
                yield
            finally:
                self._seconds[name] += self._clock() - start
            return
        first, last = self._events(), self._events()
        first.record()
        try:
            yield
        finally:
            last.record()
            self._pending.append((name, first, last))
            if len(self._pending) > _PENDING_PAIRS:
                self._fold(wait=False)

    def read(self) -> dict[str, float]:
        """Seconds per section since the last read; on an accelerator this waits for the last mark: log steps only."""
        self._fold(wait=True)
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def per_step(self, *, steps: int) -> dict[str, float]:
        """`read()` divided by `steps`, under the metric names `perf/<section>_s`."""
        assert steps > 0, f"steps must be positive, got {steps}"
        return {f"perf/{name}_s": seconds / steps for name, seconds in self.read().items()}

    def _fold(self, *, wait: bool) -> None:
        unfinished = []
        for name, first, last in self._pending:
            if wait:
                last.synchronize()
            elif not last.query():
                unfinished.append((name, first, last))
                continue
            self._seconds[name] += first.elapsed_time(last) / 1000
        self._pending = unfinished
