"""Progress of a long loop on standard error: a bar on a terminal, now and then a plain line elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)


class ProgressBar:
    """Shows `done/total`, the given figures and the time that is left.

    On a terminal this is one line that is redrawn. Otherwise (a file, a pipe, a batch job) it is a log message at
    level info: for the first and the last advance, and between them at most one per `seconds_between_lines`.
    `initial` is what an earlier process had done; the estimate counts only what this one did.
    """

    def __init__(
        self,
        *,
        label: str,
        total: int,
        initial: int = 0,
        unit: str = "step",
        stream: TextIO | None = None,
        seconds_between_lines: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._initial = self._done = initial
        self._between, self._clock = seconds_between_lines, clock
        self._start = clock()
        self._last_line: float | None = None
        self._bar: tqdm | None = None
        target = sys.stderr if stream is None else stream
        if target.isatty():
            # Imported here because most processes (other ranks, --help) show no bar.
            import tqdm as tqdm_library

            self._bar = tqdm_library.tqdm(
                desc=label, total=total, initial=initial, unit=f" {unit}s", file=target, dynamic_ncols=True, leave=True
            )

    def advance(self, *, to: int, figures: Mapping[str, str]) -> None:
        """Sets what is done to `to`, which never goes back, and shows `figures` (name -> text) beside it."""
        assert to >= self._done, f"progress went back from {self._done} to {to}"
        moved, self._done = to - self._done, to
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(f"{name} {text}" for name, text in figures.items()), refresh=False)
            self._bar.update(moved)
            return
        now = self._clock()
        if self._last_line is None or to >= self._total or now - self._last_line >= self._between:
            self._last_line = now
            parts = [f"{name} {text}" for name, text in figures.items()]
            logger.info("%s", "  ".join([f"{self._label}: {self._unit} {to}/{self._total}", *parts, self._left(now)]))

    def close(self) -> None:
        """Leaves the line as it stands; calling it again is harmless."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, now: float) -> str:
        done_here = self._done - self._initial
        if not done_here:
            return "ETA ?"
        seconds = (now - self._start) / done_here * max(0, self._total - self._done)
        return f"ETA {timedelta(seconds=round(seconds))}"
