"""The rules that the shapes choose where student.initialise names none."""

from pathlib import Path
from typing import Any

import pytest
from calibration_jobs import initialised_by_rules
from families import FAMILIES, build, family_config, narrow, save
from pool import RankPool

from largekd.config.initialise import InitialiseConfig
from largekd.distillation.default_rules import settled
from largekd.distillation.initialise import check_initialise, needs_statistics
from largekd.errors import ConfigError
from largekd.initialisation.calibration import measure
from largekd.models.decoder import Decoder

MIXED = {"mlp_only_layers": [0], "norm_topk_prob": True}
"""Of Qwen3-MoE: an ordinary MLP among layers of experts."""
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], tuple[str, str]]] = {
    "same": ("llama", {}, "llama", {}, ("uniform", "truncate")),
    "fewer layers": ("llama", {}, "llama", {"num_hidden_layers": 2}, ("block_influence", "truncate")),
    "fewer units": ("llama", {}, "llama", {"hidden_size": 16}, ("uniform", "importance")),
    "fewer neurons": ("llama", {}, "llama", {"intermediate_size": 40}, ("uniform", "importance")),
    "fewer heads": ("llama", {}, "llama", {"num_attention_heads": 2}, ("uniform", "importance")),
    "fewer key heads": ("llama", {}, "llama", {"num_key_value_heads": 1}, ("uniform", "importance")),
    # Repeated key heads keep the function; a shorter vocabulary is cut at its end by every rule.
    "more key heads": ("llama", {}, "llama", {"num_key_value_heads": 4}, ("uniform", "truncate")),
    "fewer tokens": ("llama", {}, "llama", {"vocab_size": 60}, ("uniform", "truncate")),
    "all": ("llama", {}, "llama", narrow("llama"), ("block_influence", "importance")),
    "narrower experts": ("mixtral", {}, "mixtral", {"intermediate_size": 24}, ("uniform", "truncate")),
    "narrower experts and stream": ("mixtral", {}, "mixtral", narrow("mixtral"), ("block_influence", "truncate")),
    "narrower stream of experts": ("mixtral", {}, "mixtral", {"hidden_size": 16}, ("uniform", "importance")),
    "a narrower MLP among experts": (
        "qwen3_moe", MIXED, "qwen3_moe", {**MIXED, "intermediate_size": 24}, ("uniform", "importance"),
    ),
    "fewer layers among experts": (
        "qwen3_moe", MIXED, "qwen3_moe", {**MIXED, "num_hidden_layers": 2}, ("block_influence", "truncate"),
    ),
    # Which of the teacher's layers these MLPs are made of is not known yet: it may be one of experts.
    "an average of experts or a narrower MLP": (
        "qwen3_moe", MIXED, "qwen3", {"intermediate_size": 12, "num_hidden_layers": 1}, ("block_influence", "truncate"),
    ),
    "copies of an MLP": ("qwen3", {}, "qwen3_moe", {"moe_intermediate_size": 48}, ("uniform", "truncate")),
    "copies of a part of an MLP": ("qwen3", {}, "qwen3_moe", {"moe_intermediate_size": 24}, ("uniform", "importance")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_shapes_choose_what_is_not_named(case: str) -> None:
    family, theirs, other, ours, expected = CASES[case]
    shapes = {"teacher": family_config(family, **theirs), "student": family_config(other, **ours)}
    config = InitialiseConfig.model_validate({"experts": {"to_dense": "average"}})
    check_initialise(config, **shapes)
    found = settled(config, **shapes)
    assert (found.layers, found.width) == expected
    assert needs_statistics(found) == (expected != ("uniform", "truncate"))
    assert found.experts == config.experts


def test_a_split_whose_slices_fill_the_mlp_measures_nothing() -> None:
    teacher = family_config("qwen3")
    for neurons, width in ((24, "truncate"), (20, "importance")):
        student = family_config("qwen3_moe", moe_intermediate_size=neurons)
        config = InitialiseConfig.model_validate({"experts": {"from_dense": "split"}})
        check_initialise(config, teacher=teacher, student=student)
        assert settled(config, teacher=teacher, student=student).width == width


def test_named_rules_and_a_gain_stay() -> None:
    shapes = {"teacher": family_config("llama"), "student": family_config("llama", **narrow("llama"))}
    for given, expected in (
        ({"layers": "uniform", "width": "truncate"}, ("uniform", "truncate")),
        ({"layers": [1, 2], "width": "interpolate"}, ((1, 2), "interpolate")),
        ({"layers": "first"}, ("first", "importance")),
        ({"width": "pca"}, ("block_influence", "pca")),
        ({"gain": 0.5}, ("block_influence", "truncate")),
    ):
        found = settled(InitialiseConfig.model_validate(given), **shapes)
        assert (found.layers, found.width) == expected


def test_the_layers_that_are_named_decide_what_is_narrower() -> None:
    """Layer 0 of the teacher is an ordinary MLP of 48 neurons, the others have experts of 16."""
    teacher = family_config("qwen3_moe", **MIXED)
    student = family_config("qwen3", intermediate_size=12, num_hidden_layers=1)
    for layer, width in ((0, "importance"), (1, "truncate")):
        config = InitialiseConfig.model_validate({"layers": [layer], "experts": {"to_dense": "average"}})
        assert settled(config, teacher=teacher, student=student).width == width


def test_key_heads_that_importance_cannot_choose_are_refused_with_what_to_set() -> None:
    student = family_config("llama", hidden_size=16, num_key_value_heads=4)
    with pytest.raises(ConfigError, match=r"4 query heads on 4 key heads, .*choose truncate or interpolate"):
        check_initialise(InitialiseConfig(), teacher=family_config("llama"), student=student)
    check_initialise(InitialiseConfig(width="truncate"), teacher=family_config("llama"), student=student)


def test_wider_layers_are_refused_before_the_teacher_is_measured() -> None:
    teacher = family_config("qwen3_moe", **MIXED)
    student = family_config("qwen3_moe", **MIXED, num_hidden_layers=2, intermediate_size=56)
    with pytest.raises(ConfigError, match="the MLP of the student's layer 0 has 56 neurons"):
        check_initialise(InitialiseConfig(), teacher=teacher, student=student)


def test_a_teacher_that_cannot_be_measured_is_refused_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "final_norm", None)
    decoder = Decoder(model=build(family_config("llama"), seed=0))
    with pytest.raises(ConfigError, match=r"width = 'truncate' and student\.initialise\.layers = 'uniform'"):
        measure(decoder, batches=())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served_by_its_defaults(family: str, one_rank: RankPool, tmp_path: Path) -> None:
    teacher = build(family_config(family, vocab_size=101), seed=1)
    save(teacher, tmp_path / "teacher")
    teacher.config.save_pretrained(tmp_path / "teacher")
    family_config(family, vocab_size=101, **narrow(family)).save_pretrained(tmp_path / "student")
    folders = {"teacher": str(tmp_path / "teacher"), "student": str(tmp_path / "student")}
    [(plan, asked)] = one_rank.run(initialised_by_rules, **folders, initialise={})
    experts = family in ("mixtral", "olmoe", "qwen3_moe")
    assert (plan["layer_rule"], plan["width"]) == ("block_influence", "truncate" if experts else "importance")
    assert asked == 1
    assert plan["layers"][0] == 0
    if family == "llama":
        folders["student"] = folders["teacher"]
        [(plan, asked)] = one_rank.run(initialised_by_rules, **folders, initialise={})
        assert (plan["layer_rule"], plan["layers"], plan["width"], asked) == ("uniform", [0, 1, 2], "truncate", 0)
