"""Whole tiny runs in the rank pool: what they leave behind, and that a stopped run goes on as if it had not stopped."""

import json

import pytest
import torch
from placements import needs_libaio, offload
from safetensors.torch import load_file
from tiny_run import distil, distil_until, metrics, settings

EXACT = ("loss", "tokens", "optim/grad_norm", "optim/lr/default", "kd/forward_kl", "health/kl_t1")


@pytest.fixture(scope="module")
def straight(tiny_assets, two_ranks, tmp_path_factory):
    """An uninterrupted run that everything is compared with."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    summary, _ = two_ranks.run(distil, tree=settings(tiny_assets, run_dir))
    return run_dir, summary


def test_a_finished_run_leaves_what_was_promised(straight):
    run_dir, summary = straight
    for name in ("config.yaml", "environment.json", "plan.json", "metrics.jsonl", "summary.json", "DONE"):
        assert (run_dir / name).is_file(), name
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["steps"] == 6 and len(summary["peak_rss_bytes"]) == 2
    assert summary["eval"]["after"]["kl"] < summary["eval"]["before"]["kl"]
    assert summary["eval"]["teacher"]["perplexity"] > 1
    records = metrics(run_dir)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "optim/grad_norm", "optim/lr/default", "perf/tokens_per_s", "tokens", "health/kl_t1"):
        assert all(name in record for record in records), name


def test_the_export_loads_with_plain_transformers_and_scores_the_same(straight):
    from check_export import check

    found, expected, tokens = check(straight[0])
    assert tokens > 200
    assert found == pytest.approx(expected, rel=1e-4)


def test_event_files_hold_the_metrics(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight[0] / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"loss", "kd/forward_kl", "kd_weighted/forward_kl", "optim/lr/default", "eval/kl", "health/kl_t1"}
    assert expected <= tags, expected - tags
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("stop", "rank"), [(1, 0), (4, 1)])
def test_a_stopped_run_resumes_bit_for_bit(straight, tiny_assets, two_ranks, tmp_path, stop, rank):
    tree = settings(tiny_assets, tmp_path / "run")
    assert two_ranks.run(distil_until, tree=tree, step=stop, rank=rank) == [None, None]
    assert not (tmp_path / "run/DONE").exists()
    two_ranks.run(distil, tree=tree)
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(straight[0]), strict=True):
        assert {name: mine[name] for name in EXACT} == {name: theirs[name] for name in EXACT}
    weights, expected = (load_file(folder / "export/model.safetensors") for folder in (tmp_path / "run", straight[0]))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_finished_run_is_not_repeated_and_a_longer_one_goes_on(straight, tiny_assets, two_ranks):
    run_dir, summary = straight
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert two_ranks.run(distil, tree=settings(tiny_assets, run_dir))[0] == summary
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_longer_run_goes_on_and_is_not_done_until_its_end(tiny_assets, two_ranks, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", train__max_steps=2, optim__warmup_steps=0)
    two_ranks.run(distil, tree=tree)
    tree["train"]["max_steps"] = 5
    assert two_ranks.run(distil_until, tree=tree, step=2, rank=0) == [None, None]
    assert not (tmp_path / "run/DONE").exists() and not (tmp_path / "run/summary.json").exists()
    summary, _ = two_ranks.run(distil, tree=tree)
    assert summary["steps"] == 5
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_another_configuration_on_resume_is_refused_and_named(straight, tiny_assets, two_ranks):
    # Without its checkpoints a finished run still is what it is.
    tree = settings(tiny_assets, straight[0], optim__lr=2e-3, train__seed=5)
    with pytest.raises(AssertionError, match=r"(?s)optim\.lr.*train\.seed|train\.seed.*optim\.lr"):
        two_ranks.run(distil, tree=tree)


def test_cross_entropy_alone_needs_no_teacher_signal(tiny_assets, two_ranks, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", objective={"alpha": 0.0}, train__max_steps=2, optim__warmup_steps=0)
    summary, _ = two_ranks.run(distil, tree=tree)
    assert summary["eval"]["after"]["kl"] is not None
    record = metrics(tmp_path / "run")[-1]
    assert "kd/forward_kl" not in record and record["kd_weighted/cross_entropy"] == pytest.approx(record["loss"])


@pytest.mark.parametrize("rows", [1, 8, 9, 17])
def test_any_number_of_rows_runs_on_two_ranks_as_on_one(tiny_assets, one_rank, two_ranks, tmp_path, rows):
    lines = (tiny_assets / "train.jsonl").read_text().splitlines()[:rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    changes = {
        "data__train": {"path": str(tmp_path / "train.jsonl")},
        "data__packing": False,
        "train__max_steps": None,
        "train__max_epochs": 2,
        "optim__warmup_steps": 0,
    }
    alone, pair = (settings(tiny_assets, tmp_path / name, **changes) for name in ("one", "two"))
    (expected,) = one_rank.run(distil, tree=alone)
    summary, _ = two_ranks.run(distil, tree=pair)
    assert summary["steps"] == expected["steps"] == 2 * -(-rows // 8)
    for mine, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["tokens"] == theirs["tokens"]
    assert summary["eval"]["after"]["perplexity"] == pytest.approx(expected["eval"]["after"]["perplexity"], rel=1e-3)


@needs_libaio
def test_an_optimizer_on_nvme_is_never_resumed(tiny_assets, one_rank, tmp_path):
    placement = tmp_path / "nvme.json"
    placement.write_text(json.dumps(offload("nvme", folder=tmp_path / "swap", optimizer=True)))
    tree = settings(tiny_assets, tmp_path / "run", student__deepspeed=str(placement), eval__max_rows=2)
    assert one_rank.run(distil_until, tree=tree, step=2, rank=0) == [None]
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))
    assert one_rank.run(distil, tree=tree)[0]["steps"] == 6


def test_a_run_may_leave_out_the_first_evaluation(tiny_assets, two_ranks, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", eval__before=False, train__max_steps=1, optim__warmup_steps=0)
    summary, _ = two_ranks.run(distil, tree=tree)
    assert summary["eval"]["before"] is None and summary["eval"]["after"]["kl"] > 0
    records = [json.loads(line) for line in (tmp_path / "run/evaluation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1]
