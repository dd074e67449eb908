"""What lies in the run folder is not what was saved: found before anything is unpickled, never a silent restart."""

import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pool_jobs
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import metrics, settings

EXACT = ("loss", "tokens", "optim/grad_norm", "optim/lr/default")


def recipe(assets: Path, run_dir: Path) -> dict[str, Any]:
    return settings(assets, run_dir, checkpoint={"every_steps": 2, "keep": 9})


@pytest.fixture(scope="module")
def stopped(tiny_assets, two_ranks, tmp_path_factory) -> Path:
    """A run with checkpoints of steps 2 and 4, stopped at 5 before its own save; copied by the tests."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    two_ranks.run(pool_jobs.attempt, tree=recipe(tiny_assets, run_dir), stop_at=5)
    shutil.rmtree(run_dir / "checkpoints/step_00000005")
    return run_dir


@pytest.fixture(scope="module")
def straight(tiny_assets, two_ranks, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    two_ranks.run(pool_jobs.attempt, tree=recipe(tiny_assets, run_dir))
    return run_dir


@pytest.fixture
def run_dir(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def flip_a_bit(checkpoint: Path) -> None:
    """In the largest file: a shard of DeepSpeed's."""
    path = max(checkpoint.rglob("*.pt"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    position = random.Random(7).randrange(len(data))
    data[position] ^= 1 << 3
    path.write_bytes(data)


def truncate(checkpoint: Path) -> None:
    path = min(checkpoint.rglob("*.pt"))
    os.truncate(path, path.stat().st_size // 2)


def remove_marker(checkpoint: Path) -> None:
    (checkpoint / "COMPLETE").unlink()


def replace_by_a_link(checkpoint: Path) -> None:
    elsewhere = checkpoint.parent.parent.parent / "elsewhere"
    checkpoint.rename(elsewhere)
    checkpoint.symlink_to(elsewhere)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._marker}",)


def plant_code(checkpoint: Path) -> None:
    """A shard of the right name that runs a command when it is loaded."""
    marker = checkpoint.parents[2] / "code-ran"
    for path in checkpoint.rglob("*.pt"):
        torch.save({"optimizer_state_dict": Payload(marker), "module": Payload(marker)}, path)


def plant_extra_code(checkpoint: Path) -> None:
    """The same as one more file in the engine's folder."""
    with open(checkpoint / "engine/state/zero_pp_rank_2_mp_rank_00_optim_states.pt", "wb") as stream:
        pickle.dump(Payload(checkpoint.parents[2] / "code-ran"), stream)


DAMAGES = {
    "bit flip": (flip_a_bit, "another SHA-256"),
    "truncation": (truncate, "bytes instead of"),
    "no marker": (remove_marker, "COMPLETE is missing"),
    "link": (replace_by_a_link, "it is a link"),
    "code": (plant_code, "instead of|another SHA-256"),
    "extra code": (plant_extra_code, "not in the manifest"),
}
SLOW = ("truncation", "no marker")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in DAMAGES]
)
def test_a_damaged_newest_checkpoint_costs_one_interval(run_dir, straight, tiny_assets, two_ranks, name):
    damage, reason = DAMAGES[name]
    damage(run_dir / "checkpoints/step_00000004")
    answers = two_ranks.run(pool_jobs.attempt, tree=recipe(tiny_assets, run_dir))
    log = "\n".join(answers[0]["messages"])
    assert "WARNING checkpoint" in log and "step_00000004 is damaged and is skipped" in log
    assert re.search(reason, log), log
    assert "resumed at step 2 " in log
    assert [sorted(answer["samples"]) for answer in answers] == [[3, 4, 5, 6]] * 2
    assert not (run_dir.parent / "code-ran").exists()
    equal_ends(run_dir, straight)


def equal_ends(run_dir: Path, straight: Path) -> None:
    for mine, theirs in zip(metrics(run_dir), metrics(straight), strict=True):
        assert {name: mine[name] for name in EXACT} == {name: theirs[name] for name in EXACT}
    weights, expected = (load_file(folder / "export/model.safetensors") for folder in (run_dir, straight))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_planted_code_would_run_if_it_were_loaded(tmp_path):
    """The control: without it the tests above could not fail."""
    checkpoint = tmp_path / "run/checkpoints/step_00000004"
    (checkpoint / "engine/state").mkdir(parents=True)
    shard = checkpoint / "engine/state/zero_pp_rank_0_mp_rank_00_model_states.pt"
    shard.touch()
    plant_code(checkpoint)
    torch.load(shard, weights_only=False)
    assert (tmp_path / "code-ran").exists()


def test_with_every_checkpoint_damaged_the_run_refuses(run_dir, tiny_assets, two_ranks):
    for path in (run_dir / "checkpoints").iterdir():
        flip_a_bit(path)
    before = (run_dir / "metrics.jsonl").read_bytes()
    for answer in two_ranks.run(pool_jobs.attempt, tree=recipe(tiny_assets, run_dir)):
        kind, message = answer["error"]
        assert kind == "CheckpointError" and answer["samples"] == {}
        assert "holds 2 checkpoint(s) and none can be used" in message and "run.fresh=true" in message
        assert "step_00000004" in message and "step_00000002" in message
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_fresh_starts_over_and_keeps_the_damaged_run_aside(run_dir, straight, tiny_assets, two_ranks):
    for path in (run_dir / "checkpoints").iterdir():
        truncate(path)
    tree = recipe(tiny_assets, run_dir)
    tree["run"]["fresh"] = True
    answers = two_ranks.run(pool_jobs.attempt, tree=tree)
    assert sorted(answers[0]["samples"]) == [1, 2, 3, 4, 5, 6]
    equal_ends(run_dir, straight)
    [aside] = run_dir.parent.glob("run.before-*")
    assert sorted(path.name for path in (aside / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    assert any(f"moved to {aside}" in message for message in answers[0]["messages"])
