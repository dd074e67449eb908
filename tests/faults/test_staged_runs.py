"""Runs in stages that are stopped, killed or refused."""

import signal

import pool_jobs
import pytest
import torch
from safetensors.torch import load_file
from stage_jobs import STEPS, staged
from tiny_run import distil, metrics, settings
from whole_jobs import complete_steps

slow = pytest.mark.slow
EXACT = ("loss", "tokens", "optim/grad_norm", "optim/lr/default", "kd/forward_kl", "stage/index", "stage/phase")


@pytest.fixture(scope="module")
def straight(tiny_assets, two_ranks, tmp_path_factory):
    """The folder of the run that nobody stops."""
    run_dir = tmp_path_factory.mktemp("staged") / "run"
    two_ranks.run(distil, tree=staged(tiny_assets, run_dir))
    return run_dir


def same_ends(run_dir, other):
    for mine, theirs in zip(metrics(run_dir), metrics(other), strict=True):
        assert {name: mine.get(name) for name in EXACT} == {name: theirs.get(name) for name in EXACT}
    weights, expected = (load_file(folder / "export/model.safetensors") for folder in (run_dir, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "stop",
    [STEPS[0], 5, 10, *(pytest.param(stop, marks=slow) for stop in (2, sum(STEPS[:2]), 12))],
)
def test_a_run_stopped_in_a_stage_or_at_a_switch_resumes_bit_for_bit(straight, tiny_assets, two_ranks, tmp_path, stop):
    tree = staged(tiny_assets, tmp_path / "run")
    first = two_ranks.run(pool_jobs.attempt, tree=tree, stop_at=stop, stop_rank=stop % 2)
    assert [answer["summary"] for answer in first] == [None, None], first[0]["error"]
    second = two_ranks.run(pool_jobs.attempt, tree=tree)
    assert any(f"resumed at step {stop} " in message for message in second[0]["messages"])
    assert sorted(second[0]["samples"]) == list(range(stop + 1, sum(STEPS) + 1))
    same_ends(tmp_path / "run", straight)


@pytest.mark.parametrize(
    ("fault", "newest"),
    [
        ("stage:switch:rank1:step3:sigkill", 3),
        pytest.param("stage:switch:rank0:step10:sigkill", 10, marks=slow),
        pytest.param("save:before_rename:rank0:step7:sigkill", 6, marks=slow),
    ],
)
def test_a_run_killed_at_a_switch_makes_it_again(straight, tiny_assets, job_server, tmp_path, fault, newest):
    tree = staged(tiny_assets, tmp_path / "run", checkpoint__every_steps=2)
    job = job_server.start(tree, folder=tmp_path / "job", LARGEKD_TEST_FAULT=fault)
    statuses = job.wait()
    assert -signal.SIGKILL in statuses and 0 not in statuses and None not in statuses, job.text()
    assert complete_steps(tmp_path / "run")[-1] == newest
    job = job_server.start(tree, folder=tmp_path / "job")
    assert job.wait() == [0, 0], job.text()
    assert f"resumed at step {newest} " in job.text()
    same_ends(tmp_path / "run", straight)


def test_a_bad_path_of_the_last_stage_is_found_before_the_first_step(tiny_assets, two_ranks, tmp_path):
    tree = staged(tiny_assets, tmp_path / "run")
    tree["stages"][2]["set"]["data.train"] = str(tmp_path / "absent.jsonl")
    (answer, _) = two_ranks.run(pool_jobs.attempt, tree=tree)
    assert answer["error"] and "absent.jsonl" in answer["error"][1] and answer["samples"] == {}


def test_more_blocks_than_layers_is_refused_before_any_weight(tiny_assets, two_ranks, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", freezing={"parts": 3})
    (answer, _) = two_ranks.run(pool_jobs.attempt, tree=tree)
    assert answer["error"][0] == "ConfigError" and "freezing.parts = 3" in answer["error"][1]
