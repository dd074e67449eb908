"""An initialised student's layers are compared with those of the teacher that they were made of."""

import json
from types import SimpleNamespace

import pytest
from families import family_config
from test_initialisation_run import NARROW
from tiny_run import distil, metrics, settings

from largekd.config.load import parse_config
from largekd.distillation.origin import kept_layers, planned_layers
from largekd.errors import ConfigError

CLOSEST = {"layers": {"map": "closest_non_pruned"}}


@pytest.fixture
def tree(tiny_assets, tmp_path):
    config = json.loads((tiny_assets / "teacher/config.json").read_text())
    shape = tmp_path / "student.json"
    shape.write_text(json.dumps(config | NARROW))
    made = settings(tiny_assets, tmp_path / "run", student__initialise={"layers": [1, 2], "width": "truncate"})
    del made["student"]["teacher_layers"]
    made["student"]["config"] = str(shape)
    return made


def test_every_stage_pairs_layers_by_what_the_student_was_made_of(one_rank, tree, tmp_path):
    del tree["train"]["max_steps"]
    tree["objective"]["features"] = [CLOSEST]
    tree["stages"] = [{"name": name, "steps": 1} for name in ("first", "second")]
    tree["optim"]["warmup_steps"] = 0
    one_rank.run(distil, tree=tree)
    for stage in ("00_first", "01_second"):
        pairs = json.loads((tmp_path / "run/stages" / stage / "layer_pairs.json").read_text())
        assert list(pairs.values()) == [[[0, 0], [0, 1], [1, 2], [1, 3]]]


def test_routers_are_compared_with_those_they_were_made_of(one_rank, tree, tiny_assets, tmp_path):
    from distillation.test_moe_run import moe_folder

    teacher = moe_folder(tmp_path / "teacher", like=tiny_assets / "teacher", family="mixtral", layers=4, seed=1)
    shape = json.loads((teacher / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "student.json").write_text(json.dumps(shape))
    tree["teacher"]["model"] = str(teacher)
    tree["train"]["max_steps"], tree["optim"]["warmup_steps"] = 1, 0
    tree["objective"]["router"] = {"distil": {"weight": 0.5}}
    one_rank.run(distil, tree=tree)
    overlaps = {key for record in metrics(tmp_path / "run") for key in record if key.startswith("router/overlap/")}
    assert overlaps == {"router/overlap/layers_0_1", "router/overlap/layers_1_2"}


def test_the_layers_of_another_teacher_are_not_the_student_s(tree, tmp_path):
    config = parse_config(tree)
    mine, moved, other = (
        SimpleNamespace(path=tmp_path / name, config=family_config("llama", num_hidden_layers=layers))
        for name, layers in (("mine", 4), ("moved", 4), ("other", 6))
    )
    with pytest.raises(ConfigError, match=r"initialisation\.json: cannot be read"):
        kept_layers(config, teacher=mine)
    (tmp_path / "run").mkdir()
    plan = {"teacher": str(mine.path), "teacher_shape": ["llama", 4, 32], "layers": [0, 3]}
    (tmp_path / "run/initialisation.json").write_text(json.dumps({"plan": plan}))
    assert kept_layers(config, teacher=mine) == kept_layers(config, teacher=moved) == (0, 3)
    assert kept_layers(config, teacher=other) is None


def test_layers_that_are_not_measured_are_known_beforehand(tree):
    shapes = {"teacher": family_config("llama", num_hidden_layers=6), "student": family_config("llama")}
    rules = (([1, 2, 3], (1, 2, 3)), ("uniform", (0, 2, 5)), ("block_influence", None), (None, None))
    for layers, expected in rules:
        tree["student"]["initialise"] = {"layers": layers}
        assert planned_layers(parse_config(tree), **shapes) == expected
    as_deep = shapes | {"student": family_config("llama", num_hidden_layers=6, hidden_size=16)}
    assert planned_layers(parse_config(tree), **as_deep) == (0, 1, 2, 3, 4, 5)
    del tree["student"]["initialise"], tree["student"]["config"]
    tree["student"]["teacher_layers"] = [0, 2]
    assert planned_layers(parse_config(tree), **shapes) == (0, 2)
