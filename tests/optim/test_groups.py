"""Learning-rate groups: who claims what, decay by depth, and what the table says."""

import re

import pytest
import torch
from torch import nn

from largekd.config.train import OptimConfig
from largekd.errors import ConfigError
from largekd.optim.depth import depth_factors
from largekd.optim.groups import ALREADY_FROZEN, build_groups, check_claims
from largekd.optim.table import describe_groups, group_differences, group_records

SHAPES = {
    "model.embed_tokens.weight": (10, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.q_proj.bias": (4,),
    "model.layers.0.mlp.up_proj.weight": (8, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.1.self_attn.q_proj.weight": (4, 4),
    "model.layers.1.self_attn.q_proj.bias": (4,),
    "model.layers.1.mlp.up_proj.weight": (8, 4),
    "model.layers.1.input_layernorm.weight": (4,),
    "model.norm.weight": (4,),
    "lm_head.weight": (10, 4),
    "alignment.terms.hidden.layers.0.weight": (4, 6),
}
MLP = {"name": "mlp", "pattern": r"\.mlp\."}


def named():
    return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]


def grouped(**optim):
    return {group.name: group for group in build_groups(named(), config=OptimConfig.model_validate(optim))}


def test_the_first_pattern_claims_and_every_parameter_is_in_one_group():
    groups = grouped(groups=[MLP, {"name": "first", "pattern": r"^model\.layers\.0\.", "lr_multiplier": 3.0}])
    assert groups["mlp"].parameter_names == (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    )
    assert groups["first"].parameter_names == ("model.layers.0.self_attn.q_proj.weight",)
    assert groups["first"].lr_multiplier == groups["first.no_decay"].lr_multiplier == 3.0
    names = [name for group in groups.values() for name in group.parameter_names]
    assert sorted(names) == sorted(SHAPES)


def test_biases_and_norms_are_not_decayed_unless_their_group_says_so():
    groups = grouped(weight_decay=0.1, groups=[{"name": "q", "pattern": "q_proj", "weight_decay": 0.3}])
    assert groups["q"].weight_decay == 0.3 and "q.no_decay" not in groups
    assert "model.layers.0.self_attn.q_proj.bias" in groups["q"].parameter_names
    assert groups["default"].weight_decay == 0.1 and groups["default.no_decay"].weight_decay == 0.0
    assert set(groups["default.no_decay"].parameter_names) == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
    }


def test_a_group_may_be_frozen_whole_by_a_schedule():
    weights = named()
    may_learn = {name: True for name, _ in weights}
    for name, weight in weights:
        weight.requires_grad_(".mlp." not in name)
    config = OptimConfig.model_validate({"groups": [MLP]})
    groups = {group.name: group for group in build_groups(weights, config=config, may_learn=may_learn)}
    assert "mlp" not in groups and all(".mlp." in name for name in groups[ALREADY_FROZEN].parameter_names)
    with pytest.raises(ConfigError, match="claims parameters that are frozen"):
        build_groups(weights, config=config)


def test_a_group_may_have_its_own_betas_and_eps():
    groups = grouped(betas=(0.8, 0.9), eps=1e-6, groups=[{**MLP, "betas": [0.5, 0.6], "eps": 1e-4}])
    assert (groups["mlp"].betas, groups["mlp"].eps) == ((0.5, 0.6), 1e-4)
    assert (groups["default"].betas, groups["default"].eps) == ((0.8, 0.9), 1e-6)


def test_the_rate_decays_with_the_distance_from_the_top_and_multiplies():
    groups = grouped(layer_decay=0.5, groups=[{**MLP, "lr_multiplier": 3.0}])
    factors = {name: group.lr_multiplier for group in groups.values() for name in group.parameter_names}
    assert factors == {
        "model.embed_tokens.weight": 0.25,
        "model.layers.0.self_attn.q_proj.weight": 0.5,
        "model.layers.0.self_attn.q_proj.bias": 0.5,
        "model.layers.0.mlp.up_proj.weight": 1.5,
        "model.layers.0.input_layernorm.weight": 0.5,
        "model.layers.1.self_attn.q_proj.weight": 1.0,
        "model.layers.1.self_attn.q_proj.bias": 1.0,
        "model.layers.1.mlp.up_proj.weight": 3.0,
        "model.layers.1.input_layernorm.weight": 1.0,
        "model.norm.weight": 1.0,
        "lm_head.weight": 1.0,
        "alignment.terms.hidden.layers.0.weight": 1.0,
    }
    assert {"mlp.layer_0", "mlp.layer_1", "default.embedding", "default.layer_0.no_decay", "default"} <= groups.keys()


@pytest.mark.parametrize(("names", "missing"), [(["x.blocks.0.w"], "layers"), (["m.layers.0.w"], "embeddings")])
def test_decay_by_depth_needs_to_know_the_depth(names, missing):
    with pytest.raises(ConfigError, match=f"optim.layer_decay = 0.9: the {missing}"):
        depth_factors(names, decay=0.9)


def test_strict_names_a_few_of_those_that_nobody_claims():
    with pytest.raises(ConfigError) as error:
        grouped(strict=True, groups=[MLP])
    assert "optim.strict = true: 10 parameters" in str(error.value)
    assert len(re.findall(r"(?:model|lm_head)\.[\w.]*(?:weight|bias)", str(error.value))) == 5
    rest = {"name": "rest", "pattern": "", "lr_multiplier": 0.0}
    assert grouped(strict=True, groups=[MLP, rest])["rest"].is_frozen


@pytest.mark.parametrize("second", [{"name": "b", "pattern": "nowhere"}, {"name": "b", "pattern": "up_proj"}])
def test_a_pattern_that_claims_nothing_is_an_error(second):
    with pytest.raises(ConfigError, match="group 'b' claims no parameter"):
        grouped(groups=[MLP, second])


def test_freezing_more_does_not_make_other_groups_an_error():
    frozen = {"name": "bottom", "pattern": r"^model\.layers\.0\.", "lr_multiplier": 0.0}
    groups = grouped(groups=[frozen, {"name": "low", "pattern": r"layers\.0\.mlp"}, MLP])
    assert groups["mlp"].parameter_names == ("model.layers.1.mlp.up_proj.weight",)
    assert "low" not in groups and groups["bottom"].numel == 4 * 4 + 4 + 32 + 4
    assert not any(parameter.requires_grad for parameter in groups["bottom"].parameters)


def test_a_pattern_for_what_is_frozen_already_is_an_error():
    trainable = dict.fromkeys(SHAPES, True) | {"model.embed_tokens.weight": False}
    optim = OptimConfig.model_validate({"groups": [{"name": "e", "pattern": "embed"}]})
    with pytest.raises(ConfigError, match=r"'e' claims parameters that are frozen, such as 'model\.embed_tokens"):
        check_claims(trainable, config=optim)
    assert check_claims(trainable, config=optim, more_later=True)["model.embed_tokens.weight"] == "e"


def test_nothing_left_to_train_is_an_error():
    with pytest.raises(ConfigError, match="nothing is left to train"):
        grouped(groups=[{"name": "all", "pattern": "", "lr_multiplier": 0.0}])


def test_the_table_lists_frozen_groups_without_optimizer_state():
    parameters = named()
    parameters[0][1].requires_grad_(False)
    frozen = {"name": "bottom", "pattern": r"^model\.layers\.0\.", "lr_multiplier": 0.0}
    groups = build_groups(parameters, config=OptimConfig.model_validate({"groups": [frozen]}))
    records = {record["group"]: record for record in group_records(groups, state_bytes=12)}
    assert records["bottom"]["optimizer_bytes"] == records[ALREADY_FROZEN]["optimizer_bytes"] == 0
    assert records["default"]["optimizer_bytes"] == 12 * records["default"]["elements"]
    assert sum(record["share"] for record in records.values()) == pytest.approx(1.0)
    assert records[ALREADY_FROZEN]["parameters"] == ["model.embed_tokens.weight"]
    lines = describe_groups(groups, state_bytes=12).splitlines()
    assert len({line.index("0.9/0.95") for line in lines if "0.9/0.95" in line}) == 1
    assert next(line for line in lines if line.startswith("bottom")).split()[1] == "frozen"


def test_what_differs_between_two_runs_groups_is_named():
    one, two = (
        group_records(build_groups(named(), config=OptimConfig.model_validate({"groups": [group]})), state_bytes=8)
        for group in (MLP, {**MLP, "pattern": r"1\.mlp\.", "betas": [0.1, 0.2]})
    )
    assert group_differences(one, one) == []
    found = "\n".join(group_differences(one, two))
    assert "mlp.betas: [0.9, 0.95] -> [0.1, 0.2]" in found
    assert "mlp: 1 parameters came or went, such as model.layers.0.mlp.up_proj.weight" in found
