"""How far the job is: rows, tokens a second, cost and the share of whole answers, over all ranks."""

import time
from collections.abc import Callable

from largekd.curation.records import Written
from largekd.runtime.counters import SharedCounters
from largekd.runtime.progress_bar import ProgressBar

_COST_UNITS = 1_000_000_000
"""The store counts whole numbers: cost in billionths."""


class Tally:
    """Every rank adds what it wrote; the one that shows reads the sums now and then.

    `whole` is the share of answers that ended by themselves: neither cut off nor failed. What curation accepts of them
    is known when it has run.
    """

    def __init__(
        self,
        *,
        counters: SharedCounters,
        label: str,
        total: int,
        done: int,
        show: bool,
        every_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters, self._total, self._done, self._every_s, self._clock = counters, total, done, every_s, clock
        self._start = clock()
        self._shown = float("-inf")
        self._bar = ProgressBar(label=label, total=total, initial=done, unit="row") if show else None

    def add(self, written: Written) -> None:
        """Count an answer."""
        add = self._counters.add
        add("rows")
        add("tokens", amount=written.written_tokens)
        add(written.finish)
        if written.cost:
            add("cost", amount=round(written.cost * _COST_UNITS))
        if self._bar is not None and self._clock() - self._shown >= self._every_s:
            self._show()

    def close(self) -> None:
        """Show the last state."""
        if self._bar is not None:
            self._show()
            self._bar.close()

    def figures(self) -> dict[str, str]:
        """Name -> text, of all ranks."""
        get = self._counters.get
        rows, seconds = get("rows"), max(self._clock() - self._start, 1e-9)
        found = {"tokens/s": f"{get('tokens') / seconds:.1f}"}
        if rows:
            found["whole"] = f"{get('stop') / rows:.0%}"
        if get("failed"):
            found["failed"] = str(get("failed"))
        if get("cost"):
            found["cost"] = f"{get('cost') / _COST_UNITS:.4f}"
        return found

    def _show(self) -> None:
        assert self._bar is not None
        self._shown = self._clock()
        self._bar.advance(to=min(self._done + self._counters.get("rows"), self._total), figures=self.figures())
