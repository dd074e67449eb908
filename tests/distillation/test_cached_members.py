"""Several teachers of which some are caches: the run with all of them online, and what is refused."""

import pytest
from make_tiny_model import Shape, make_model
from test_cached_layers import refused
from tiny_run import ROOT, cache, changed, distil, metrics, settings

SHARDED = str(ROOT / "ds_configs/zero3_tiny.json")
KEYS = ("loss", "health/kl_t1", "health/teacher_entropy", "kd/kl_t1/second", "teacher/weight/first")


@pytest.fixture(scope="module")
def caches(tiny_assets, two_ranks, tmp_path_factory):
    """The folder of two teachers' caches, the second one's model, and a cache of likeliest ids."""
    folder = tmp_path_factory.mktemp("members")
    make_model(folder / "teacher", shape=Shape(), seed=3)
    for name, model, codec in (
        ("first", tiny_assets / "teacher", {"kind": "hidden"}),
        ("second", folder / "teacher", {"kind": "hidden"}),
        ("ids", folder / "teacher", {"kind": "top_k"}),
    ):
        tree = changed(mixed(tiny_assets, folder, folder / name), teacher={"model": str(model), "deepspeed": SHARDED})
        objective = {"features": [{"name": "hidden"}]} if name == "first" else {}
        stored = {"path": str(folder / name), "codec": codec, "taps": {"precision": "fp32"}, "shard_samples": 50}
        two_ranks.run(cache, tree={**tree, "cache": stored, "objective": objective})
    return folder


def mixed(assets, folder, run_dir, *, stored=(), **changes):
    """A mixture of two teachers of which those in `stored` are caches."""
    members = [
        {"name": "first", "weight": 3.0, "teacher": {"model": str(assets / "teacher"), "deepspeed": SHARDED}},
        {"name": "second", "teacher": {"model": str(folder / "teacher"), "deepspeed": SHARDED}},
    ]
    for member in members:
        if member["name"] in stored:
            member["teacher"] = {"kind": "cached", "path": str(folder / member["name"])}
    student = {"model": str(assets / "teacher"), "layers": [0, 1], "deepspeed": SHARDED}
    tree = settings(assets, run_dir, log__tensorboard=False, train__max_steps=4, student=student)
    return changed({**tree, "teacher": {"kind": "mixture", "members": members}}, **changes)


@pytest.fixture(scope="module")
def online(tiny_assets, caches, two_ranks, tmp_path_factory):
    """The records of a run whose teachers are all models."""
    run_dir = tmp_path_factory.mktemp("runs") / "online"
    two_ranks.run(distil, tree=mixed(tiny_assets, caches, run_dir))
    return metrics(run_dir)


@pytest.mark.parametrize(
    "stored",
    [("second",), *(pytest.param(stored, marks=pytest.mark.slow) for stored in (("first",), ("first", "second")))],
    ids="+".join,
)
def test_a_cached_member_is_its_model(tiny_assets, caches, online, one_rank, tmp_path, stored):
    one_rank.run(distil, tree=mixed(tiny_assets, caches, tmp_path / "run", stored=stored))
    found = metrics(tmp_path / "run")
    assert len(found) == len(online) == 4
    for mine, theirs in zip(found, online, strict=True):
        assert {key: mine[key] for key in KEYS} == pytest.approx({key: theirs[key] for key in KEYS}, rel=1e-5)
        assert theirs["kd/kl_t1/first"] != theirs["kd/kl_t1/second"] > 0


def test_the_first_members_layers_come_from_its_cache(tiny_assets, caches, one_rank, tmp_path):
    objective = {"alpha": 0.5, "features": [{"name": "hidden"}]}
    for name, stored in (("online", ()), ("cached", ("first",))):
        tree = mixed(tiny_assets, caches, tmp_path / name, stored=stored, objective=objective)
        one_rank.run(distil, tree=tree)
    for mine, theirs in zip(metrics(tmp_path / "cached"), metrics(tmp_path / "online"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["align/hidden"] == pytest.approx(theirs["align/hidden"], rel=1e-5) and theirs["align/hidden"] > 0


def test_what_a_cached_member_cannot_do_is_named(tiny_assets, caches, two_ranks, one_rank, tmp_path):
    run_dir = tmp_path / "run"
    tree = mixed(tiny_assets, caches, run_dir, stored=("second",))
    ids = {"kind": "cached", "path": str(caches / "ids")}
    ids_tree = changed(tree)
    ids_tree["teacher"]["members"][1]["teacher"] = ids
    message = r"TeacherError: teacher\.members\.1\.teacher\.path: .*cache\.codec\.kind=hidden"
    refused(two_ranks, ids_tree, message)
    other = changed(tree)
    other["teacher"]["members"][1]["teacher"] |= {"model": str(tiny_assets / "teacher")}
    message = r"TeacherError: teacher\.members\.1\.teacher\.model = .*has other weights"
    refused(one_rank, changed(other, run__dir=str(tmp_path / "other")), message)
    missing = changed(tree)
    missing["teacher"]["members"][1]["teacher"]["path"] = str(tmp_path / "none")
    refused(one_rank, missing, r"TeacherError: teacher\.members\.1\.teacher\.path = .*there is no cache")
    rollouts = {"prompt_tokens": 8, "max_new_tokens": 8}
    refused(one_rank, changed(tree, rollouts=rollouts), r"ConfigError: .*rollouts: a cached teacher has no signal")
    layers = mixed(tiny_assets, caches, run_dir, stored=("first",))
    layers["student"] = {"teacher_layers": [0, 1], "deepspeed": SHARDED}
    refused(one_rank, layers, r"student\.teacher_layers: .*teacher\.members\.0\.teacher\.model")
