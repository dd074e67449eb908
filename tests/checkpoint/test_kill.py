"""A run that is killed at any moment resumes from a whole checkpoint and loses at most one interval."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from forked import run_forked, start_forked
from savers import Job, run_job

from largekd.checkpoint.commit import STEP_FOLDER
from largekd.runtime.ranks import Ranks

POINTS = ("before_shard", "mid_shard", "after_shard", "before_manifest", "before_rename", "before_marker")


def _killed(rank: int, point: str, *, step: int, tmp_path: Path, steps: list[int]) -> list[int | None]:
    """Exit statuses of a two-rank job of which one rank kills itself."""
    outcomes = run_forked(
        run_job,
        tmp_path=tmp_path,
        world_size=2,
        environment={"LARGEKD_TEST_FAULT": f"save:{point}:rank{rank}:step{step}:sigkill"},
        folder=str(tmp_path / "checkpoints"),
        steps=steps,
    )
    return [outcome.status for outcome in outcomes]


def _resumed(tmp_path: Path, *, steps: list[int]) -> list[int]:
    outcomes = run_forked(run_job, tmp_path=tmp_path, world_size=2, folder=str(tmp_path / "checkpoints"), steps=steps)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    return [outcome.value for outcome in outcomes]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_inside_a_save_costs_that_save(rank: int, point: str, tmp_path: Path) -> None:
    statuses = _killed(rank, point, step=4, tmp_path=tmp_path, steps=[2, 4])
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] not in (0, None), "the survivor neither hangs nor reports success"
    assert _resumed(tmp_path, steps=[2, 4]) == [2, 2]
    assert _resumed(tmp_path, steps=[]) == [4, 4]
    assert all(STEP_FOLDER.fullmatch(name) for name in os.listdir(tmp_path / "checkpoints"))


def test_a_kill_after_the_commit_costs_nothing(tmp_path: Path) -> None:
    assert _killed(0, "after_commit", step=4, tmp_path=tmp_path, steps=[2, 4])[0] == -signal.SIGKILL
    assert _resumed(tmp_path, steps=[]) == [4, 4]


@pytest.mark.parametrize(("point", "expected"), [("before_rename", 0), ("before_marker", 2)])
def test_a_kill_inside_the_first_save_does_not_block_the_next_start(point: str, expected: int, tmp_path: Path) -> None:
    _killed(0, point, step=2, tmp_path=tmp_path, steps=[2])
    assert _resumed(tmp_path, steps=[]) == [expected] * 2


def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    draw = random.Random(5)
    folder = tmp_path / "checkpoints"
    newest, moved = 0, 0
    for trial in range(20):
        ranks = start_forked(run_job, tmp_path=tmp_path, folder=str(folder), steps=list(range(1, 100_000)))
        deadline_s = time.monotonic() + 30
        # The clock starts with its first commit, else most kills would hit the start of the process.
        while not _committed_beyond(folder, step=newest) and time.monotonic() < deadline_s:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        assert ranks[0].process.is_alive(), ranks[0].outcome(timeout_s=1).error
        os.kill(ranks[0].process.pid or 0, signal.SIGKILL)
        ranks[0].process.join()
        visible = [int(name[5:]) for name in os.listdir(folder) if STEP_FOLDER.fullmatch(name)]
        step = Job(folder, ranks=Ranks()).resume()
        assert max(visible, default=0) - 1 <= step, (trial, visible, step)
        assert step >= newest, (trial, newest, step)
        moved += step > newest
        newest = step
    assert moved == 20


def _committed_beyond(folder: Path, *, step: int) -> bool:
    return any(int(path.parent.name.removeprefix("step_")) > step for path in folder.glob("step_*/COMPLETE"))
