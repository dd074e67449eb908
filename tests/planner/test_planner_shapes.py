import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.planner.errors import PlanUnavailableError
from largekd.planner.shapes import FAMILIES, ModelShape, read_shape

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 1},
}


def counted(tmp_path: Path, model_type: str, **changes: Any) -> tuple[ModelShape, Any]:
    """The planner's shape from a saved config.json, and the same model on the meta device."""
    if model_type == "qwen3_moe":
        changes = {"mlp_only_layers": [1], "moe_intermediate_size": 32, "num_experts": 8, **changes}
    config = AutoConfig.for_model(model_type, **SIZES | changes)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return read_shape(json.loads((tmp_path / "config.json").read_text())), model


# These derive the head size from the width.
FIXED_HEADS = ("phi3", "olmo2", "olmoe", "gpt_neox")


@pytest.mark.parametrize(
    ("model_type", "variant"),
    [
        (model_type, variant)
        for model_type in FAMILIES
        for variant in VARIANTS
        if not (variant == "wide heads" and model_type in FIXED_HEADS)
    ],
)
def test_every_tensor_of_the_model_is_counted(tmp_path: Path, model_type: str, variant: str) -> None:
    shape, model = counted(tmp_path, model_type, **VARIANTS[variant])
    assert sorted(tensor.numel for tensor in shape.tensors) == sorted(p.numel() for p in model.parameters())
    assert shape.parameter_count == model.num_parameters()
    assert shape.tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral", "qwen3_moe"])
def test_parts_are_the_modules(tmp_path: Path, model_type: str) -> None:
    shape, model = counted(tmp_path, model_type, tie_word_embeddings=False)

    def size(*words: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if any(word in name for word in words))

    assert shape.count_of("embedding") == size("embed_tokens")
    assert shape.count_of("head") == size("lm_head")
    assert shape.count_of("norm") == size("norm")
    assert shape.count_of("attention") == size("_proj.") - size("mlp.gate_proj.", "mlp.up_proj.", "mlp.down_proj.")
    assert shape.count_of("experts") == size("mlp.experts")
    assert shape.largest_layer == max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)


def test_active_parameters_leave_out_the_experts_that_were_not_chosen(tmp_path: Path) -> None:
    dense, _ = counted(tmp_path, "llama")
    assert dense.active_parameter_count == dense.parameter_count
    mixture, _ = counted(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=1)
    assert mixture.parameter_count - mixture.active_parameter_count == 3 * (3 * 3 * 64 * 96)
    assert mixture.mlp_width == 96


def test_a_student_of_chosen_layers(tmp_path: Path) -> None:
    teacher, _ = counted(tmp_path, "qwen3_moe")
    student = teacher.with_layers([0, 1])
    assert len(student.layers) == 2
    assert teacher.parameter_count - student.parameter_count == sum(tensor.numel for tensor in teacher.layers[2])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "t5"}, "model_type 't5' is not one"),
        ({"model_type": "llama", "hidden_size": 8}, "num_attention"),
    ],
)
def test_what_cannot_be_counted_is_told(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(PlanUnavailableError, match=expected):
        read_shape(config)
