"""Figures of a window of steps, from sums and counts that are known."""

import math
from typing import Any

import pytest
import torch

from largekd.config.objective import ObjectiveConfig
from largekd.contracts import HEALTH_NAMES, SignalRequest
from largekd.distillation.step import StepResult, StepScales, StepSetting
from largekd.distillation.window import Window
from largekd.engine.train import StepOutcome
from largekd.monitoring.meters import Meters
from largekd.monitoring.timers import Timers
from largekd.objectives.alignment import AlignmentPlan
from largekd.objectives.terms import build_objective

OBJECTIVE = build_objective(
    ObjectiveConfig.model_validate(
        {"alpha": 0.5, "features": [{"name": "hidden"}], "attention": [{"name": "maps", "weight": 0.25}]}
    )
)
NAMES = ("cross_entropy", "forward_kl", "hidden", "maps")


@pytest.fixture
def window() -> Window:
    return Window(meters=Meters(device=torch.device("cpu")), objective=OBJECTIVE)


def add(
    window: Window,
    *,
    sums: list[float],
    counts: list[float],
    factors: tuple[float, ...] = (0.5, 0.5, 1.0, 0.25),
    applied: bool = True,
    world_size: int = 1,
    seconds: float = 1.0,
    **extras: torch.Tensor,
) -> None:
    scales = StepScales(
        per_term=torch.ones(4),
        counts=torch.tensor(counts, dtype=torch.float64),
        label_tokens=torch.tensor(counts[0]),
        signal_tokens=torch.tensor(counts[1], dtype=torch.float64),
        stop_votes=torch.tensor(0.0),
        world_size=world_size,
    )
    result = StepResult(
        outcome=StepOutcome(applied=applied, grad_norm=1.0), losses=(), sums=torch.tensor(sums), extras=extras
    )
    setting = StepSetting(
        factors=factors, temperature=1.0, tempered=False, plan=AlignmentPlan(), request=SignalRequest("full")
    )
    window.add(result=result, scales=scales, setting=setting, tokens=int(counts[0]), seconds=seconds)


def flush(window: Window) -> dict[str, Any]:
    return window.flush(timers=Timers())


def test_each_term_is_the_mean_over_what_it_counts(window):
    add(window, sums=[30.0, 8.0, 60.0, 5.0], counts=[10, 8, 24, 24])
    add(window, sums=[60.0, 2.0, 12.0, 7.0], counts=[20, 2, 24, 24], seconds=3.0)
    values = flush(window)
    assert values["kd/cross_entropy"] == pytest.approx(90 / 30)
    assert values["kd/forward_kl"] == pytest.approx(10 / 10)
    assert values["align/hidden"] == pytest.approx(72 / 48)
    assert values["align/maps"] == pytest.approx(12 / 48)
    assert values["align_weighted/maps"] == pytest.approx(0.25 * 12 / 48)
    assert values["loss"] == pytest.approx(0.5 * 3 + 0.5 * 1 + 1.5 + 0.25 * 0.25)
    assert values["perf/step_s"] == 2.0 and values["perf/tokens_per_s"] == 30 / 4


def test_the_weighted_figure_follows_the_factors_of_each_step(window):
    add(window, sums=[10.0, 10.0, 10.0, 10.0], counts=[10] * 4, factors=(1.0, 0.0, 2.0, 0.0))
    add(window, sums=[30.0, 30.0, 30.0, 30.0], counts=[10] * 4, factors=(0.0, 1.0, 0.0, 2.0))
    values = flush(window)
    assert [values[f"kd_weighted/{name}"] for name in NAMES[:2]] == [0.5, 1.5]
    assert [values[f"align_weighted/{name}"] for name in NAMES[2:]] == [1.0, 3.0]
    assert values["align/hidden"] == 2.0


def test_a_skipped_step_counts_in_time_alone(window):
    add(window, sums=[math.nan] * 4, counts=[10] * 4, applied=False, seconds=1.0)
    add(window, sums=[10.0, 20.0, 30.0, 40.0], counts=[10] * 4, seconds=1.0)
    values = flush(window)
    assert [values["kd/cross_entropy"], values["align/maps"]] == [1.0, 4.0]
    assert values["perf/tokens_per_s"] == 5.0 and values["perf/step_s"] == 1.0


def test_a_window_of_skipped_steps_has_no_loss(window):
    add(window, sums=[math.nan] * 4, counts=[10] * 4, applied=False)
    values = flush(window)
    for name in ("loss", "kd/cross_entropy", "align/hidden", "align_weighted/maps"):
        assert math.isnan(values[name]), name


def test_a_term_without_anything_counted_has_no_mean_and_no_part_in_the_loss(window):
    add(window, sums=[10.0, 0.0, 10.0, 10.0], counts=[10, 0, 10, 10])
    values = flush(window)
    assert math.isnan(values["kd/forward_kl"]) and math.isnan(values["kd_weighted/forward_kl"])
    assert values["loss"] == pytest.approx(0.5 + 1.0 + 0.25)


def test_gradient_norms_add_squares_and_undo_the_ranks_factor(window):
    # Scales are multiplied by the number of ranks, because DeepSpeed averages gradients over them.
    add(window, sums=[1.0] * 4, counts=[1] * 4, world_size=2, squares=torch.tensor([36.0, 32.0, 8.0, 0.0]))
    add(window, sums=[1.0] * 4, counts=[1] * 4, world_size=2, squares=torch.tensor([164.0, 0.0, 0.0, 0.0]))
    values = flush(window)  # over steps the mean of squares, whatever the number of steps in a window
    assert [values[f"grad_norm/{name}"] for name in NAMES] == [5.0, 2.0, 1.0, 0.0]


def test_health_and_kept_share(window):
    health = torch.zeros(len(HEALTH_NAMES))
    for name, value in (("token_weight", 10.0), ("ce", 20.0), ("signal_weight", 8.0), ("kl_t1", 4.0)):
        health[HEALTH_NAMES.index(name)] = value
    add(window, sums=[1.0] * 4, counts=[10, 8, 1, 1], health=health, kept=torch.tensor([2.0]))
    values = flush(window)
    assert values["health/kl_t1"] == 0.5 and values["kd/kept_frac"] == 0.25


def test_a_flush_starts_anew(window):
    add(window, sums=[10.0] * 4, counts=[10] * 4, squares=torch.ones(4))
    flush(window)
    add(window, sums=[30.0] * 4, counts=[10] * 4)
    values = flush(window)
    assert values["align/hidden"] == 3.0 and not any(name.startswith("grad_norm/") for name in values)
