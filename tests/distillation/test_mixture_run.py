"""Whole tiny runs with two teachers: what is logged, resumed and refused, and that ranks make no difference."""

import json
import re

import pytest
import torch
from make_tiny_model import Shape, make_model
from safetensors.torch import load_file
from tiny_run import ROOT, distil, distil_until, metrics, settings

SHARDED = str(ROOT / "ds_configs/zero3_tiny.json")


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Another teacher with the same tokenizer."""
    folder = tmp_path_factory.mktemp("second") / "teacher"
    make_model(folder, shape=Shape(), seed=3)
    return folder


def mixed(assets, second, run_dir, *, weights=(1.0, 1.0), weighting=None, **changes):
    tree = settings(assets, run_dir, **changes)
    members = [
        {"name": name, "weight": weight, "teacher": {"model": str(folder), "deepspeed": SHARDED}}
        for name, weight, folder in zip(("first", "second"), weights, (assets / "teacher", second), strict=True)
    ]
    tree["teacher"] = {"kind": "mixture", "members": members}
    if weighting is not None:
        tree["teacher"]["weighting"] = weighting
    return tree


def routed_data(assets, folder, *, names):
    """The training records, each with one of `names` (None: no name)."""
    folder.mkdir(exist_ok=True)
    path = folder / "routed.jsonl"
    with path.open("w") as lines:
        for place, line in enumerate((assets / "train.jsonl").read_text().splitlines()):
            name = names[place % len(names)]
            lines.write(json.dumps({**json.loads(line), **({} if name is None else {"teacher": name})}) + "\n")
    return {"path": str(path)}


def weights_of(run_dir):
    return load_file(run_dir / "export/model.safetensors")


@pytest.mark.parametrize("place", [0, 1])
def test_all_weight_on_one_teacher_is_a_run_with_that_teacher(tiny_assets, second, two_ranks, tmp_path, place):
    changes = {"train__max_steps": 3, "optim__warmup_steps": 0, "objective": {"alpha": 0.8, "temperature": 2.0}}
    weights = tuple(float(place == index) for index in range(2))
    changes["student"] = {"model": str(tiny_assets / "teacher"), "layers": [0, 1], "deepspeed": SHARDED}
    two_ranks.run(distil, tree=mixed(tiny_assets, second, tmp_path / "two", weights=weights, **changes))
    alone = settings(tiny_assets, tmp_path / "one", **changes)
    alone["teacher"]["model"] = str((tiny_assets / "teacher", second)[place])
    two_ranks.run(distil, tree=alone)
    for mine, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for name in ("loss", "optim/grad_norm", "health/kl_t1", "health/teacher_entropy"):
            assert mine[name] == theirs[name], name
    found, expected = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def learned(tiny_assets, second, two_ranks, tmp_path_factory):
    """An uninterrupted run that learns its weights."""
    run_dir = tmp_path_factory.mktemp("runs") / "learned"
    two_ranks.run(distil, tree=mixed(tiny_assets, second, run_dir, weighting=LEARNED))
    return run_dir


LEARNED = {"kind": "learned", "rate": 0.5}


def test_learned_weights_move_and_are_logged_with_each_teachers_distance(learned):
    records = metrics(learned)
    shares = [(r["teacher/weight/first"], r["teacher/weight/second"]) for r in records]
    assert all(sum(pair) == pytest.approx(1.0, abs=1e-9) and min(pair) > 0 for pair in shares)
    assert abs(shares[-1][0] - 0.5) > 1e-3 and len(set(shares)) == len(shares)
    for record in records:
        for name in ("kd/kl_t1/first", "kd/kl_t1/second", "kd/teacher_ce/first", "kd/teacher_ce/second"):
            assert record[name] > 0, name
        # KL is convex in the teacher.
        assert record["health/kl_t1"] <= max(record["kd/kl_t1/first"], record["kd/kl_t1/second"]) + 1e-6


def test_the_event_file_has_the_weights(learned):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(learned / "tensorboard"))
    events.Reload()
    assert {"teacher/weight/first", "kd/kl_t1/second"} <= set(events.Tags()["scalars"])


def test_a_stopped_run_keeps_its_learned_weights(learned, tiny_assets, second, two_ranks, tmp_path):
    tree = mixed(tiny_assets, second, tmp_path / "run", weighting=LEARNED)
    assert two_ranks.run(distil_until, tree=tree, step=3, rank=1) == [None, None]
    two_ranks.run(distil, tree=tree)
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(learned), strict=True):
        for name in ("loss", "teacher/weight/first", "teacher/weight/second", "kd/kl_t1/first"):
            assert mine[name] == theirs[name], name
    found, expected = weights_of(tmp_path / "run"), weights_of(learned)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_ranks_learn_what_one_learns(learned, tiny_assets, second, one_rank, tmp_path):
    one_rank.run(distil, tree=mixed(tiny_assets, second, tmp_path / "run", weighting=LEARNED))
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(learned), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["teacher/weight/first"] == pytest.approx(theirs["teacher/weight/first"], rel=1e-5)


def test_routing_by_name(tiny_assets, second, two_ranks, tmp_path):
    """All records of the second teacher: the same as a run with it alone; a third of each: the logged weights."""
    changes = {"train__max_steps": 2, "optim__warmup_steps": 0, "data__eval": None, "eval": {}}
    routed = {"kind": "routed"}
    data = routed_data(tiny_assets, tmp_path / "all", names=("second",))
    tree = mixed(tiny_assets, second, tmp_path / "all/run", weighting=routed, data__train=data, **changes)
    two_ranks.run(distil, tree=tree)
    alone = mixed(tiny_assets, second, tmp_path / "alone", weights=(0.0, 1.0), data__train=data, **changes)
    two_ranks.run(distil, tree=alone)
    for mine, theirs in zip(metrics(tmp_path / "all/run"), metrics(tmp_path / "alone"), strict=True):
        assert mine["loss"] == theirs["loss"] and mine["teacher/weight/second"] == 1.0
    data = routed_data(tiny_assets, tmp_path / "some", names=("first", "second", None))
    tree = mixed(tiny_assets, second, tmp_path / "some/run", weighting=routed, data__train=data, **changes)
    two_ranks.run(distil, tree=tree)
    for record in metrics(tmp_path / "some/run"):
        assert 0.2 < record["teacher/weight/first"] < 0.8
        assert record["teacher/weight/first"] + record["teacher/weight/second"] == pytest.approx(1.0, abs=1e-6)


def test_hidden_states_are_compared_with_the_first_teacher(tiny_assets, second, two_ranks, tmp_path):
    objective = {"alpha": 1.0, "features": [{"name": "hidden", "loss": "cosine"}]}
    tree = mixed(
        tiny_assets, second, tmp_path / "run", weighting={"kind": "confidence"}, objective=objective,
        train__max_steps=2, optim__warmup_steps=0,
    )  # fmt: skip
    two_ranks.run(distil, tree=tree)
    written = json.loads((tmp_path / "run/deepspeed.json").read_text())
    assert set(written) == {"teacher.members.0.teacher", "teacher.members.1.teacher", "student"}
    for record in metrics(tmp_path / "run"):
        assert record["align/hidden"] > 0 and record["teacher/weight/first"] != 0.5


def refused(pool, tree, message):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        pool.run(distil, tree=tree)


def test_mistakes_are_named(tiny_assets, second, one_rank, tmp_path):
    tree = mixed(tiny_assets, second, tmp_path / "run")
    tree["teacher"]["members"][1]["teacher"]["model"] = str(tmp_path / "nowhere")
    refused(one_rank, tree, r"ConfigError: teacher\.members\.1\.teacher\.model = '.*nowhere': no such folder")
    data = routed_data(tiny_assets, tmp_path, names=("first", "third"))
    tree = mixed(tiny_assets, second, tmp_path / "run", weighting={"kind": "routed"}, data__train=data)
    refused(
        one_rank, tree, r"DataError: .*routed\.jsonl:2.*'teacher' holds 'third'; the teachers are 'first', 'second'"
    )
    tree = mixed(tiny_assets, second, tmp_path / "run", weighting={"kind": "routed", "field": "tutor"})
    refused(one_rank, tree, r"DataError: teacher\.weighting\.field = 'tutor': no record of data\.train")


def test_a_member_with_another_tokenizer_is_refused(tiny_assets, second, one_rank, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(second, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    tree = mixed(tiny_assets, other, tmp_path / "run")
    refused(one_rank, tree, re.escape("tokenizers of teacher.members.1.teacher.model and student.model differ"))
