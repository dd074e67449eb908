"""SIGTERM and kill -9, to the command, the launcher and a rank: the run is saved, nobody is left, the rest goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pool_jobs
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import ROOT, deepspeed_command, metrics, settings, write_recipe
from whole_jobs import complete_steps, processes_of, steps_done, until

from largekd.runtime.shutdown import process_lives

EXACT = ("loss", "tokens", "optim/grad_norm", "optim/lr/default")
# Command, launcher and ranks import DeepSpeed one after another, on a machine that may be busy.
STARTED_S = 150


def recipe(assets: Path, run_dir: Path, *, steps: int) -> dict[str, Any]:
    """With a rate that does not depend on the run's length, so that a shorter run is the longer one's beginning."""
    return settings(
        assets,
        run_dir,
        train__max_steps=steps,
        optim__schedule="constant",
        eval__max_rows=2,
        log__tensorboard=False,
    )


@dataclass(frozen=True)
class Launched:
    """`deepspeed launch/train.py` as a user starts it, with its launcher and ranks."""

    command: subprocess.Popen[str]
    output: Path
    run_dir: Path

    def processes(self) -> dict[str, list[psutil.Process]]:
        """`launcher` and `rank`, by what their command lines say."""
        found: dict[str, list[psutil.Process]] = {"launcher": [], "rank": []}
        for process in processes_of(str(self.recipe)):
            with suppress(psutil.Error):
                line = process.cmdline()
                if "deepspeed.launcher.launch" in line:
                    found["launcher"].append(process)
                elif any(word.startswith("--local_rank=") for word in line[:5]):
                    found["rank"].append(process)
        return found

    @property
    def recipe(self) -> Path:
        """The configuration file: its path is in every command line of the job and in no other."""
        return self.run_dir.parent / "recipe.yaml"

    def text(self) -> str:
        return self.output.read_text(errors="replace")


@pytest.fixture
def launched(tiny_assets, tmp_path) -> Iterator[Launched]:
    """A run of two ranks that has done two steps."""
    job_folder, run_dir = tmp_path / "job", tmp_path / "run"
    job_folder.mkdir()
    path = write_recipe(tmp_path / "recipe.yaml", recipe(tiny_assets, run_dir, steps=5000))
    output = job_folder / "output.txt"
    with open(output, "w") as stream:
        command = subprocess.Popen(deepspeed_command(path), stdout=stream, stderr=stream, text=True, cwd=job_folder)
    job = Launched(command=command, output=output, run_dir=run_dir)
    try:
        until(lambda: steps_done(run_dir) >= 2 or command.poll() is not None, timeout_s=STARTED_S, what=job.text())
        assert command.poll() is None, job.text()
        assert [len(job.processes()[kind]) for kind in ("launcher", "rank")] == [1, 2]
        yield job
    finally:
        for process in processes_of(str(path)):
            with suppress(psutil.Error):
                process.kill()
        command.wait(timeout=10)


def gone_within(job: Launched, *, limit_s: float) -> float:
    """Seconds until no process of the job is left, which fails after `limit_s`; the command's own zombie is reaped."""

    def gone() -> bool:
        job.command.poll()
        return not processes_of(str(job.recipe))

    took_s = until(gone, timeout_s=limit_s, what=f"{processes_of(str(job.recipe))} {job.text()[-3000:]}")
    print(f"gone after {took_s:.1f} s")
    return took_s


def saved_once(job: Launched) -> int:
    """The step that the run was saved at when it was told to stop."""
    assert not (job.run_dir / "DONE").exists()
    [step] = complete_steps(job.run_dir)
    assert 2 <= step < 5000 and steps_done(job.run_dir) == step
    assert f"stopped and saved at step {step}; the same command goes on from there." in job.text()
    assert not list((job.run_dir / "checkpoints").glob(".tmp-*"))
    return step


def equal_to_a_straight_run(job: Launched, *, assets: Path, pool: Any, stopped: int) -> None:
    """Resumed for three more steps, the run is the one that was never stopped."""
    tree = recipe(assets, job.run_dir, steps=stopped + 3)
    answers = pool.run(pool_jobs.attempt, tree=tree)
    assert sorted(answers[0]["samples"]) == [stopped + 1, stopped + 2, stopped + 3]
    straight = job.run_dir.parent / "straight"
    pool.run(pool_jobs.attempt, tree=recipe(assets, straight, steps=stopped + 3))
    for mine, theirs in zip(metrics(job.run_dir), metrics(straight), strict=True):
        assert {name: mine[name] for name in EXACT} == {name: theirs[name] for name in EXACT}
    weights, expected = (load_file(folder / "export/model.safetensors") for folder in (job.run_dir, straight))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "target",
    ["command", pytest.param("launcher", marks=pytest.mark.slow), pytest.param("rank", marks=pytest.mark.slow)],
)
def test_sigterm_saves_and_ends_everything(launched, tiny_assets, two_ranks, target):
    ranks = launched.processes()["rank"]
    if target == "command":
        launched.command.terminate()
    else:
        launched.processes()[target][-1].terminate()
    gone_within(launched, limit_s=40)
    text = launched.text()
    if target != "launcher":
        # The launcher tells of a status other than 0, and ends the others.
        assert text.count("exits successfully") == 2, text
    if target == "rank":
        assert launched.command.wait() == 0
    assert "Traceback" not in text and not any(process.is_running() for process in ranks)
    equal_to_a_straight_run(launched, assets=tiny_assets, pool=two_ranks, stopped=saved_once(launched))


@pytest.mark.parametrize("target", ["launcher", pytest.param("command", marks=pytest.mark.slow)])
def test_kill_9_of_what_started_the_ranks_leaves_none(launched, target):
    if target == "command":
        launched.command.kill()
    else:
        launched.processes()["launcher"][0].kill()
    gone_within(launched, limit_s=30)
    saved_once(launched)


@pytest.mark.parametrize("target", ["launcher", "command"])
def test_a_launcher_that_dies_while_the_rank_imports_takes_it_along(tiny_assets, tmp_path, target):
    """The ancestors only look like DeepSpeed's: the rank, real, recognises them by name."""
    starter = "import subprocess, sys\nsys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))\n"
    command, launcher = tmp_path / "bin/deepspeed", tmp_path / "deepspeed/launcher/launch.py"
    for path in (command, launcher):
        path.parent.mkdir(parents=True)
        path.write_text(starter)
    path = write_recipe(tmp_path / "recipe.yaml", recipe(tiny_assets, tmp_path / "run", steps=5000))
    top = subprocess.Popen([sys.executable, command, launcher, ROOT / "launch/train.py", "--config", path])
    try:
        middle = until_child(psutil.Process(top.pid))
        rank = until_child(middle)
        until(lambda: "libtorch" in Path(f"/proc/{rank.pid}/maps").read_text(), timeout_s=60)
        (top if target == "command" else middle).kill()
        until(lambda: not process_lives(rank), timeout_s=30, what="the rank is an orphan")
    finally:
        for process in processes_of(str(path)):
            process.kill()
        top.wait(timeout=10)


def until_child(process: psutil.Process) -> psutil.Process:
    until(lambda: process.children(), timeout_s=30, what=f"no child of {process}")
    return process.children()[0]


def test_sigterm_during_the_evaluation_before_step_1(tiny_assets, job_server, tmp_path):
    """One rank is told; both leave in the middle of an evaluation that would take far longer."""
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text((tiny_assets / "eval.jsonl").read_text() * 400)
    tree = settings(tiny_assets, tmp_path / "run", data__eval={"path": str(evaluation)}, eval__max_rows=None)
    job = job_server.start(tree, folder=tmp_path / "job")
    heart = tmp_path / "run/heartbeats/rank_00001.json"
    until(lambda: heart.exists() and '"evaluation"' in heart.read_text(), timeout_s=60, what=job.text())
    time.sleep(0.5)
    os.kill(job.ranks[1].pid, signal.SIGTERM)
    assert job.wait(timeout_s=30) == [0, 0], job.text()
    assert "stopped before the first step; the same command goes on from there." in job.text()
    assert not (tmp_path / "run/DONE").exists() and complete_steps(tmp_path / "run") == []
    assert steps_done(tmp_path / "run") == 0


@pytest.mark.parametrize(
    "evaluation", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_sigterm_during_an_evaluation_loses_nothing(tiny_assets, two_ranks, tmp_path, evaluation):
    """1: before the first step, 2: between steps, 3: after the last."""
    changes = {"train__max_steps": 4, "eval": {"every_steps": 2, "max_rows": 6}}
    tree = settings(tiny_assets, tmp_path / "run", **changes)
    answers = two_ranks.run(pool_jobs.attempt, tree=tree, stop_in_evaluation=evaluation, stop_rank=1)
    assert [answer["summary"] for answer in answers] == [None, None]
    assert complete_steps(tmp_path / "run") == {1: [], 2: [3], 3: [4]}[evaluation]
    [summary, _] = [answer["summary"] for answer in two_ranks.run(pool_jobs.attempt, tree=tree)]
    expected = two_ranks.run(pool_jobs.attempt, tree=settings(tiny_assets, tmp_path / "straight", **changes))
    assert summary["eval"] == expected[0]["summary"]["eval"]
