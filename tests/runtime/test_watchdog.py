"""A hung rank is found, everyone's stacks are written, and the process ends."""

import os
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from forked import run_forked

from largekd.runtime.faults import fault_point
from largekd.runtime.ranks import Ranks, all_sum, current_ranks
from largekd.runtime.watchdog import HUNG_EXIT_STATUS, Watchdog


def _loop(folder: str, silence_s: float, steps: int, pause_s: float = 0.0) -> str:
    """Steps with a collective in each; a fault may stop a rank between two steps."""
    ranks = current_ranks()
    with Watchdog(timeout_s=silence_s, folder=Path(folder), ranks=ranks, grace_s=3) as watchdog:
        for step in range(steps):
            watchdog.beat("data")
            fault_point("step:data", rank=ranks.rank, step=step)
            time.sleep(pause_s)
            watchdog.beat("all_reduce")
            if dist.is_initialized():
                _sum_of_step(step)
    return "finished"


def _sum_of_step(step: int) -> None:
    all_sum(torch.tensor([step]))


def test_a_stopped_peer_is_found_and_named(tmp_path: Path) -> None:
    outcomes = run_forked(
        _loop,
        tmp_path=tmp_path,
        world_size=2,
        environment={"LARGEKD_TEST_FAULT": "step:data:rank1:step5:sigstop"},
        folder=str(tmp_path / "run"),
        silence_s=2.0,
        # Longer than the grace that the woken rank has for its stacks, so that it cannot finish in it.
        steps=1000,
        pause_s=0.05,
    )
    assert outcomes[0].status == HUNG_EXIT_STATUS
    assert outcomes[1].status not in (0, None)
    [line] = [line for line in outcomes[0].stderr.splitlines() if "Furthest behind first" in line]
    assert "rank 0 is silent for 2." in line
    behind = line.split("Furthest behind first: ")[1]
    assert behind.startswith("rank 1 (") and "stopped) last section 'data'" in behind
    own, peer = ((tmp_path / f"run/stacks/rank_0000{rank}.txt").read_text() for rank in (0, 1))
    assert "last section 'all_reduce'" in own and "_sum_of_step" in own
    assert "woken by rank 0: rank 1" in peer and "last section 'data'" in peer
    # Any thread may take a signal that waited for SIGCONT, so the main one may have left the line where it was stopped.
    assert "in _loop" in peer
    assert "_sum_of_step" in outcomes[0].stderr


def test_a_healthy_run_leaves_no_trace(tmp_path: Path) -> None:
    outcomes = run_forked(
        _loop, tmp_path=tmp_path, world_size=2, folder=str(tmp_path / "run"), silence_s=5.0, steps=40, pause_s=0.05
    )
    assert [(outcome.status, outcome.value) for outcome in outcomes] == [(0, "finished")] * 2, outcomes
    assert list((tmp_path / "run/stacks").iterdir()) == []
    assert "silent" not in outcomes[0].stderr


def _long_save(folder: str, allowed_s: float | None) -> str:
    with Watchdog(timeout_s=0.5, folder=Path(folder), ranks=Ranks(), grace_s=0.1) as watchdog:
        watchdog.beat("save", allowed_s=allowed_s)
        time.sleep(1.5)
    return "finished"


def test_a_section_may_be_given_more_time(tmp_path: Path) -> None:
    statuses = [
        run_forked(_long_save, tmp_path=tmp_path, folder=str(tmp_path / "run"), allowed_s=allowed_s)[0].status
        for allowed_s in (None, 5.0)
    ]
    assert statuses == [HUNG_EXIT_STATUS, 0]


def _lose_the_peer(folder: str) -> list[str]:
    """Rank 1 dies; rank 0 reports what gloo raised, and lives on."""
    ranks = current_ranks()
    with Watchdog(timeout_s=30, folder=Path(folder), ranks=ranks, grace_s=1) as watchdog:
        all_sum(torch.ones(1))
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        watchdog.beat("forward")
        try:
            all_sum(torch.ones(1))
        except RuntimeError as error:
            watchdog.report_failure(error)
            return ["reported", watchdog.describe_ranks()]
    return ["nothing happened"]


def test_a_lost_peer_is_reported(tmp_path: Path) -> None:
    outcome, lost = run_forked(_lose_the_peer, tmp_path=tmp_path, world_size=2, folder=str(tmp_path / "run"))
    assert lost.status == -signal.SIGKILL
    said, ranks = outcome.value
    assert said == "reported" and ranks.startswith("Furthest behind first: rank 1 (") and "gone)" in ranks
    stacks = (tmp_path / "run/stacks/rank_00000.txt").read_text()
    assert "RuntimeError on rank 0" in stacks and "last section 'forward'" in stacks and "_lose_the_peer" in stacks


def test_the_thread_and_the_signal_end_with_the_context(tmp_path: Path) -> None:
    with Watchdog(timeout_s=30, folder=tmp_path, ranks=Ranks()):
        assert any(thread.name == "largekd-watchdog" for thread in threading.enumerate())
    assert not any(thread.name == "largekd-watchdog" for thread in threading.enumerate())
    os.kill(os.getpid(), signal.SIGUSR1)
