"""Curves against their closed forms, exact ends, monotonic between corners, and very short runs."""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from largekd.config.schedule import CurveConfig
from largekd.objectives.schedules import value_at

SHAPES = ("constant", "linear", "cosine", "exponential", "step")
STEPS = 101


def curve(**keys: Any) -> CurveConfig:
    return CurveConfig.model_validate(keys)


def path(value: float | CurveConfig, *, max_steps: int = STEPS) -> list[float]:
    return [value_at(value, step=step, max_steps=max_steps) for step in range(max_steps)]


def test_a_number_is_itself() -> None:
    assert path(0.3, max_steps=3) == [0.3, 0.3, 0.3]


def closed_form(shape: str, a: float, b: float, u: float) -> float:
    return {
        "constant": a,
        "linear": a + (b - a) * u,
        "cosine": b + (a - b) * math.cos(math.pi * u / 2) ** 2,
        "exponential": math.exp(math.log(a) + u * (math.log(b) - math.log(a))),
    }[shape]


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "exponential"])
@pytest.mark.parametrize(("a", "b"), [(0.2, 3.7), (4.0, 0.5), (1.0, 1.0)])
def test_shapes_follow_their_closed_forms(shape: str, a: float, b: float) -> None:
    expected = [closed_form(shape, a, b, step / (STEPS - 1)) for step in range(STEPS)]
    assert path(curve(shape=shape, start=a, end=b)) == pytest.approx(expected, rel=1e-12)


def test_stairs_are_equal_jumps_and_the_last_one_is_the_end() -> None:
    values = path(curve(shape="step", start=4.0, end=1.0, stairs=3), max_steps=9)
    # Boundaries at x = 1/4, 2/4, 3/4; a jump that falls on a step happens at it.
    assert values == pytest.approx([4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0])


def test_a_stair_that_is_due_at_a_step_is_not_late_by_rounding() -> None:
    for stairs in range(1, 30):
        for per_stair in (1, 2, 3, 7):
            values = path(
                curve(shape="step", start=0.0, end=float(stairs), stairs=stairs), max_steps=1 + (stairs + 1) * per_stair
            )
            assert values == pytest.approx([min(step // per_stair, stairs) for step in range(len(values))])


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_and_cool_down_surround_the_shape(shape: str) -> None:
    config = curve(
        shape=shape, start=2.0, end=1.0, warmup_frac=0.2, warmup_from=0.4, cooldown_frac=0.3, cooldown_to=0.1
    )
    values = path(config)
    last = 2.0 if shape == "constant" else 1.0
    assert values[:20] == pytest.approx([0.4 + (2.0 - 0.4) * step / 20 for step in range(20)])
    assert values[20] == 2.0
    assert values[70] == pytest.approx(last)
    assert values[70:] == pytest.approx([last + (0.1 - last) * step / 30 for step in range(31)])
    plain = curve(shape=shape, start=2.0, end=1.0)
    assert values[20:71] == pytest.approx(path(plain, max_steps=51))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("warmup", "cooldown"), itertools.product((0.0, 0.1, 1 / 3), (0.0, 0.07, 2 / 3)))
def test_ends_are_exact_and_nothing_leaves_the_extremes(shape: str, warmup: float, cooldown: float) -> None:
    for max_steps in (2, 3, 7, 50, 333):
        config = curve(
            shape=shape,
            start=0.7,
            end=0.1,
            warmup_frac=warmup,
            warmup_from=0.3,
            cooldown_frac=cooldown,
            cooldown_to=0.9,
        )
        values = path(config, max_steps=max_steps)
        last = 0.9 if cooldown else (0.7 if shape == "constant" else 0.1)
        assert values[0] == (0.3 if warmup else 0.7)
        assert values[-1] == last
        assert value_at(config, step=max_steps + 5, max_steps=max_steps) == last
        low, high = config.extremes
        assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.9), (0.9, 0.1), (1e-3, 10.0), (10.0, 1e-3)])
def test_a_shape_never_turns(shape: str, start: float, end: float) -> None:
    for max_steps in (2, 3, 10, 1000):
        values = path(curve(shape=shape, start=start, end=end), max_steps=max_steps)
        sign = 1 if end > start else -1
        assert all(sign * (after - before) >= -1e-12 for before, after in itertools.pairwise(values))
        if shape not in ("constant", "step"):
            assert len(set(values)) == max_steps


def test_no_end_means_no_change_whatever_the_shape() -> None:
    for shape in SHAPES:
        assert set(path(curve(shape=shape, start=0.1))) == {0.1}


def test_warm_up_and_cool_down_may_meet() -> None:
    values = path(curve(start=1.0, warmup_frac=0.5, cooldown_frac=0.5))
    assert values == pytest.approx([1 - abs(step / 50 - 1) for step in range(STEPS)])
    assert max(values) == values[50] == 1.0


def test_a_run_of_one_step_is_at_the_beginning() -> None:
    for shape in SHAPES:
        assert path(curve(shape=shape, start=2.0, end=1.0), max_steps=1) == [2.0]
    assert path(curve(start=2.0, warmup_frac=0.5, warmup_from=0.25, cooldown_frac=0.5), max_steps=1) == [0.25]


def test_no_torch_is_imported(repository: Path) -> None:
    code = "import sys, largekd.objectives.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, timeout=60, check=False).returncode == 0
