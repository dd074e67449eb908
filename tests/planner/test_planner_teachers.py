"""The plan of every kind of teacher: a 70B teacher and an 8B student of the Llama family."""

import json
from pathlib import Path
from typing import Any

import plan_teachers
import pytest

from largekd.config.load import parse_config
from largekd.errors import ConfigError
from largekd.planner.plan import Plan, plan
from largekd.planner.report import plan_record, plan_text, render_plan

SMALL, LARGE = plan_teachers.STUDENT, plan_teachers.TEACHER
RANKS, ROW, MICRO = 8, 4096, 2
STEP_TOKENS = 64 // RANKS * ROW
ONLINE = {"kind": "online", "model": "LARGE", "deepspeed": "ds_configs/teacher_zero3.json"}
REMOTE = {"kind": "remote", "model": "LARGE", "servers": ["http://localhost:8000"]}
EMA = {"kind": "ema", "deepspeed": "ds_configs/teacher_zero3.json"}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name, config in (("large", LARGE), ("small", SMALL), ("cache/teacher", LARGE)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def tree_of(models: Path, *, teacher: dict[str, Any], **objective: Any) -> dict[str, Any]:
    def located(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: located(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [located(inner) for inner in value]
        return str(models / "large") if value == "LARGE" else value

    return {
        "run": {"dir": "runs/x"},
        "teacher": located(teacher),
        "student": {"model": str(models / "small"), "deepspeed": "ds_configs/zero3.json"},
        "data": {"train": "t.jsonl"},
        "train": {
            "max_steps": 1,
            "global_batch_size": 64,
            "micro_batch_size": MICRO,
            "sequence_length": ROW,
            "precision": "bf16",
            "activation_checkpointing": True,
        },
        "objective": objective,
    }


def planned(models: Path, *, teacher: dict[str, Any], **objective: Any) -> Plan:
    return plan(parse_config(tree_of(models, teacher=teacher, **objective)), world_size=RANKS)


def size(made: Plan, *, name: str, role: str = "teacher", phase: str | None = None) -> int:
    found = [t.bytes for t in made.terms if t.role == role and name in t.name and phase in (None, t.phase)]
    assert found, f"no term {name!r} of the {role}"
    return sum(found)


def names(made: Plan) -> set[str]:
    return {term.name for term in made.terms if term.role == "teacher"}


def test_ema_keeps_a_second_student_and_a_float32_remainder(models: Path) -> None:
    made = planned(models, teacher=EMA)
    assert made.teachers == (("teacher", made.student),)
    shard = made.student.parameter_count // RANKS
    assert size(made, name="weights, own shard") == 2 * shard
    assert size(made, name="remainder of the average") == 4 * shard
    assert size(made, name="hidden states of the whole step", phase="teacher") == STEP_TOKENS * 4096 * 2
    assert size(made, name="update of one tensor", phase="update") == 3 * 4 * 128_256 * 4096 // RANKS
    hosted = planned(models, teacher=EMA | {"deepspeed": "ds_configs/teacher_cpu.json"})
    assert {t.place for t in hosted.terms if "average" in t.name} == {"host"}


def test_ema_of_some_layers_has_as_many(models: Path) -> None:
    tree = tree_of(models, teacher=EMA)
    tree["student"]["layers"] = [0, 1, 2]
    made = plan(parse_config(tree), world_size=RANKS)
    assert [len(shape.layers) for _, shape in made.teachers] == [3] == [len(made.student.layers)]


@pytest.mark.parametrize("teacher", ["cached", "cached_with_model", "remote"])
def test_a_teacher_elsewhere_costs_its_signals_alone(models: Path, teacher: str) -> None:
    given = {
        "cached": {"kind": "cached", "path": str(models / "cache")},
        "cached_with_model": {"kind": "cached", "path": str(models / "none"), "model": "LARGE"},
        "remote": REMOTE,
    }[teacher]
    whole = planned(models, teacher=given)
    assert whole.teachers[0][1].parameter_count > 70_000_000_000
    assert size(whole, name="vocabulary head, whole") == 128_256 * 8192 * 2
    held, kept = ("signals of two steps", 2 * STEP_TOKENS) if teacher == "remote" else ("records", MICRO * ROW)
    assert size(whole, name=held) == kept * 8192 * 2
    assert size(whole, name="hidden states", phase="student") == MICRO * ROW * 8192 * 2
    assert not any("weights" in name for name in names(whole))
    few = planned(models, teacher=given, signal={"kind": "top_k", "k": 64})
    head = {"vocabulary head, whole"} if teacher == "remote" else set()
    assert names(few) == {"signal of a few ids", *head, *(name for name in names(whole) if held in name)}
    assert size(few, name=held) == kept * 64 * 12
    assert size(few, name="signal of a few ids") == MICRO * ROW * 64 * 12
    online = planned(models, teacher=ONLINE)
    assert few.peaks["accelerator"] < whole.peaks["accelerator"] < online.peaks["accelerator"]


@pytest.mark.parametrize("protocol", ["largekd", "vllm"])
def test_servers_of_this_project_give_their_head_whatever_is_asked(models: Path, protocol: str) -> None:
    remote = REMOTE | {"protocol": protocol} | ({"served_model": "m"} if protocol == "vllm" else {})
    made = planned(models, teacher=remote, signal={"kind": "top_k", "k": 20})
    assert names(made) - {"signals of two steps", "signal of a few ids"} == (
        {"vocabulary head, whole"} if protocol == "largekd" else set()
    )


@pytest.mark.parametrize(("precision", "size_bytes"), [("bf16", 2), ("fp32", 4)])
def test_what_is_stored_decides_what_a_cache_takes(models: Path, precision: str, size_bytes: int) -> None:
    def stored(codec: dict[str, Any]) -> None:
        identity = {"codec": codec, "teacher": {"precision": precision, "model": "m"}}
        (models / "cache/manifest.json").write_text(json.dumps({"identity": identity}), encoding="utf-8")

    cached, few = {"kind": "cached", "path": str(models / "cache")}, {"kind": "top_k", "k": 16}
    stored({"kind": "hidden"})
    made = planned(models, teacher=cached, signal=few)
    assert size(made, name="vocabulary head, whole") == 128_256 * 8192 * size_bytes
    assert size(made, name="records of a micro-batch") == MICRO * ROW * 8192 * size_bytes
    assert size(made, name="logits that they are read off") == 4 * 256 * 128_256 * 4
    stored({"kind": "top_k", "k": 64})
    made = planned(models, teacher=cached, signal=few)
    assert names(made) == {"records of a micro-batch", "signal of a few ids"}
    assert size(made, name="records of a micro-batch") == MICRO * ROW * 64 * 12
    assert size(made, name="signal of a few ids") == MICRO * ROW * 16 * 12


@pytest.mark.parametrize(("precision", "size_bytes"), [("bf16", 2), ("fp32", 4)])
def test_layers_of_a_cache_are_read_one_micro_batch_at_a_time(models: Path, precision: str, size_bytes: int) -> None:
    identity = {
        "codec": {"kind": "top_k", "k": 64},
        "teacher": {"precision": "bf16"},
        "taps": {"precision": precision, "hidden": [40, 79], "attention": [79]},
    }
    (models / "cache/manifest.json").write_text(json.dumps({"identity": identity}), encoding="utf-8")
    cached = {"kind": "cached", "path": str(models / "cache")}
    objective = {
        "signal": {"kind": "top_k", "k": 16},
        "features": [{"layers": {"map": "uniform", "count": 2}}],
        "attention": [{"layers": {"map": "last"}}],
    }
    made = planned(models, teacher=cached, **objective)
    expected = MICRO * ROW * size_bytes * (2 * 8192 + (64 + 2 * 8) * 128)
    found = {term.place: term.bytes for term in made.terms if term.name == "captured layers of a micro-batch"}
    assert found == {"host": expected, "accelerator": expected}
    assert not [name for name in names(made) if "whole step" in name]
    online = planned(models, teacher=ONLINE, **objective)
    assert size(online, name="captured hidden states, whole step", phase="student") == STEP_TOKENS * 2 * 8192 * 2


def test_positions_are_those_of_the_key_that_names_the_model(models: Path) -> None:
    tree = tree_of(models, teacher={"kind": "cached", "path": str(models / "cache")})
    tree["train"]["sequence_length"] = 9000
    with pytest.raises(ConfigError, match=r"the model of teacher\.path has 8192 positions"):
        plan(parse_config(tree), world_size=RANKS)


def test_a_cache_that_is_not_here_gives_the_reason(models: Path) -> None:
    config = parse_config(tree_of(models, teacher={"kind": "cached", "path": str(models / "none")}))
    assert plan_text(config, world_size=RANKS).startswith("no plan: ")


def test_a_mixture_has_a_side_and_a_buffer_for_each_member(models: Path) -> None:
    local = ONLINE | {"model": str(models / "small")}
    members = [
        {"name": "big", "teacher": ONLINE},
        {"name": "kin", "teacher": local},
    ]
    made = planned(models, teacher={"kind": "mixture", "members": members})
    assert [name for name, _ in made.teachers] == ["big", "kin"]
    alone = planned(models, teacher=ONLINE)
    assert size(made, name="big: weights, own shard") == size(alone, name="weights, own shard")
    assert size(made, name="kin: weights, own shard") == 2 * made.student.parameter_count // RANKS
    chunk = 512 * 128_256 * 2
    assert size(made, role="student", name="chunks of logits") == 3 * chunk
    assert size(alone, role="student", name="chunks of logits") == 2 * chunk
    assert "teacher kin: llama" in render_plan(made)


def test_the_record_names_every_teacher(models: Path) -> None:
    teacher = {"kind": "mixture", "members": [{"name": name, "teacher": ONLINE} for name in ("one", "two")]}
    record = plan_record(parse_config(tree_of(models, teacher=teacher)), world_size=RANKS)
    assert list(record["teachers"]) == ["one", "two"]
    assert record["teachers"]["one"]["parameters"] == record["teachers"]["two"]["parameters"]


def test_every_supervised_layer_keeps_a_gradient_of_the_head(models: Path) -> None:
    plain = planned(models, teacher=EMA)
    made = planned(models, teacher=EMA, deep_supervision={"layers": [7, 15, 23]})
    assert size(made, role="student", name="head's gradients of supervised") == 3 * 128_256 * 4096 * 2
    assert size(made, role="student", name="hidden states of supervised") == 3 * MICRO * ROW * 4096 * 10
    assert made.peaks["accelerator"] > plain.peaks["accelerator"]
    off = planned(models, teacher=EMA, deep_supervision={"layers": [7, 15, 23], "weight": 0.0})
    assert off.peaks == plain.peaks
