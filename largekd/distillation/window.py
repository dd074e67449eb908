"""What has been summed since the last record, and the figures that it makes."""

import math
from collections.abc import Sequence

from largekd.contracts import HEALTH_NAMES
from largekd.distillation.step import StepResult
from largekd.monitoring.health import health_figures
from largekd.monitoring.meters import Meters
from largekd.monitoring.timers import Timers
from largekd.objectives.terms import VocabularyTerm
from largekd.runtime.ranks import all_sum


class Window:
    """The steps between two records. Every rank adds the same steps."""

    def __init__(self, *, meters: Meters, terms: Sequence[VocabularyTerm]) -> None:
        self._meters = meters
        self._terms = tuple(terms)
        self._clear()

    def _clear(self) -> None:
        self._steps, self._tokens, self._seconds, self._health = 0, 0, 0.0, False

    def add(self, *, result: StepResult, tokens: int, seconds: float) -> None:
        """Add a step: this rank's sums, and the count over all ranks that they will be divided by.

        A skipped step counts only in time: its sums are not finite.
        """
        self._steps += 1
        self._seconds += seconds
        if not result.outcome.applied:
            return
        self._meters.add_sums([f"sum/{term.name}" for term in self._terms], sums_M=result.sums)
        if result.health is not None:
            self._meters.add_sums([f"health/{name}" for name in HEALTH_NAMES], sums_M=result.health)
            self._health = True
        self._tokens += tokens

    def flush(self, *, timers: Timers) -> dict[str, float]:
        """The window's figures over all ranks, per counted token where they are losses. A collective call."""
        sums = self._meters.flush(reduce=all_sum)
        values: dict[str, float] = {"loss": 0.0}
        for term in self._terms:
            # Without a counted token there is no loss to speak of.
            mean = sums[f"sum/{term.name}"] / self._tokens if self._tokens else math.nan
            values["loss"] += term.weight * mean
            values[f"kd/{term.name}"] = mean
            values[f"kd_weighted/{term.name}"] = term.weight * mean
        if self._health:
            values |= health_figures({name: sums[f"health/{name}"] for name in HEALTH_NAMES})
        values |= timers.per_step(steps=self._steps)
        values["perf/step_s"] = self._seconds / self._steps
        values["perf/tokens_per_s"] = self._tokens / self._seconds
        self._clear()
        return values
