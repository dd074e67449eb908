"""NaN on one rank: that step is skipped on every rank, named, counted, and nothing else changes."""

import json
from pathlib import Path
from typing import Any

import pool_jobs
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import metrics, settings
from whole_jobs import complete_steps


@pytest.fixture(scope="module")
def clean(tiny_assets, two_ranks, tmp_path_factory):
    """A run without faults: folder and answers."""
    run_dir = tmp_path_factory.mktemp("clean") / "run"
    return run_dir, two_ranks.run(pool_jobs.attempt, tree=settings(tiny_assets, run_dir))


def poisoned(pool, tree: dict[str, Any], *, kind: str, rank: int, steps: tuple[int, ...]) -> list[dict[str, Any]]:
    return pool.run(pool_jobs.attempt, tree=tree, poison=kind, poison_rank=rank, poison_steps=steps)


@pytest.mark.parametrize(("kind", "rank"), [("loss", 1), ("teacher", 0), ("gradient", 1)])
def test_one_bad_step_is_skipped_everywhere_and_the_rest_goes_on(clean, tiny_assets, two_ranks, tmp_path, kind, rank):
    run_dir, expected = clean
    tree = settings(tiny_assets, tmp_path / "run")
    answers = poisoned(two_ranks, tree, kind=kind, rank=rank, steps=(3,))
    assert [answer["error"] for answer in answers] == [None, None]
    assert answers[0]["summary"]["skipped_steps"] == 1 and answers[0]["summary"]["steps"] == 6
    records, good = metrics(tmp_path / "run"), metrics(run_dir)
    assert [record["optim/skipped_steps"] for record in records] == [0, 0, 1, 1, 1, 1]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    # Before it nothing differs; schedule and data go on as if nothing had happened.
    assert [record["loss"] for record in records[:2]] == [record["loss"] for record in good[:2]]
    assert [record["optim/lr/default"] for record in records] == [record["optim/lr/default"] for record in good]
    assert [answer["samples"] for answer in answers] == [answer["samples"] for answer in expected]
    weights, unharmed = (load_file(folder / "export/model.safetensors") for folder in (tmp_path / "run", run_dir))
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert any(not torch.equal(weights[name], unharmed[name]) for name in weights), "the update of step 3 is missing"
    named_by(answers, step=3, rank=rank, where="gradient" if kind == "gradient" else "loss")


def named_by(answers: list[dict[str, Any]], *, step: int, rank: int, where: str) -> None:
    """The log of rank 0 names the step, the one rank, and exactly the samples that it looked at."""
    warnings = [text for text in answers[0]["messages"] if "was skipped" in text]
    ids = sorted(i for batch in answers[rank]["samples"][step] for i in batch)
    listed = ", ".join(str(i) for i in ids)
    assert warnings == [
        f"WARNING step {step} was skipped on all ranks: not finite on rank {rank} ({where}; samples {listed})"
    ]


def test_a_skipped_step_leaves_weights_and_moments_untouched(tiny_assets, two_ranks, tmp_path):
    """The checkpoint after a skipped step holds the tensors of the one before."""
    tree = settings(tiny_assets, tmp_path / "run", checkpoint={"every_steps": 1, "keep": 9})
    poisoned(two_ranks, tree, kind="loss", rank=0, steps=(3,))
    states = [
        two_ranks.run(pool_jobs.engine_state, checkpoint=str(tmp_path / f"run/checkpoints/step_{step:08d}"))
        for step in (2, 3, 4)
    ]
    digests = [
        [{name: value for name, value in rank.items() if "torch.float32" in value} for rank in state]
        for state in states
    ]
    assert digests[0] == digests[1] != digests[2]
    position = json.loads((tmp_path / "run/checkpoints/step_00000003/loader/state.json").read_text())
    assert position["step"] == 3


def test_five_bad_steps_in_a_row_end_the_run_and_spare_the_checkpoint(tiny_assets, two_ranks, tmp_path):
    run_dir = tmp_path / "run"
    tree = settings(tiny_assets, run_dir, train__max_steps=12, checkpoint__every_steps=2)
    answers = poisoned(two_ranks, tree, kind="loss", rank=1, steps=tuple(range(3, 13)))
    assert [max(answer["samples"]) for answer in answers] == [7, 7], "five bad steps, not one more"
    for answer in answers:
        kind, message = answer["error"]
        assert kind == "NumericsError"
        assert "5 steps in a row, up to step 7" in message and "rank 1 (loss; samples " in message
        assert "train.max_skipped_steps" in message
    assert not (run_dir / "DONE").exists() and not (run_dir / "export").exists()
    assert complete_steps(run_dir) == [4, 6], "the step that ended the run is not saved"
    resumed_after(run_dir, tree, pool=two_ranks)


def resumed_after(run_dir: Path, tree: dict[str, Any], *, pool) -> None:
    """The run goes on from its last checkpoint once the cause is gone, with finite weights."""
    answers = pool.run(pool_jobs.attempt, tree=tree)
    assert answers[0]["summary"]["steps"] == 12
    assert all(torch.isfinite(weight).all() for weight in load_file(run_dir / "export/model.safetensors").values())
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 13))


@pytest.mark.slow
def test_four_bad_steps_in_a_row_do_not(tiny_assets, two_ranks, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", train__max_steps=12)
    answers = poisoned(two_ranks, tree, kind="loss", rank=0, steps=(2, 3, 4, 5, 7, 8, 9, 10))
    assert answers[0]["error"] is None and answers[0]["summary"]["skipped_steps"] == 8
