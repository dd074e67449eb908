"""Designed students of every family: transformers builds them with as many parameters, and their sizes fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.config.design import DesignConfig
from largekd.errors import ConfigError
from largekd.planner.design import Design, design_student
from largekd.planner.design_space import Sizes, grid_step, nearest_heads
from largekd.planner.shapes import FAMILIES

KEEPS = ("depth", "width", "balanced")
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "vocab_size": 301,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32},
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
        "mlp_only_layers": [0],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256},
    "qwen2": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 9},
}


def teacher_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """A teacher's config.json as transformers writes it."""
    config = AutoConfig.for_model(model_type, **SIZES | MORE.get(model_type, {}) | changes)
    return dict(json.loads(config.to_json_string(use_diff=False)))


def designed(teacher: dict[str, Any], **design: Any) -> Design:
    return design_student(teacher, design=DesignConfig(**design))


def built(design: Design, folder: Path) -> Any:
    """The model on the meta device, from the written config.json."""
    (folder / "config.json").write_text(json.dumps(design.config), encoding="utf-8")
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == design.shape.model_type
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


@pytest.mark.parametrize("ratio", [0.6, 0.3])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_model_has_the_counted_parameters(tmp_path: Path, model_type: str, keep: str, ratio: float) -> None:
    # Whole layers of twelve are up to a seventh away from 0.3.
    made = designed(teacher_config(model_type), ratio=ratio, keep=keep, tolerance=0.15)
    model = built(made, tmp_path)
    shape, config = made.shape, model.config
    assert shape.parameter_count == model.num_parameters()
    assert made.ratio == pytest.approx(ratio, rel=0.15 if keep == "width" else 0.07)
    assert shape.heads % shape.kv_heads == 0
    assert shape.width % grid_step(SIZES["hidden_size"]) == 0
    head_dim = made.teacher.head_dim
    assert shape.head_dim == head_dim and shape.tied == made.teacher.tied
    query = next(
        parameter
        for name, parameter in model.named_parameters()
        if "q_proj.weight" in name or "qkv" in name or "query_key_value.weight" in name
    )
    rows = query.shape[0]
    fused = FAMILIES[model_type].fused
    assert rows == (shape.heads + 2 * shape.kv_heads * fused) * head_dim
    assert len(shape.layers) == SIZES["num_hidden_layers"] if keep == "depth" else len(shape.layers) < 12
    assert shape.width == SIZES["hidden_size"] if keep == "width" else shape.width < 512
    assert config.num_hidden_layers == len(shape.layers)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "gemma3_text", "qwen3_moe"])
def test_a_larger_ratio_never_gives_a_smaller_student(model_type: str, keep: str) -> None:
    teacher, counts, exact = teacher_config(model_type), [], 0
    for percent in range(10, 100, 3):
        made = designed(teacher, ratio=percent / 100, keep=keep, tolerance=10.0)
        counts.append(made.shape.parameter_count)
        exact += abs(made.ratio / (percent / 100) - 1) < 0.05
    assert counts == sorted(counts)
    assert len(set(counts)) > 8 and exact > 15


def test_budgets_are_filled_but_not_exceeded() -> None:
    teacher = teacher_config("llama")
    achieved = []
    for budget in range(10_000_000, 50_000_000, 2_000_000):
        made = designed(teacher, memory_bytes=budget, storage="bf16", context_tokens=256)
        cached = 2 * 2 * 256 * len(made.shape.layers) * made.shape.kv_heads * made.shape.head_dim
        assert made.achieved == 2 * made.shape.parameter_count + cached <= budget
        achieved.append(made.achieved / budget)
    assert min(achieved) > 0.85
    smaller = designed(teacher, memory_bytes=20_000_000, storage="int4", context_tokens=256)
    larger = designed(teacher, memory_bytes=20_000_000, storage="bf16", context_tokens=256)
    assert smaller.shape.parameter_count > larger.shape.parameter_count


def test_sizes_that_are_given_are_kept() -> None:
    teacher = teacher_config("llama")
    half = designed(teacher, width=256)
    assert (len(half.shape.layers), half.shape.width) == (12, 256)
    assert (half.shape.heads, half.shape.kv_heads, half.config["intermediate_size"]) == (8, 2, 704)
    given = designed(teacher, layers=6, heads=8, kv_heads=1, mlp_width=512, tied=True)
    assert (len(given.shape.layers), given.shape.heads, given.shape.kv_heads) == (6, 8, 1)
    assert given.config["intermediate_size"] == 512 and given.shape.tied
    met = designed(teacher, ratio=0.55, layers=8, keep="width")
    assert (len(met.shape.layers), met.shape.width) == (8, 512) and met.ratio == pytest.approx(0.55, rel=0.02)


@pytest.mark.parametrize(
    ("model_type", "depth", "key", "expected"),
    [
        ("gemma3_text", 8, "layer_types", "sssssfss"),
        ("gemma3_text", 4, "layer_types", "sssf"),
        ("gemma2", 5, "layer_types", "sfsfs"),
        ("qwen2", 4, "layer_types", "fffs"),
    ],
)
def test_kinds_of_layers_stay_a_pattern(model_type: str, depth: int, key: str, expected: str) -> None:
    made = designed(teacher_config(model_type), layers=depth)
    assert "".join(kind[0] for kind in made.config[key]) == expected
    # A config that leaves the pattern to the family's code gives the same student.
    silent = {name: value for name, value in teacher_config(model_type).items() if name != key}
    if model_type != "qwen2":
        assert designed(silent, layers=depth).config[key] == made.config[key]


def test_layers_without_rotary_or_experts_are_kept_in_kind() -> None:
    rotary = designed(teacher_config("smollm3"), layers=6).config["no_rope_layers"]
    assert rotary == [1, 1, 1, 0, 1, 1]
    mixture = designed(teacher_config("qwen3_moe"), layers=6)
    assert mixture.config["mlp_only_layers"] == [0]
    assert [any(tensor.part == "experts" for tensor in layer) for layer in mixture.shape.layers] == [False] + [True] * 5
    windows = designed(teacher_config("qwen2"), layers=4).config["max_window_layers"]
    assert windows == 3


def test_what_describes_the_teachers_files_is_left_out() -> None:
    teacher = teacher_config("llama") | {"quantization_config": {"bits": 4}, "auto_map": {}, "_name_or_path": "x"}
    config = designed(teacher, ratio=0.5).config
    assert not {"quantization_config", "auto_map", "_name_or_path"} & set(config)
    assert config["max_position_embeddings"] == 256 and config["rope_parameters"] == teacher["rope_parameters"]


@pytest.mark.parametrize(
    ("model_type", "design", "expected"),
    [
        ("llama", {"ratio": 0.001}, r"student\.design\.ratio: .*less than the smallest valid shape"),
        ("llama", {"parameters": 10**9}, r"student\.design\.parameters: .*more than the largest valid shape"),
        ("llama", {"ratio": 1.5}, r"student\.design\.ratio: .*more than the largest"),
        ("llama", {"memory_bytes": 10**9}, r"memory_bytes: the budget .*holds the whole model"),
        ("llama", {"deploy": "mobile"}, r"student\.design\.deploy: the budget of 600,000,000 bytes holds the whole"),
        ("llama", {"memory_bytes": 1000}, r"memory_bytes: .*less than the smallest"),
        ("llama", {"ratio": 0.155, "keep": "width", "tolerance": 0.001}, r"nearest valid shape has .*tolerance"),
        ("llama", {"ratio": 0.5, "parameters": 7}, r"student\.design\.parameters: ratio is given as well"),
        ("llama", {}, r"student\.design\.ratio: no target is given"),
        ("llama", {"layers": 12}, r"the given sizes are the teacher's own"),
        ("llama", {"layers": 13}, r"student\.design\.layers = 13: the teacher has 12"),
        ("llama", {"width": 576}, r"student\.design\.width = 576: the teacher's is 512"),
        ("llama", {"heads": 6}, r"student\.design\.heads = 6: transformers refuses a llama .*512"),
        ("llama", {"heads": 6, "kv_heads": 4}, r"kv_heads = 4: must divide heads = 6"),
        ("llama", {"width": 256, "kv_heads": 3}, r"kv_heads = 3: must divide the 8 query heads"),
        ("olmo2", {"width": 272}, r"student\.design\.width = 272: olmo2 takes hidden_size / heads"),
        ("olmo2", {"width": 256, "heads": 6}, r"student\.design\.heads = 6: .*256 / 6 is not an even whole number"),
        ("gpt_neox", {"width": 256, "kv_heads": 2}, r"kv_heads = 2: gpt_neox has a key head for each"),
        ("llama", {"ratio": 0.5, "storage": "int4"}, r"student\.design\.storage: only memory_bytes and deploy"),
    ],
)
def test_designs_that_cannot_be(model_type: str, design: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        designed(teacher_config(model_type), **design)


def test_a_teacher_whose_heads_are_no_groups() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.model: .*= 16 is not a multiple of num_key_value_heads = 3"):
        designed(teacher_config("llama") | {"num_key_value_heads": 3}, ratio=0.5)


@pytest.mark.parametrize(
    ("ideal", "heads", "kv_heads", "expected"),
    [
        (8.0, 9, 3, (9, 3)),
        (6.0, 9, 3, (6, 2)),
        (11.0, 14, 2, (14, 2)),
        (3.0, 14, 2, (3, 1)),
        (5.0, 8, 1, (5, 1)),
        (5.4, 16, 16, (5, 5)),
        (24.0, 64, 8, (24, 3)),
        (64.0, 64, 8, (64, 8)),
    ],
)
def test_heads_keep_whole_groups_where_they_can(
    ideal: float, heads: int, kv_heads: int, expected: tuple[int, int]
) -> None:
    assert nearest_heads(ideal, full=Sizes(1, heads * 64, heads, kv_heads, 64, 1)) == expected


def test_heads_that_must_divide_the_width() -> None:
    full = Sizes(1, 576, 9, 3, 64, 1)
    assert nearest_heads(5.0, full=full) == (6, 2)
    assert nearest_heads(5.0, full=full, divided=320) == (4, 1)
    assert nearest_heads(6.0, full=full, divided=384) == (6, 2)
    # Nothing near: the closest divisor.
    assert nearest_heads(7.0, full=Sizes(1, 704, 11, 11, 64, 1), divided=704) == (8, 8)


def test_sizes_are_multiples_that_hardware_likes() -> None:
    assert [grid_step(size) for size in (64, 256, 512, 576, 2047, 2048, 30)] == [8, 32, 64, 64, 64, 128, 8]
