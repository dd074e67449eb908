"""Whole runs whose teacher is the average of the student."""

import pytest
import torch
from pool import RankError
from safetensors.torch import load_file
from tiny_run import ROOT, distil, distil_until, metrics, settings

from largekd.config.load import parse_config
from largekd.config.placement import read_placements
from largekd.errors import ConfigError


def ema_settings(assets, run_dir, **changes):
    tree = settings(
        assets,
        run_dir,
        student__model=str(assets / "teacher"),
        objective={"alpha": 0.5, "deep_supervision": {"layers": [1], "weight": 0.2}},
        **changes,
    )
    tree["student"].pop("teacher_layers")
    tree["teacher"] = {"kind": "ema", "deepspeed": str(ROOT / "ds_configs/zero3_tiny.json"), "decay": 0.9}
    return tree


def assert_exported_average(run):
    """The export holds what the ranks' shards in the last checkpoint make together."""
    folder = next((run / "checkpoints").glob("step_*6")) / "teacher"
    shards = [load_file(path) for path in sorted(folder.iterdir())]
    for name, tensor in load_file(run / "export" / "model.safetensors").items():
        joined = torch.cat([part[name] for part in shards])[: tensor.numel()]
        torch.testing.assert_close(tensor.flatten(), joined, rtol=0, atol=0)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(two_ranks, tiny_assets, tmp_path):
    whole, parts = (ema_settings(tiny_assets, tmp_path / name) for name in ("whole", "parts"))
    whole["export"] = {"weights": "teacher_average"}
    summary, _ = two_ranks.run(distil, tree=whole)
    assert two_ranks.run(distil_until, tree=parts, step=3, rank=0) == [None, None]
    resumed, _ = two_ranks.run(distil, tree=parts)
    assert resumed["eval"] == summary["eval"]
    for rank in range(2):
        name = f"teacher/rank_{rank:05d}.safetensors"
        one, other = (
            load_file(next((tmp_path / run / "checkpoints").glob("step_*6")) / name) for run in ("whole", "parts")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert_exported_average(tmp_path / "whole")
    with pytest.raises(AssertionError):
        assert_exported_average(tmp_path / "parts")
    records = metrics(tmp_path / "parts")
    assert [record["teacher/decay"] for record in records] == pytest.approx([(1 + n) / (10 + n) for n in range(1, 7)])
    # The first step's teacher is the student itself.
    assert abs(records[0]["kd/forward_kl"]) < 1e-6 < records[-1]["kd/forward_kl"]
    for record in records:
        names = ("cross_entropy", "forward_kl", "deep_supervision.1.cross_entropy", "deep_supervision.1.forward_kl")
        assert record["loss"] == pytest.approx(sum(record[f"kd_weighted/{name}"] for name in names))
        deep = record["kd_weighted/deep_supervision.1.cross_entropy"]
        assert deep == pytest.approx(0.5 * 0.2 * record["kd/deep_supervision.1.cross_entropy"])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"student__model": None}, "student.model"),
        ({"student__teacher_layers": [0]}, "student.teacher_layers"),
        ({"student__config": "config.json"}, "student.config"),
        ({"objective__translation": {"method": "spans"}}, "objective.translation"),
        ({"teacher__kind": "online", "teacher__model": "x", "export__weights": "teacher_average"}, "export.weights"),
        ({"objective__deep_supervision": {"layers": [1, 1]}}, "objective.deep_supervision.layers = [1, 1]"),
        ({"objective__deep_supervision": {"layers": [-1]}}, "objective.deep_supervision.layers: -1"),
        ({"objective__deep_supervision": {"layers": [1], "weight": -1}}, "objective.deep_supervision.weight"),
    ],
)
def test_settings_that_have_no_meaning(tmp_path, changes, key):
    tree = ema_settings(tmp_path, tmp_path / "run")
    for name, value in changes.items():
        room, last = name.split("__")
        tree.setdefault(room, {})[last] = value
        if last == "kind":
            del tree[room]["decay"]
    with pytest.raises(ConfigError) as raised:
        parse_config(tree)
    assert key in str(raised.value)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_shards_on_nvme_are_refused(tmp_path, side):
    tree = ema_settings(tmp_path, tmp_path / "run")
    name = {"teacher": "teacher_nvme", "student": "zero3_param_nvme"}[side]
    tree[side]["deepspeed"] = str(ROOT / f"ds_configs/{name}.json")
    with pytest.raises(ConfigError, match=rf"{side}\.deepspeed.*offload_param\.device"):
        read_placements(parse_config(tree))


@pytest.mark.parametrize("layer", [4, 3])
def test_layers_that_cannot_be_supervised(two_ranks, tiny_assets, tmp_path, layer):
    tree = ema_settings(tiny_assets, tmp_path / "run")
    tree["objective"]["deep_supervision"]["layers"] = [layer]
    with pytest.raises(RankError, match=r"objective\.deep_supervision\.layers"):
        two_ranks.run(distil, tree=tree)
