"""A disk that fills up during a run: one message, status 2, the last good checkpoint, and a way to go on."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_server import LIMIT
from tiny_run import settings
from whole_jobs import Job, complete_steps


def recipe(assets: Path, run_dir: Path) -> dict[str, Any]:
    return settings(assets, run_dir, checkpoint__every_steps=2, eval__max_rows=2, log__tensorboard=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run folder whose checkpoints lie on a file system of 3 MiB."""
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield tmp_path / "run"
    subprocess.run(["umount", "-l", str(folder)], check=True)


def refused(job: Job, *, step: int) -> None:
    """Both ranks end with status 2 and one message, without a traceback."""
    statuses = job.wait()
    text = job.text()
    assert statuses == [2, 2], text
    assert "Traceback" not in text
    messages = [line for line in text.splitlines() if line.startswith("train.py")]
    assert len(messages) == 1, text
    assert f"the checkpoint of step {step} could not be written to" in messages[0]
    assert "bytes are free" in messages[0] and "make room or lower checkpoint.keep" in messages[0]


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(small_disk, tiny_assets, job_server, tmp_path):
    tree = recipe(tiny_assets, small_disk)
    refused(job_server.start(tree, folder=tmp_path / "job"), step=4)
    assert sorted(path.name for path in (small_disk / "checkpoints").iterdir()) == ["step_00000002"]
    assert complete_steps(small_disk) == [2]
    assert not (small_disk / "DONE").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk / "checkpoints")], check=True)
    job = job_server.start(tree, folder=tmp_path / "job")
    assert job.wait() == [0, 0], job.text()
    assert "resumed at step 2 " in job.text()
    assert not list((small_disk / "checkpoints").rglob("*.py")), "DeepSpeed's script is one more write that can fail"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "point"),
    [
        (0, "mid_shard"),
        (1, "mid_shard"),
        (1, "before_manifest"),
        ("*", "before_marker"),
    ],
)
def test_a_disk_that_is_full_for_one_rank_only_stops_both(tiny_assets, job_server, tmp_path, rank, point):
    run_dir = tmp_path / "run"
    fault = f"save:{point}:rank{rank}:step4:enospc"
    refused(job_server.start(recipe(tiny_assets, run_dir), folder=tmp_path / "job", LARGEKD_TEST_FAULT=fault), step=4)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000002"]


def test_a_shard_that_does_not_fit_on_one_rank_stops_both(tiny_assets, job_server, tmp_path):
    """Rank 1 meets its quota inside DeepSpeed's save, between the barriers that rank 0 waits in."""
    run_dir = tmp_path / "run"
    limit = {1: {LIMIT: "300000"}}
    job = job_server.start(recipe(tiny_assets, run_dir), folder=tmp_path / "job", of_rank=limit)
    refused(job, step=2)
    assert list((run_dir / "checkpoints").iterdir()) == []
