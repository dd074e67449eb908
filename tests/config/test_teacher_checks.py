"""Several teachers: what cannot be run is refused with key, value and rule; the rest is read as it is written."""

from typing import Any

import pytest

from largekd.config.load import parse_config
from largekd.config.placement import read_placements
from largekd.config.teacher import FixedWeightsConfig, MixtureTeacherConfig, OnlineTeacherConfig
from largekd.errors import ConfigError

PLACED = {"deepspeed": "ds_configs/teacher_zero3.json"}
MEMBERS = [{"name": name, "teacher": {"model": name, **PLACED}} for name in ("a", "b")]


def several(minimal: dict[str, Any], *, members: Any = MEMBERS, **changes: Any) -> dict[str, Any]:
    tree = {**minimal, "teacher": {"kind": "mixture", "members": members}}
    for key, value in changes.items():
        area, name = key.split("__")
        tree[area] = {**tree.get(area, {}), name: value}
    return tree


def test_members_are_online_teachers_of_equal_weight_unless_they_say_otherwise(minimal) -> None:
    config = parse_config(several(minimal))
    assert isinstance(config.teacher, MixtureTeacherConfig)
    assert isinstance(config.teacher.weighting, FixedWeightsConfig)
    assert [member.weight for member in config.teacher.members] == [1.0, 1.0]
    assert all(isinstance(member.teacher, OnlineTeacherConfig) for member in config.teacher.members)


def test_each_member_has_its_own_placement(minimal) -> None:
    members = [MEMBERS[0], {"name": "b", "teacher": {"model": "b", "deepspeed": "ds_configs/zero3_cpu.json"}}]
    placements = read_placements(parse_config(several(minimal, members=members)))
    assert set(placements.teachers) == {f"teacher.members.{index}.teacher.deepspeed" for index in (0, 1)}
    offloads = ["offload_param" in placed["zero_optimization"] for placed in placements.teachers.values()]
    assert offloads == [False, True]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"members": [MEMBERS[0], MEMBERS[0]]}, r"teacher\.members: 2 of them are called 'a'; names must differ"),
        (
            {"members": [{**member, "weight": 0.0} for member in MEMBERS]},
            r"teacher\.members\.0\.weight = 0: all weights",
        ),
        ({"members": MEMBERS[:1]}, r"teacher\.members.*at least 2"),
        ({"members": [MEMBERS[0], {**MEMBERS[1], "name": "b/c"}]}, r"teacher\.members\.1\.name = 'b/c'"),
        ({"members": [MEMBERS[0], {**MEMBERS[1], "weight": -1.0}]}, r"teacher\.members\.1\.weight = -1"),
        ({"objective__signal": {"kind": "top_k"}}, r"objective\.signal\.kind = 'top_k': .* must be full"),
        ({"objective__translation": {"method": "spans"}}, r"objective\.translation: .*'mixture' all teachers"),
        ({"teacher__weighting": {"kind": "routed", "field": "text"}}, r"weighting\.field = 'text': data\.train reads"),
        ({"teacher__weighting": {"kind": "learned", "rate": 0.0}}, r"weighting.*rate = 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_what_cannot_be_run_is_refused(minimal, changes, expected) -> None:
    with pytest.raises(ConfigError, match=f"(?s){expected}"):
        parse_config(several(minimal, **changes))


def test_a_column_of_the_data_may_route(minimal) -> None:
    tree = several(minimal, teacher__weighting={"kind": "routed", "field": "tutor"})
    assert parse_config(tree).teacher.weighting.field == "tutor"


@pytest.mark.parametrize(("first", "refused"), [(0, True), (1, False)])
def test_a_student_is_made_of_the_first_teacher_s_weights(minimal, first, refused) -> None:
    cached = {"name": "cached", "teacher": {"kind": "cached", "path": "cache"}}
    members = [MEMBERS[0], MEMBERS[1]]
    members[first] = cached
    tree = several(minimal, members=members)
    tree["student"] = {**tree["student"], "config": "student.json", "initialise": {}}
    for key in ("model", "teacher_layers"):
        tree["student"].pop(key, None)
    try:
        parse_config(tree)
    except ConfigError as error:
        found = str(error)
    else:
        found = ""
    assert (r"student.initialise: a cache has no weights; set teacher.members.0.teacher.model" in found) == refused
