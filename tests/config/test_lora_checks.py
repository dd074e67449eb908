"""Adapters, their base as a teacher, and groups: what cannot be run is refused with key, value and rule."""

import pytest

from largekd.config.load import parse_config
from largekd.errors import ConfigError

PLACED = {"deepspeed": "ds_configs/zero3.json"}
STUDENT = {"model": "s", "lora": {}, **PLACED}
BASE = {"student": STUDENT, "teacher": {"kind": "base"}}


def test_a_student_may_be_its_own_teacher_without_its_adapters(minimal):
    config = parse_config({**minimal, **BASE, "export": {"adapter": True}})
    assert config.teacher.kind == "base" and config.student.lora.rank == 16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (BASE | {"student": {"model": "s", **PLACED}}, r"teacher\.kind = 'base': is the student without its adapters"),
        (BASE | {"student": {"lora": {}, "config": "c", **PLACED}}, r"student\.model: teacher\.kind = 'base' needs it"),
        (BASE | {"objective": {"signal": {"kind": "top_k", "k": 8}}}, r"objective\.signal\.kind = 'top_k': with"),
        (BASE | {"objective": {"translation": {}}}, r"objective\.translation: teacher\.kind = 'base' has"),
        (BASE | {"teacher": {"kind": "ema", **PLACED}}, r"student\.lora: teacher\.kind = 'ema' has another way"),
        (BASE | {"teacher": {"kind": "self_shared"}}, r"student\.lora: teacher\.kind = 'self_shared' has another way"),
        ({"student": {"lora": {"pattern": "("}, "model": "s", **PLACED}}, r"student\.lora\.pattern = '\(': not a reg"),
        ({"student": {"lora": {}, "config": "c", **PLACED}}, r"student\.lora: freezes the weights of student\.config"),
        (
            {"student": {"lora": {}, "design": {"ratio": 0.5}, **PLACED}},
            r"student\.lora: freezes the weights of student\.design",
        ),
        ({"export": {"adapter": True}}, r"export\.adapter = true: there is none without student\.lora"),
        (
            {"export": {"adapter": True}, "student": STUDENT | {"layers": [0]}},
            r"export\.adapter = true: an adapter is for a model that others have",
        ),
        ({"optim": {"betas": [0.9, 1.0]}}, r"optim\.betas\.1 = 1\.0: must be at least 0 and less than 1"),
        (
            {"optim": {"groups": [{"name": "a", "pattern": "x", "betas": [-0.1, 0.5]}]}},
            r"optim\.groups\.0\.betas\.0 = -0\.1: must be at least 0",
        ),
        ({"optim": {"groups": [{"name": "default", "pattern": "x"}]}}, r"optim\.groups\.0\.name = 'default': names"),
        ({"optim": {"groups": [{"name": "a.layer_3", "pattern": "x"}]}}, r"optim\.groups\.0\.name = 'a\.layer_3'"),
        ({"optim": {"groups": [{"name": "a.after_3", "pattern": "x"}]}}, r"optim\.groups\.0\.name = 'a\.after_3'"),
        ({"optim": {"strict": True}}, r"optim\.strict = true: without optim\.groups"),
        ({"optim": {"layer_decay": 1.5}}, r"optim\.layer_decay = 1\.5"),
    ],
)
def test_what_cannot_be_run_is_named(minimal, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_config({**minimal, **changes})
