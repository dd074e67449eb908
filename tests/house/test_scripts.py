"""The shell scripts parse, refuse what they do not know, and hand over what they should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from house.checkout import ROOT, files

SCRIPTS = [*files(".sh"), ROOT / ".ci" / "run"]


def _run(*command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_parses(script: Path) -> None:
    finished = _run("bash", "-n", str(script))
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize("argument", ["--smok", "recipes/quickstart.yaml"])
def test_quickstart_refuses_before_it_sets_up(argument: str) -> None:
    finished = _run("bash", "launch/quickstart.sh", argument)
    assert finished.returncode == 2
    assert f"{argument} is neither --smoke nor key=value" in finished.stderr


def test_quickstart_helps() -> None:
    finished = _run("bash", "launch/quickstart.sh", "--help")
    assert finished.returncode == 0
    assert "--smoke" in finished.stdout


def test_reasoning_refuses_arguments_and_helps() -> None:
    finished = _run("bash", "launch/reasoning.sh", "runs/mine")
    assert finished.returncode == 2 and "runs/mine was given" in finished.stderr
    finished = _run("bash", "launch/reasoning.sh", "--help")
    assert finished.returncode == 0 and "recipes/reasoning.yaml" in finished.stdout


def test_environment_prefers_what_is_set(tmp_path: Path) -> None:
    show = '. launch/env.sh && echo "$VIRTUAL_ENV|$TORCH_EXTENSIONS_DIR|${DS_ACCELERATOR:-none}"'
    environment = {"VIRTUAL_ENV": str(tmp_path), "TORCH_EXTENSIONS_DIR": "", "DS_ACCELERATOR": ""}
    assert _run("bash", "-c", show, environment=environment).stdout == f"{tmp_path}|{tmp_path}/torch_extensions|none\n"
    (tmp_path / ".largekd-on-cpu").touch()
    assert _run("bash", "-c", show, environment=environment).stdout.endswith("|cpu\n")
    environment |= {"TORCH_EXTENSIONS_DIR": "/elsewhere", "DS_ACCELERATOR": "cuda"}
    assert _run("bash", "-c", show, environment=environment).stdout == f"{tmp_path}|/elsewhere|cuda\n"


def test_slurm_gives_every_task_the_first_node_as_master(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node-a\\nnode-b\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS $*"\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "123456",
        "SLURM_CPUS_PER_TASK": "8",
        "OMP_NUM_THREADS": "",
    }
    finished = _run("bash", "launch/slurm.sh", "--config", "recipes/quickstart.yaml", environment=environment)
    assert finished.stdout == (
        "node-a 23456 8 --kill-on-bad-exit=1 python launch/train.py --config recipes/quickstart.yaml\n"
    ), finished.stderr


def test_hostfile_example_is_what_deepspeed_reads() -> None:
    for line in (ROOT / "launch" / "hostfile.example").read_text().splitlines():
        name, _, slots = line.partition(" slots=")
        assert name and slots.isdigit()
