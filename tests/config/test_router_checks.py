"""Combinations around `objective.router` that cannot be run are refused with key, value and rule."""

import copy
from typing import Any

import pytest

from largekd.config.load import parse_config
from largekd.config.placement import read_placement
from largekd.errors import ConfigError

Tree = dict[str, Any]


def refused(tree: Tree) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    return str(caught.value)


def test_defaults_are_read(minimal: Tree):
    tree = copy.deepcopy(minimal) | {"objective": {"router": {}}}
    router = parse_config(tree).objective.router
    assert router is not None and router.balance == 0.01 and router.z == 0.001 and router.distil is None


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        ({"balance": -1}, "objective.router.balance = -1.0; it must be at least 0"),
        ({"z": {"start": 1, "end": -1}}, "objective.router.z: runs from -1.0 to 1.0; it must be at least 0"),
        ({"distil": {"weight": -0.5}}, "objective.router.distil.weight = -0.5; it must be at least 0"),
        ({"distil": {"pairs": []}}, "objective.router.distil.pairs = []: name a pair"),
        ({"distil": {"pairs": [[0, 1], [0, 1]]}}, "objective.router.distil.pairs: a pair is named twice"),
        ({"distil": {"expert_map": [-1, -1]}}, "objective.router.distil.expert_map: maps no expert"),
    ],
)
def test_values_that_cannot_be(minimal: Tree, router: Tree, expected: str):
    assert expected in refused(copy.deepcopy(minimal) | {"objective": {"router": router}})


def test_a_term_may_not_take_a_routers_name(minimal: Tree):
    objective = {"router": {}, "features": [{"name": "router_z"}]}
    assert "'router_z'" in refused(copy.deepcopy(minimal) | {"objective": objective})


def test_teachers_without_a_router_in_the_job(minimal: Tree):
    tree = copy.deepcopy(minimal) | {"objective": {"router": {"distil": {}}}}
    tree["teacher"] = {"kind": "cached", "path": "somewhere", "model": tree["teacher"]["model"]}
    assert "objective.router.distil: teacher.kind = 'cached' has no router" in refused(tree)
    tree["objective"] = {"router": {}}
    parse_config(tree)


def test_layer_drop_leaves_routers_out(minimal: Tree):
    tree = copy.deepcopy(minimal) | {"objective": {"router": {}}}
    tree["student"]["layer_drop"] = {}
    assert "objective.router: student.layer_drop leaves layers" in refused(tree)


def test_expert_parallelism_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "placement.json"
    path.write_text('{"zero_optimization": {"stage": 3}, "expert_parallel": {"enabled": true}}')
    with pytest.raises(ConfigError, match=r"expert_parallel: DeepSpeed 0\.19\.8 cannot read .* remove it"):
        read_placement(str(path), key="student.deepspeed")
