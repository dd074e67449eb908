"""What a self-shared teacher's configuration may not say."""

from pathlib import Path
from typing import Any

import pytest

from largekd.config.load import load_config, parse_config
from largekd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TREE: dict[str, Any] = {
    "run": {"dir": "run"},
    "teacher": {"kind": "self_shared"},
    "student": {"model": "backbone", "deepspeed": "ds_configs/zero3.json"},
    "data": {"train": {"path": "train.jsonl"}},
    "train": {"max_steps": 4, "global_batch_size": 2, "micro_batch_size": 1, "sequence_length": 8},
}
CLOSEST = {"layers": {"map": "closest_non_pruned"}}
SHARED = {"projector": {"kind": "low_rank_identity"}}


def test_the_recipe_says_what_the_method_says():
    config = load_config(ROOT / "recipes" / "self_shared.yaml")
    (feature,) = config.objective.features
    assert feature.sample_pairs == 6 and feature.layers.map == "closest_non_pruned"
    assert config.objective.alpha.warmup_from == 0 and config.objective.alpha.last == 1


def test_only_the_backbone_must_be_named():
    parse_config(TREE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"teacher_layers": [0], "deepspeed": "x.json"}}, r"student\.model: .*self_shared"),
        ({"teacher": {"adapters": {"pattern": "("}}}, r"teacher\.adapters\.pattern"),
        ({"teacher": {"adapters": {"rank": 4, "max_rank": 2}}}, r"teacher\.adapters\.max_rank = 2"),
        ({"teacher": {"pruning": {"begin_frac": 0.5, "end_frac": 0.5}}}, r"teacher\.pruning\.end_frac = 0\.5"),
        ({"teacher": {"deepspeed": "ds_configs/zero3.json"}}, r"teacher\.(self_shared\.)?deepspeed"),
        ({"objective": {"signal": {"kind": "top_k"}}}, r"objective\.signal\.kind = 'top_k'"),
        ({"objective": {"attention": [{"name": "maps", "loss": "kl"}]}}, r"objective\.attention"),
        (
            {"objective": {"features": [SHARED | {"name": "teacher_cross_entropy"}]}},
            r"features\.0\.name = 'teacher_cross_entropy': the name is taken",
        ),
        (
            {
                "plugins": ["mine.py"],
                "objective": {"divergences": [{"name": "plugin", "term": "teacher_cross_entropy"}]},
            },
            r"divergences\.0\.term = 'teacher_cross_entropy': the name is taken",
        ),
        ({"objective": {"translation": {"method": "sorted"}}}, r"objective\.translation"),
        ({"objective": {"features": [CLOSEST]}}, r"objective\.features\.0\.projector\.kind = 'linear'"),
        ({"objective": {"features": [CLOSEST | SHARED | {"loss": "predictive"}]}}, r"features\.0\.loss = 'predictive'"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    tree = TREE | changes
    if "teacher" in changes:
        tree["teacher"] = TREE["teacher"] | changes["teacher"]
    with pytest.raises(ConfigError, match=message):
        parse_config(tree)


def test_closest_layers_of_a_self_shared_student_need_no_teacher_layers():
    parse_config(TREE | {"objective": {"features": [CLOSEST | SHARED]}})


def test_another_teacher_leaves_the_name_of_the_self_shared_teachers_loss_free():
    tree = {**TREE, "teacher": {"model": "teacher", "deepspeed": "ds_configs/zero3.json"}}
    parse_config(tree | {"objective": {"features": [{"name": "teacher_cross_entropy"}]}})
