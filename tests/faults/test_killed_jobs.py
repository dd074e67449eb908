"""A job that is killed at any moment goes on from its newest complete checkpoint and ends as if nothing had been."""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pool_jobs
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import metrics, settings
from whole_jobs import JobServer, complete_steps, until

EXACT = ("loss", "tokens", "optim/grad_norm", "optim/lr/default")
POINTS = ("before_shard", "mid_shard", "after_shard", "before_manifest", "before_rename", "before_marker")
DEFAULT = {(0, "before_marker")}


def recipe(assets: Path, run_dir: Path, *, steps: int, every: int) -> dict[str, Any]:
    return settings(
        assets, run_dir, train__max_steps=steps, checkpoint__every_steps=every, eval__max_rows=2, log__tensorboard=False
    )


@pytest.fixture(scope="module")
def straight(tiny_assets, two_ranks, tmp_path_factory):
    """`straight(steps)`: the folder of the run of that length that nobody kills."""
    made: dict[int, Path] = {}

    def of_length(steps: int) -> Path:
        if steps not in made:
            made[steps] = tmp_path_factory.mktemp("straight") / "run"
            answers = two_ranks.run(pool_jobs.attempt, tree=recipe(tiny_assets, made[steps], steps=steps, every=0))
            assert answers[0]["summary"]["steps"] == steps
        return made[steps]

    return of_length


def equal_ends(run_dir: Path, straight: Path) -> None:
    for mine, theirs in zip(metrics(run_dir), metrics(straight), strict=True):
        assert {name: mine[name] for name in EXACT} == {name: theirs[name] for name in EXACT}
    weights, expected = (load_file(folder / "export/model.safetensors") for folder in (run_dir, straight))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def finished(server: JobServer, tree: dict[str, Any], *, folder: Path) -> str:
    """Run to the end; what the ranks printed."""
    job = server.start(tree, folder=folder)
    statuses = job.wait()
    assert statuses == [0, 0], job.text()
    return job.text()


@pytest.mark.parametrize(
    ("rank", "point"),
    [
        pytest.param(rank, point, marks=[] if (rank, point) in DEFAULT else pytest.mark.slow)
        for rank in (0, 1)
        for point in POINTS
    ],
)
def test_a_rank_killed_inside_the_save_costs_one_interval(straight, tiny_assets, job_server, tmp_path, rank, point):
    run_dir = tmp_path / "run"
    tree = recipe(tiny_assets, run_dir, steps=6, every=2)
    fault = f"save:{point}:rank{rank}:step4:sigkill"
    job = job_server.start(tree, folder=tmp_path / "job", LARGEKD_TEST_FAULT=fault)
    statuses = job.wait()
    assert statuses[rank] == -signal.SIGKILL, job.text()
    assert statuses[1 - rank] not in (0, None), "the survivor neither hangs nor reports success"
    assert complete_steps(run_dir) == [2]
    assert not (run_dir / "DONE").exists()
    assert "resumed at step 2 " in finished(job_server, tree, folder=tmp_path / "job")
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    equal_ends(run_dir, straight(6))


def committed_beyond(run_dir: Path, *, step: int) -> bool:
    return max(complete_steps(run_dir), default=0) > step


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_at_random_moments(straight, tiny_assets, job_server, tmp_path, kills):
    """A job that saves at every step is killed again and again; every start goes on where the newest marker is."""
    draw, run_dir, steps = random.Random(kills), tmp_path / "run", 4 + 5 * kills
    tree = recipe(tiny_assets, run_dir, steps=steps, every=1)
    newest = 0
    for kill in range(kills):
        job = job_server.start(tree, folder=tmp_path / "job")
        until(partial(committed_beyond, run_dir, step=newest), timeout_s=60, what=job.text()[-2000:])
        # Up to the second save from here, wherever in it.
        time.sleep(draw.uniform(0, 1.0))
        for rank in draw.sample(job.ranks, 2):
            os.kill(rank.pid, signal.SIGKILL)
        assert job.wait() == [-signal.SIGKILL, -signal.SIGKILL], (kill, job.text())
        text = job.text()
        assert kill == 0 or f"resumed at step {newest} " in text, (kill, newest, text)
        newest = max(complete_steps(run_dir))
    assert f"resumed at step {newest} " in finished(job_server, tree, folder=tmp_path / "job")
    equal_ends(run_dir, straight(steps))
