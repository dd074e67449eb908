"""Jobs that must not start: one message on stderr, status 2 on every rank, no traceback, and nothing was loaded."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pool_jobs
import pytest
import torch
from tiny_run import ROOT, metrics, settings, write_recipe
from whole_jobs import Job, complete_steps, steps_done, until


def message_of(job: Job, *, ranks: int = 2) -> str:
    """The one message of a refused job."""
    statuses = job.wait(timeout_s=60)
    text = job.text()
    assert statuses == [2] * ranks, text
    assert "Traceback" not in text
    messages = [line for line in text.splitlines() if line.startswith("train.py")]
    assert len(messages) == 1, text
    return text[text.index(messages[0]) :]


@pytest.fixture(scope="module")
def unloadable(tiny_assets, tmp_path_factory) -> Path:
    """Assets whose teacher cannot be loaded: an error that comes first was found before any weight was read."""
    folder = tmp_path_factory.mktemp("unloadable")
    shutil.copytree(tiny_assets, folder / "assets")
    (folder / "assets/teacher/model.safetensors").write_bytes(b"not a tensor file")
    return folder / "assets"


def placement(folder: Path, **extra: Any) -> str:
    path = folder / "placement.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | extra))
    return str(path)


def test_the_unloadable_teacher_is_noticed_when_nothing_else_is_wrong(unloadable, job_server, tmp_path):
    job = job_server.start(settings(unloadable, tmp_path / "run"), folder=tmp_path / "job")
    assert "model.safetensors" in message_of(job)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"elasticity": {"enabled": True}}, ("elasticity", "the number of ranks is fixed at launch")),
        ({"train_micro_batch_size_per_gpu": 4}, ("train_micro_batch_size_per_gpu", "train.micro_batch_size")),
    ],
)
def test_a_placement_file_with_a_key_that_it_may_not_hold(unloadable, job_server, tmp_path, extra, expected):
    tree = settings(unloadable, tmp_path / "run", student__deepspeed=placement(tmp_path, **extra))
    message = message_of(job_server.start(tree, folder=tmp_path / "job"))
    assert "placement.json (named by student.deepspeed)" in message
    assert all(part in message for part in expected), message


def test_an_unknown_key(unloadable, job_server, tmp_path):
    tree = settings(unloadable, tmp_path / "run", train__max_stepz=3)
    message = message_of(job_server.start(tree, folder=tmp_path / "job"))
    assert "train.max_stepz: unknown key; did you mean train.max_steps?" in message


def test_a_run_folder_that_cannot_be_made(unloadable, job_server, tmp_path):
    (tmp_path / "file").write_text("")
    job = job_server.start(settings(unloadable, tmp_path / "file/run"), folder=tmp_path / "job")
    assert f"run.dir={tmp_path / 'file/run'}: cannot be created or written" in message_of(job)


def test_a_master_port_that_somebody_holds(unloadable, job_server, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        job = job_server.start(settings(unloadable, tmp_path / "run"), folder=tmp_path / "job", port=port)
        assert job_server.wait(job.ranks[0].pid, timeout_s=30) == 2, job.text()
        # The launcher ends the others when one rank has failed.
        job.kill()
    text = job.ranks[0].text()
    assert "Traceback" not in text
    assert f"127.0.0.1:{port}" in text and "choose a free one" in text and "--master_port" in text


def test_a_stale_build_lock(unloadable, tmp_path):
    extensions = tmp_path / "torch_extensions"
    shutil.copytree(os.environ["TORCH_EXTENSIONS_DIR"], extensions)
    lock = extensions / "deepspeed_shm_comm/lock"
    lock.touch()
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(unloadable, tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), "--config", str(recipe)],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"stale build lock {lock}" in done.stderr and f"`rm {lock}`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


def test_a_teacher_of_pickles_is_refused(tiny_assets, job_server, tmp_path):
    shutil.copytree(tiny_assets / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher/model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(tmp_path / "code-ran")}, tmp_path / "teacher/pytorch_model.bin")
    tree = settings(tiny_assets, tmp_path / "run", teacher__model=str(tmp_path / "teacher"))
    message = message_of(job_server.start(tree, folder=tmp_path / "job"))
    assert "pytorch_model.bin" in message and "can carry code" in message and "safetensors" in message
    assert not (tmp_path / "code-ran").exists()


@pytest.mark.parametrize("known", [False, True])
def test_code_of_a_model_repository_is_not_run(tiny_assets, job_server, tmp_path, known):
    """A family that transformers does not know is refused; a known one uses transformers' own class."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_assets / "teacher", folder)
    evil = f"import pathlib\npathlib.Path({str(tmp_path / 'code-ran')!r}).touch()\nclass Evil: pass\n"
    (folder / "evil.py").write_text(evil)
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": [None, "evil.Evil"]}
    for name in ("config.json", "tokenizer_config.json"):
        tree = json.loads((folder / name).read_text()) | {"auto_map": names}
        if not known and name == "config.json":
            tree["model_type"] = "evil"
        (folder / name).write_text(json.dumps(tree))
    tree = settings(tiny_assets, tmp_path / "run", teacher__model=str(folder), train__max_steps=1)
    tree["optim"]["warmup_steps"] = 0
    job = job_server.start(tree, folder=tmp_path / "job")
    if known:
        assert job.wait() == [0, 0], job.text()
    else:
        message = message_of(job)
        assert "teacher.model" in message and "trust_remote_code" in message
    assert not (tmp_path / "code-ran").exists()


def test_a_second_run_in_the_same_folder_is_refused(tiny_assets, job_server, tmp_path):
    run_dir = tmp_path / "run"
    tree = settings(tiny_assets, run_dir, train__max_steps=5000, eval__max_rows=2, log__tensorboard=False)
    first = job_server.start(tree, folder=tmp_path / "first")
    until(lambda: steps_done(run_dir) >= 1, timeout_s=60, what=first.text())
    message = message_of(job_server.start(tree, folder=tmp_path / "second"))
    assert f"pid {first.ranks[0].pid}" in message and f"run.dir={run_dir}" in message
    assert "another run" in message
    os.kill(first.ranks[0].pid, signal.SIGTERM)
    assert first.wait(timeout_s=20) == [0, 0], first.text()
    assert complete_steps(run_dir) == [steps_done(run_dir)]


def test_fresh_moves_the_old_run_aside(tiny_assets, two_ranks, tmp_path):
    run_dir = tmp_path / "run"
    two_ranks.run(pool_jobs.attempt, tree=settings(tiny_assets, run_dir, train__max_steps=3))
    old = {path.relative_to(run_dir) for path in run_dir.rglob("*") if not path.name.startswith(".lock")}
    tree = settings(tiny_assets, run_dir, train__max_steps=3, optim__lr=2e-3)
    tree["run"]["fresh"] = True
    answers = two_ranks.run(pool_jobs.attempt, tree=tree)
    assert sorted(answers[0]["samples"]) == [1, 2, 3]
    [aside] = tmp_path.glob("run.before-*")
    assert {path.relative_to(aside) for path in aside.rglob("*")} == old
    assert complete_steps(aside) == complete_steps(run_dir) == [3]


def test_a_longer_length_goes_on_where_the_shorter_run_ended(tiny_assets, two_ranks, tmp_path):
    run_dir = tmp_path / "run"
    two_ranks.run(pool_jobs.attempt, tree=settings(tiny_assets, run_dir, train__max_steps=3))
    before = metrics(run_dir)
    answers = two_ranks.run(pool_jobs.attempt, tree=settings(tiny_assets, run_dir, train__max_steps=6))
    assert sorted(answers[0]["samples"]) == [4, 5, 6]
    assert answers[0]["summary"]["steps"] == 6
    assert metrics(run_dir)[:3] == before and len(metrics(run_dir)) == 6
    assert json.loads((run_dir / "DONE").read_text())["step"] == 6
    assert any("the run's length changed" in message for message in answers[0]["messages"])
