"""What has been summed since the last record, and the figures that it makes."""

import math
from collections.abc import Mapping

from torch import Tensor

from largekd.contracts import HEALTH_NAMES
from largekd.distillation.step import StepResult, StepScales, StepSetting
from largekd.monitoring.health import health_figures
from largekd.monitoring.meters import Meters
from largekd.monitoring.timers import Timers
from largekd.objectives.terms import Objective
from largekd.runtime.ranks import all_sum


class Window:
    """The steps between two records. Every rank adds the same steps."""

    def __init__(self, *, meters: Meters, objective: Objective) -> None:
        self._meters = meters
        self._objective = objective
        self._clear()

    def _clear(self) -> None:
        self._steps, self._tokens, self._seconds, self._applied = 0, 0, 0.0, 0
        self._counts: Tensor | None = None
        self._signal_tokens: Tensor | None = None
        self._kinds: dict[str, int] = {}

    def add(self, *, result: StepResult, scales: StepScales, setting: StepSetting, tokens: int, seconds: float) -> None:
        """Add a step: this rank's sums, and the counts over all ranks that they will be divided by.

        A skipped step counts only in time: its sums are not finite.
        """
        self._steps += 1
        self._seconds += seconds
        if not result.outcome.applied:
            return
        names = [summand.name for summand in self._objective.summands]
        factors = result.sums.new_tensor(setting.factors)
        self._meters.add_sums([f"sum/{name}" for name in names], sums_M=result.sums)
        self._meters.add_sums([f"weighted/{name}" for name in names], sums_M=result.sums * factors)
        for kind, labels in (("health", HEALTH_NAMES), ("squares", names), ("kept", ("tokens",))):
            if kind in result.extras:
                found = result.extras[kind] / (scales.world_size**2 if kind == "squares" else 1)
                self._meters.add_sums([f"{kind}/{label}" for label in labels], sums_M=found)
                self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._counts = scales.counts if self._counts is None else self._counts + scales.counts
        before, now = self._signal_tokens, scales.signal_tokens
        self._signal_tokens = now if before is None else before + now
        self._tokens += tokens
        self._applied += 1

    def flush(self, *, timers: Timers) -> dict[str, float]:
        """The window's figures over all ranks, each term's mean over what it counts. A collective call."""
        sums = self._meters.flush(reduce=all_sum)
        counts = [0.0] * len(self._objective.summands) if self._counts is None else self._counts.tolist()
        values: dict[str, float] = {"loss": 0.0 if self._tokens else math.nan}
        for summand, count in zip(self._objective.summands, counts, strict=True):
            area, name = summand.metric.split("/", 1)
            # Without anything counted there is no loss to speak of.
            mean, weighted = (sums[f"{kind}/{name}"] / count if count else math.nan for kind in ("sum", "weighted"))
            values[f"{area}/{name}"], values[f"{area}_weighted/{name}"] = mean, weighted
            values["loss"] += weighted if count else 0.0
        values |= self._extras(sums)
        values |= timers.per_step(steps=self._steps)
        values["perf/step_s"] = self._seconds / self._steps
        values["perf/tokens_per_s"] = self._tokens / self._seconds
        self._clear()
        return values

    def _extras(self, sums: Mapping[str, float]) -> dict[str, float]:
        values: dict[str, float] = {}
        if "health" in self._kinds:
            values |= health_figures({name: sums[f"health/{name}"] for name in HEALTH_NAMES})
        if "kept" in self._kinds and self._signal_tokens is not None:
            values["kd/kept_frac"] = sums["kept/tokens"] / (float(self._signal_tokens) or math.nan)
        if "squares" in self._kinds:
            # Ranks and micro-batches hold different activations, whose squares add up; over steps they are averaged.
            for summand in self._objective.summands:
                values[f"grad_norm/{summand.name}"] = math.sqrt(
                    sums[f"squares/{summand.name}"] / self._kinds["squares"]
                )
        return values
