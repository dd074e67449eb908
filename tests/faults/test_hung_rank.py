"""A rank that stops answering is found within the time-out, with everybody's stacks and the section it was in."""

import os
import re
import signal
import time

import pytest
from tiny_run import settings
from whole_jobs import steps_done, until


@pytest.mark.parametrize(("timeout_s", "limit_s"), [(8, 30), pytest.param(20, 60, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_found_and_named(tiny_assets, job_server, tmp_path, timeout_s, limit_s):
    run_dir = tmp_path / "run"
    tree = settings(
        tiny_assets, run_dir, train__max_steps=5000, train__collective_timeout_s=timeout_s, eval__max_rows=2
    )
    job = job_server.start(tree, folder=tmp_path / "job")
    until(lambda: steps_done(run_dir) >= 3, timeout_s=60, what=job.text())
    os.kill(job.ranks[1].pid, signal.SIGSTOP)
    started_s = time.monotonic()
    statuses = job.wait(timeout_s=limit_s)
    took_s = time.monotonic() - started_s
    print(f"found after {took_s:.1f} s")
    text = job.text()
    assert None not in statuses and 0 not in statuses, text
    assert timeout_s * 0.5 < took_s <= limit_s
    assert re.search(r"Furthest behind first: rank 1 \(.*stopped\) last section '(data|step \d+)'", text), text
    for rank in (0, 1):
        stacks = (run_dir / f"stacks/rank_{rank:05d}.txt").read_text()
        assert "last section" in stacks and "run_steps" in stacks, stacks
    assert not (run_dir / "DONE").exists()
