"""Runs against launch/serve_teacher.py: the same losses as with the teacher beside the student, whatever befalls it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_run import distil, free_port, metrics, settings
from whole_jobs import Job, JobServer, complete_steps, steps_done, until

EXACT = ("loss", "tokens", "optim/grad_norm", "health/kl_t1")
TOKEN = "correct-horse-battery-staple-42"
STEPS = 60


def remote(assets: Path, run_dir: Path, *, port: int, **changes: Any) -> dict[str, Any]:
    """A tiny run whose teacher is behind `port`."""
    teacher = {"kind": "remote", "model": str(assets / "teacher"), "servers": [f"http://127.0.0.1:{port}"]}
    teacher |= {"retries": 1, "timeout_s": 20.0} | changes.pop("teacher", {})
    return settings(assets, run_dir, teacher=teacher, **changes)


@contextmanager
def served(
    job_server: JobServer, assets: Path, folder: Path, *, port: int, ranks: int = 1, **environment: str
) -> Iterator[Job]:
    """A server that answers, started with the recipe of a run whose teacher is online."""
    overrides = ["--port", str(port)]
    if environment:
        overrides += ["--token-variable", next(iter(environment))]
    tree = settings(assets, folder / "unused")
    job = job_server.start(tree, folder=folder, ranks=ranks, overrides=overrides, script="serve_teacher", **environment)
    try:
        until(lambda: "serving " in job.text() or ended(job), timeout_s=90, what="the server does not start")
        assert "serving " in job.text(), job.text()
        yield job
    finally:
        job.kill()


def ended(job: Job) -> bool:
    return job.server.wait(job.ranks[0].pid, timeout_s=0) is not None


def until_waiting(run_dir: Path, job: Job) -> None:
    """Until a rank of the run says that it waits for its teacher."""
    heart = run_dir / "heartbeats/rank_00000.json"
    until(lambda: "waiting for the teacher" in heart.read_text(), timeout_s=30, what=job.text())


def same_records(run_dir: Path, straight: Path) -> None:
    for mine, theirs in zip(metrics(run_dir), metrics(straight), strict=True):
        assert {name: mine[name] for name in EXACT} == {name: theirs[name] for name in EXACT}


@pytest.fixture(scope="module")
def straight(tiny_assets, two_ranks, tmp_path_factory) -> Path:
    """The same run with an online teacher."""
    run_dir = tmp_path_factory.mktemp("online") / "run"
    two_ranks.run(distil, tree=settings(tiny_assets, run_dir))
    return run_dir


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_losses_equal_those_of_an_online_teacher(tiny_assets, two_ranks, job_server, straight, tmp_path, ranks):
    port = free_port()
    with served(job_server, tiny_assets, tmp_path / "server", port=port, ranks=ranks) as job:
        summary, _ = two_ranks.run(distil, tree=remote(tiny_assets, tmp_path / "run", port=port))
        for rank in job.ranks:
            os.kill(rank.pid, signal.SIGTERM)
        assert job.wait(timeout_s=30) == [0] * ranks, job.text()
    same_records(tmp_path / "run", straight)
    assert summary["eval"]["teacher"]["perplexity"] > 1


@pytest.fixture(scope="module")
def long_straight(tiny_assets, two_ranks, tmp_path_factory) -> Path:
    """A longer run with an online teacher."""
    run_dir = tmp_path_factory.mktemp("online") / "long"
    two_ranks.run(distil, tree=settings(tiny_assets, run_dir, train__max_steps=STEPS, eval__max_rows=2))
    return run_dir


@pytest.mark.slow
def test_a_server_that_dies_pauses_the_run_and_nothing_is_lost(tiny_assets, job_server, long_straight, tmp_path):
    """It is killed; the waiting run is told to stop, and saves; resumed, it loses the server again and gets it back."""
    port, run_dir = free_port(), tmp_path / "run"
    tree = remote(tiny_assets, run_dir, port=port, train__max_steps=STEPS, eval__max_rows=2)
    with served(job_server, tiny_assets, tmp_path / "server-1", port=port) as server:
        job = job_server.start(tree, folder=tmp_path / "job-1")
        until(lambda: steps_done(run_dir) >= 2, timeout_s=60, what=job.text())
        server.kill()
        until_waiting(run_dir, job)
        os.kill(job.ranks[1].pid, signal.SIGTERM)
        assert job.wait(timeout_s=30) == [0, 0], job.text()
    stopped = steps_done(run_dir)
    assert complete_steps(run_dir) == [stopped] and stopped < STEPS
    with served(job_server, tiny_assets, tmp_path / "server-2", port=port) as server:
        job = job_server.start(tree, folder=tmp_path / "job-2")
        until(lambda: steps_done(run_dir) > stopped + 2, timeout_s=60, what=job.text())
        server.kill()
        until_waiting(run_dir, job)
    assert steps_done(run_dir) < STEPS
    with served(job_server, tiny_assets, tmp_path / "server-3", port=port):
        assert job.wait(timeout_s=60) == [0, 0], job.text()
    assert "the teacher's servers answer again" in job.text()
    same_records(run_dir, long_straight)


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_run_with_everything_saved(tiny_assets, job_server, tmp_path):
    port, run_dir = free_port(), tmp_path / "run"
    tree = remote(tiny_assets, run_dir, port=port, train__max_steps=STEPS, teacher={"wait_s": 2.0}, eval__max_rows=2)
    with served(job_server, tiny_assets, tmp_path / "server", port=port) as server:
        job = job_server.start(tree, folder=tmp_path / "job")
        until(lambda: steps_done(run_dir) >= 2, timeout_s=60, what=job.text())
        server.kill()
        assert job.wait(timeout_s=60) == [2, 2], job.text()
    assert complete_steps(run_dir) == [steps_done(run_dir)]
    assert "teacher.wait_s = 2 s" in job.text() and "Traceback" not in job.text()


@pytest.mark.slow
def test_a_server_that_refuses_in_mid_run_ends_it_with_everything_saved(tiny_assets, job_server, tmp_path):
    port, run_dir = free_port(), tmp_path / "run"
    teacher = {"token_variable": "TEST_TEACHER_TOKEN"}
    tree = remote(tiny_assets, run_dir, port=port, train__max_steps=STEPS, teacher=teacher, eval__max_rows=2)
    with served(job_server, tiny_assets, tmp_path / "server-1", port=port, TEST_TEACHER_TOKEN=TOKEN) as server:
        job = job_server.start(tree, folder=tmp_path / "job", TEST_TEACHER_TOKEN=TOKEN)
        until(lambda: steps_done(run_dir) >= 2, timeout_s=60, what=job.text())
        server.kill()
    with served(job_server, tiny_assets, tmp_path / "server-2", port=port, TEST_TEACHER_TOKEN="other-" + TOKEN):
        assert job.wait(timeout_s=60) == [2, 2], job.text()
    assert complete_steps(run_dir) == [steps_done(run_dir)] and steps_done(run_dir) < STEPS
    assert "401" in job.text() and "Traceback" not in job.text()


def test_a_wrong_token_is_refused_before_the_first_step_and_no_token_is_written(tiny_assets, job_server, tmp_path):
    port, run_dir = free_port(), tmp_path / "run"
    tree = remote(tiny_assets, run_dir, port=port, teacher={"token_variable": "TEST_TEACHER_TOKEN"})
    with served(job_server, tiny_assets, tmp_path / "server", port=port, TEST_TEACHER_TOKEN=TOKEN) as server:
        job = job_server.start(tree, folder=tmp_path / "job", TEST_TEACHER_TOKEN="wrong-" + TOKEN)
        assert job.wait(timeout_s=60) == [2, 2], job.text()
        assert not ended(server)
    assert "401" in job.text() and "teacher.token_variable" in job.text() and "Traceback" not in job.text()
    assert steps_done(run_dir) == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert written == []


@pytest.mark.slow
@pytest.mark.parametrize("kept", [{"kind": "top_k", "k": 12}, {"kind": "sampled", "draws": 5}])
def test_sparse_signals_equal_those_of_an_online_teacher(tiny_assets, two_ranks, job_server, tmp_path, kept):
    port, changes = free_port(), {"objective": {"alpha": 1.0, "signal": kept}, "train__max_steps": 3}
    two_ranks.run(distil, tree=settings(tiny_assets, tmp_path / "online", **changes))
    with served(job_server, tiny_assets, tmp_path / "server", port=port, ranks=2):
        two_ranks.run(distil, tree=remote(tiny_assets, tmp_path / "run", port=port, **changes))
    same_records(tmp_path / "run", tmp_path / "online")
