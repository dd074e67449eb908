"""Students with another number of experts: the family keeps the layers' function, and what cannot be is refused."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.config.design import DesignConfig
from largekd.errors import ConfigError
from largekd.planner.design import Design, design_student

# No key that transformers has a default for: the families of a pair differ in their defaults.
BARE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 53,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "num_key_value_heads": 2,
        "norm_topk_prob": True,
    },
}


def designed(model_type: str, *, config: dict[str, Any] | None = None, **design: Any) -> Design:
    teacher = {"model_type": model_type, **BARE, **(config or {})}
    return design_student(teacher, design=DesignConfig(**design))


def model_of(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()


def copied(weights: dict[str, Tensor], *, experts: int) -> dict[str, Tensor]:
    """Dense weights as `experts` equal experts under any router."""
    made = {}
    for name, weight in weights.items():
        if ".mlp." not in name:
            made[name] = weight
    for index in range(BARE["num_hidden_layers"]):
        mlp = {part: weights[f"model.layers.{index}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")}
        stem = f"model.layers.{index}.mlp.experts"
        both = torch.cat([mlp["gate"], mlp["up"]])
        made[f"{stem}.gate_up_proj"] = both.expand(experts, -1, -1)
        made[f"{stem}.down_proj"] = mlp["down"].expand(experts, -1, -1)
    return made


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 2, "rope_theta": 500.0}),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 3, "head_dim": 32}),
        ("qwen3", {"num_key_value_heads": 2, "attention_bias": True, "head_dim": 32}),
    ],
)
def test_copied_experts_give_the_dense_models_logits(model_type: str, config: dict[str, Any]) -> None:
    made = designed(model_type, config=config, experts=4, active_experts=2)
    dense, mixture = model_of({"model_type": model_type, **BARE, **config}), model_of(made.config)
    for name, parameter in dense.named_parameters():
        # Biases start at 0, where a missing one would not be seen.
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    missing, unexpected = mixture.load_state_dict(copied(dense.state_dict(), experts=4), strict=False)
    assert unexpected == [] and all(name.endswith("mlp.gate.weight") for name in missing)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(mixture(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=1e-4)
    assert made.shape.parameter_count == mixture.num_parameters()
    assert made.shape.expert_count == 4 and made.shape.active_experts == 2


@pytest.mark.parametrize(("model_type", "dense"), [("mixtral", "mistral"), ("qwen3_moe", "qwen3")])
def test_a_dense_student_of_a_mixture_has_its_attention(model_type: str, dense: str) -> None:
    made = designed(model_type, config=MIXTURES[model_type], experts=0)
    student, teacher = model_of(made.config), model_of({"model_type": model_type, **BARE, **MIXTURES[model_type]})
    assert student.config.model_type == dense
    assert made.config["intermediate_size"] == 2 * 96
    assert student.num_parameters() == made.shape.parameter_count
    weights = teacher.state_dict()
    for name, parameter in student.state_dict().items():
        if ".mlp." not in name:
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
    # Without the MLPs both are the same function.
    for model in (student, teacher):
        for layer in model.model.layers:
            layer.mlp.forward = torch.zeros_like
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits, atol=1e-5, rtol=1e-4)


def test_a_smaller_mixture_and_active_parameters() -> None:
    made = designed(
        "qwen3_moe", config=MIXTURES["qwen3_moe"] | {"num_experts": 16, "num_experts_per_tok": 4}, experts=8
    )
    assert (made.shape.expert_count, made.shape.active_experts) == (8, 4)
    assert designed("mixtral", config=MIXTURES["mixtral"], experts=2).shape.active_experts == 2
    big = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1024, "num_hidden_layers": 8}
    active = designed("llama", config=big, experts=4, ratio=0.6, counted="active")
    assert active.shape.active_parameter_count == pytest.approx(0.6 * active.teacher.parameter_count, rel=0.05)
    assert active.shape.parameter_count > 1.2 * active.shape.active_parameter_count


def test_whole_copies_or_narrow_experts() -> None:
    whole = designed("llama", experts=4)
    narrow = designed("llama", experts=4, mlp_width=24)
    assert whole.config["intermediate_size"] == 96 and narrow.config["intermediate_size"] == 24
    # A quarter of the width each: together the dense MLP.
    assert narrow.shape.count_of("experts") == narrow.teacher.count_of("mlp")


@pytest.mark.parametrize(
    ("model_type", "config", "design", "expected"),
    [
        ("qwen2", {}, {"experts": 4}, "experts = 4: a qwen2 teacher has no such student, because it has biases"),
        ("gpt_neox", {}, {"experts": 4}, "parallel residual"),
        ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, {"experts": 0}, "query and key norms together"),
        ("llama", {"attention_bias": True}, {"experts": 4}, "a mixtral layer has no attention_bias"),
        ("llama", {"hidden_act": "gelu"}, {"experts": 4}, "activation is 'gelu'"),
        ("qwen3", {"use_sliding_window": True}, {"experts": 4}, "a qwen3_moe layer has no use_sliding_window"),
        ("llama", {}, {"experts": 0}, "experts = 0: the teacher .* is dense already"),
        ("llama", {}, {"experts": 1}, "experts = 1: one expert is no choice"),
        ("llama", {}, {"active_experts": 2, "ratio": 0.5}, "active_experts = 2: the teacher is dense"),
        ("llama", {}, {"experts": 4, "active_experts": 5}, "active_experts = 5: must be at most experts = 4"),
        ("mixtral", MIXTURES["mixtral"], {"experts": 8}, "experts = 8: the teacher has 4 experts"),
        (
            "mixtral",
            MIXTURES["mixtral"],
            {"active_experts": 5, "ratio": 0.5},
            "active_experts = 5: must be at most the 4",
        ),
    ],
)
def test_experts_that_do_not_map(
    model_type: str, config: dict[str, Any], design: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        designed(model_type, config=config, **design)


def test_the_written_mixture_can_be_read_again() -> None:
    made = designed("qwen3", experts=4)
    assert json.loads(json.dumps(made.config)) == made.config
    again = design_student(made.config, design=DesignConfig(experts=2))
    assert again.shape.expert_count == 2 and again.config["num_experts"] == 2
