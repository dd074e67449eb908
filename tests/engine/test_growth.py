"""A run keeps the tensors and the memory it had after its first steps: the whole loop, on two ranks."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import settings

# By then the optimizer's state, DeepSpeed's traces and every kind of record exist.
SETTLED_STEP = 10
MOST_GROWTH_MB_PER_STEP = 0.5


def live_tensors() -> int:
    """Tensors that Python can reach in this process; garbage is collected first."""
    gc.collect()
    # type() and not isinstance(): a proxy's __class__ may do anything.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_mb() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def slope_per_step(values: list[float]) -> float:
    """Least-squares slope of equally spaced values."""
    return float(np.polyfit(np.arange(len(values)), values, deg=1)[0])


def watched_run(*, tree: dict[str, Any], every: int) -> dict[str, Any]:
    """For a rank pool: a whole run; resident MB after each step, live tensors after every `every`-th."""
    import largekd
    import largekd.distillation.loop as loop

    train_step, tensors, resident = loop.train_step, {}, []

    def watched(*arguments: Any, **options: Any) -> Any:
        result = train_step(*arguments, **options)
        resident.append(resident_mb())
        if len(resident) % every == 0:
            tensors[len(resident)] = live_tensors()
        return result

    loop.train_step = watched  # type: ignore[assignment]
    try:
        largekd.distill(tree)
    finally:
        loop.train_step = train_step
    return {"tensors": tensors, "resident_mb": resident}


def run_settings(assets: Path, folder: Path, *, steps: int, rows: int) -> dict[str, Any]:
    """Records and health figures every few steps, an evaluation now and then."""
    return settings(
        assets,
        folder,
        train__max_steps=steps,
        train__global_batch_size=rows,
        eval__every_steps=25,
        log__every_steps=5,
        log__health_every_steps=10,
    )


def assert_no_tensor_is_kept(report: dict[str, Any], *, steps: int) -> None:
    assert len(report["resident_mb"]) == steps
    # Towards the end the loader has nothing left to read ahead, and its tensors go.
    counts = {step: count for step, count in report["tensors"].items() if SETTLED_STEP <= step <= steps - 10}
    assert len(counts) >= 5
    assert len(set(counts.values())) == 1, f"live tensors by step: {counts}"


def test_the_number_of_live_tensors_stays(two_ranks, tiny_assets, tmp_path):
    tree = run_settings(tiny_assets, tmp_path / "run", steps=60, rows=4)
    for report in two_ranks.run(watched_run, tree=tree, every=10):
        assert_no_tensor_is_kept(report, steps=60)


@pytest.mark.slow
def test_memory_stays_over_hundreds_of_steps(two_ranks, tiny_assets, tmp_path):
    tree = run_settings(tiny_assets, tmp_path / "run", steps=400, rows=8)
    for report in two_ranks.run(watched_run, tree=tree, every=20):
        assert_no_tensor_is_kept(report, steps=400)
        slope = slope_per_step(report["resident_mb"][100:300])
        assert slope <= MOST_GROWTH_MB_PER_STEP, f"{slope:.2f} MB per step over steps 100 to 300"


def test_a_kept_tensor_is_counted():
    before = live_tensors()
    kept = [torch.zeros(1) for _ in range(3)]
    assert live_tensors() == before + 3
    del kept
    assert live_tensors() == before


def test_the_slope_of_a_leak_is_its_size():
    assert slope_per_step([500 + 2 * step + (step % 3) for step in range(200)]) == pytest.approx(2, abs=0.01)
