"""A run that was stopped and resumed is the run that was never stopped: every number, weight and optimizer moment."""

import json
from pathlib import Path
from typing import Any

import pool_jobs
import pytest
from make_tiny_model import Shape, make_model
from tiny_run import ROOT, metrics, settings

STEPS = 12
slow = pytest.mark.slow
# Seconds, rates and memory are the run's own.
MEASURED = ("perf/", "memory/", "time/")


@pytest.fixture(scope="module")
def dropout_student(tmp_path_factory) -> Path:
    """A student with attention dropout, of the teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("student") / "model"
    make_model(folder, shape=Shape(layers=2), seed=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return folder


def placement(folder: Path, **offload: Any) -> str:
    """A ds_configs file for tiny shards with `offload` in it."""
    tree = json.loads((ROOT / "ds_configs/zero3_tiny.json").read_text())
    tree["zero_optimization"] |= offload
    path = folder / "placement.json"
    path.write_text(json.dumps(tree))
    return str(path)


def recipe(assets: Path, run_dir: Path, student: Path, **changes: Any) -> dict[str, Any]:
    """12 steps over three epochs of 40 shuffled samples, accumulation 2, two rates, dropout in the student."""
    options = {
        "train__max_steps": STEPS,
        "data__train": {"path": str(assets / "train.jsonl"), "max_samples": 40},
        "data__packing": False,
        "student__model": str(student),
        "optim__groups": [{"name": "attention", "pattern": r"self_attn\.", "lr_multiplier": 3.0}],
        "eval__max_rows": 2,
    }
    return settings(assets, run_dir, **(options | changes))


def final_state(pool, run_dir: Path) -> list[dict[str, Any]]:
    return pool.run(pool_jobs.engine_state, checkpoint=str(run_dir / f"checkpoints/step_{STEPS:08d}"))


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if not name.startswith(MEASURED)} for record in metrics(run_dir)
    ]


def stopped_and_resumed(pool, tree: dict[str, Any], *, stop: int) -> list[dict[int, Any]]:
    """Sample ids per step and rank of a run that was stopped at `stop` and resumed."""
    first = pool.run(pool_jobs.attempt, tree=tree, stop_at=stop, stop_rank=stop % 2)
    assert [answer["summary"] for answer in first] == [None, None]
    second = pool.run(pool_jobs.attempt, tree=tree)
    assert any(f"resumed at step {stop} " in message for message in second[0]["messages"])
    assert [sorted(answer["samples"]) for answer in second] == [list(range(stop + 1, STEPS + 1))] * 2
    return [before["samples"] | after["samples"] for before, after in zip(first, second, strict=True)]


@pytest.fixture(scope="module")
def straight(tiny_assets, dropout_student, two_ranks, tmp_path_factory):
    """The run that is not stopped: its folder and each rank's answer."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    answers = two_ranks.run(pool_jobs.attempt, tree=recipe(tiny_assets, run_dir, dropout_student))
    return run_dir, answers, final_state(two_ranks, run_dir)


def test_the_compared_run_shuffles_drops_out_and_has_two_rates(straight, tiny_assets, dropout_student, two_ranks):
    run_dir, answers, state = straight
    first = sorted(i for rank in answers for ids in rank["samples"][1] for i in ids)
    assert all(len(step) == 2 for rank in answers for step in rank["samples"].values()), "accumulation 2"
    epoch = sorted(i for rank in answers for step in range(1, 6) for ids in rank["samples"][step] for i in ids)
    assert epoch == list(range(40)) and first != list(range(8))
    record = metrics(run_dir)[5]
    assert record["optim/lr/attention"] == pytest.approx(3 * record["optim/lr/default"])
    moments = [name for name in state[0] if "exp_avg" in name]
    assert len(moments) >= 4 and all("torch.float32" in state[0][name] for name in moments)
    plain = json.loads((dropout_student / "config.json").read_text()) | {"attention_dropout": 0.0}
    without = run_dir.parent / "without"
    without.mkdir()
    for path in dropout_student.iterdir():
        (without / path.name).symlink_to(path)
    (without / "config.json").unlink()
    (without / "config.json").write_text(json.dumps(plain))
    tree = recipe(tiny_assets, run_dir.parent / "plain", without, train__max_steps=3)
    two_ranks.run(pool_jobs.attempt, tree=tree)
    assert metrics(run_dir.parent / "plain")[0]["loss"] != metrics(run_dir)[0]["loss"]


@pytest.mark.parametrize("stop", [pytest.param(stop, marks=slow) for stop in (1, 6, 9)] + [4])
def test_resume_equals_the_straight_run(straight, tiny_assets, dropout_student, two_ranks, tmp_path, stop):
    run_dir, answers, state = straight
    samples = stopped_and_resumed(two_ranks, recipe(tiny_assets, tmp_path / "run", dropout_student), stop=stop)
    assert samples == [answer["samples"] for answer in answers]
    assert numbers(tmp_path / "run") == numbers(run_dir)
    assert final_state(two_ranks, tmp_path / "run") == state


def test_resume_with_the_optimizer_on_the_cpu_is_exact_too(tiny_assets, dropout_student, two_ranks, tmp_path):
    offload = placement(tmp_path, offload_optimizer={"device": "cpu", "pin_memory": False})
    trees = [
        recipe(tiny_assets, tmp_path / name, dropout_student, student__deepspeed=offload)
        for name in ("straight", "resumed")
    ]
    two_ranks.run(pool_jobs.attempt, tree=trees[0])
    stopped_and_resumed(two_ranks, trees[1], stop=6)
    assert numbers(tmp_path / "resumed") == numbers(tmp_path / "straight")
    assert final_state(two_ranks, tmp_path / "resumed") == final_state(two_ranks, tmp_path / "straight")


@slow
def test_resume_with_deepspeeds_cpu_adam_is_close(tiny_assets, dropout_student, two_ranks, tmp_path):
    offload = placement(tmp_path, offload_optimizer={"device": "cpu", "pin_memory": False})
    options = {"student__deepspeed": offload, "optim__implementation": "deepspeed"}
    trees = [recipe(tiny_assets, tmp_path / name, dropout_student, **options) for name in ("straight", "resumed")]
    two_ranks.run(pool_jobs.attempt, tree=trees[0])
    stopped_and_resumed(two_ranks, trees[1], stop=6)
    pairs = list(zip(metrics(tmp_path / "resumed"), metrics(tmp_path / "straight"), strict=True))
    for mine, theirs in pairs:
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["optim/lr/default"] == theirs["optim/lr/default"]


def test_an_optimizer_on_nvme_cannot_be_checkpointed_and_says_so(tiny_assets, dropout_student, two_ranks, tmp_path):
    offload = placement(
        tmp_path, offload_optimizer={"device": "nvme", "nvme_path": str(tmp_path / "swap"), "pin_memory": False}
    )
    tree = recipe(tiny_assets, tmp_path / "run", dropout_student, student__deepspeed=offload, checkpoint__every_steps=5)
    for answer in two_ranks.run(pool_jobs.attempt, tree=tree):
        kind, message = answer["error"]
        assert kind == "ConfigError"
        assert "student.deepspeed" in message and "NVMe" in message and "checkpoint.every_steps=0" in message
        assert answer["samples"] == {}
