"""Operations, bytes and published results of designed students."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from largekd.config.design import DesignConfig
from largekd.planner.capacity import EVIDENCE, TASKS, expectations, guidance, recommended_ratio
from largekd.planner.deployment import PRESETS, read_budget
from largekd.planner.design import design_student
from largekd.planner.design_report import render_design, side_by_side
from largekd.planner.figures import BITS, cache_bytes, cache_bytes_per_token, forward_flops, weight_bytes
from largekd.planner.shapes import read_shape

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 211,
    "tie_word_embeddings": True,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
LARGE = LLAMA | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2816}


def model_of(config: dict[str, Any]) -> Any:
    hugging_face = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(hugging_face, dtype=torch.bfloat16, attn_implementation="eager").eval()


@pytest.mark.parametrize("config", [LLAMA, LLAMA | {"tie_word_embeddings": False, "head_dim": 32}])
def test_operations_are_those_that_torch_counts(config: dict[str, Any]) -> None:
    tokens = 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model_of(config)(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    # Eager attention computes the whole square, twice what a causal sequence needs; the rotary product is small.
    expected = tokens * forward_flops(read_shape(config), context_tokens=2 * tokens)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_a_token_of_a_mixture_costs_its_active_experts() -> None:
    dense = LLAMA | {"intermediate_size": 320}
    router = 3 * 4 * 64
    difference = forward_flops(read_shape(MIXTRAL), context_tokens=8) - forward_flops(
        read_shape(dense), context_tokens=8
    )
    assert difference == 2 * router


def test_the_cache_is_as_large_as_transformers_makes_it() -> None:
    config, tokens = LLAMA | {"head_dim": 32}, 16
    cache = DynamicCache()
    with torch.no_grad():
        model_of(config)(input_ids=torch.zeros(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    shape = read_shape(config)
    assert held == tokens * cache_bytes_per_token(shape) == cache_bytes(config, shape=shape, context_tokens=tokens)


def test_a_window_bounds_the_cache() -> None:
    config = LLAMA | {"model_type": "gemma2", "sliding_window": 8, "num_hidden_layers": 4}
    shape = read_shape(config | {"head_dim": 16})
    one = 2 * 2 * shape.kv_heads * shape.head_dim
    assert cache_bytes(config, shape=shape, context_tokens=100) == one * (2 * 8 + 2 * 100)
    everywhere = config | {"model_type": "mistral"}
    assert cache_bytes(everywhere, shape=shape, context_tokens=100) == one * 4 * 8
    assert cache_bytes(everywhere | {"sliding_window": None}, shape=shape, context_tokens=100) == one * 400
    late = config | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3}
    assert cache_bytes(late, shape=shape, context_tokens=100) == one * (3 * 100 + 8)


def test_stored_weights() -> None:
    shape = read_shape(LLAMA)
    assert weight_bytes(shape, storage="bf16") == 2 * shape.parameter_count
    # 18 bytes for 32 weights.
    assert weight_bytes(shape, storage="int4") == round(shape.parameter_count * 18 / 32)
    assert sorted(BITS.values(), reverse=True) == [32.0, 16.0, 16.0, 8.5, 4.5]


def test_budgets_by_place() -> None:
    for name, preset in PRESETS.items():
        found = read_budget(DesignConfig(deploy=name))
        assert found == preset and preset.source
    own = read_budget(DesignConfig(deploy="mobile", storage="int8", context_tokens=7))
    assert own is not None and (own.storage, own.context_tokens, own.bytes) == ("int8", 7, PRESETS["mobile"].bytes)
    assert read_budget(DesignConfig(ratio=0.5)) is None
    teacher = LARGE | {"num_hidden_layers": 80, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000}
    sizes = [design_student(teacher, design=DesignConfig(deploy=place)).shape.parameter_count for place in PRESETS]
    edge, mobile, browser, server = sizes
    assert mobile < edge < browser < server


def test_published_results() -> None:
    for entry in EVIDENCE:
        assert 0 < entry.ratio < 1 and 0 < entry.kept < 1.1 and entry.source
    half = {made.task: made.kept for made in expectations(0.5)}
    assert set(half) == set(TASKS)
    assert half["competition"] is None
    low, high = half["arithmetic"] or (0, 0)
    # Depth against width: the range says how little one figure would.
    assert low < 0.4 and high > 0.8
    assert all(made.kept is None for made in expectations(1 / 100))


def test_recommended_ratios_follow_the_difficulty() -> None:
    simple, arithmetic = recommended_ratio("simple", kept=0.75), recommended_ratio("arithmetic", kept=0.75)
    assert simple is not None and arithmetic is not None and simple[0] < arithmetic[0]
    assert recommended_ratio("competition", kept=0.5) is None
    assert recommended_ratio("simple", kept=0.99) is None


def test_guidance_says_where_there_is_no_figure() -> None:
    tiny = "\n".join(guidance(ratio=0.01, parameters=10**8, keep="width"))
    assert tiny.count("no reliable figure") == len(TASKS) and "2.5 times" in tiny and "--keep depth" in tiny
    larger = guidance(ratio=5.0, parameters=10**9, keep="depth")
    assert len(larger) == 1 and "not smaller" in larger[0]


def test_the_report_shows_both_models_and_the_target() -> None:
    made = design_student(LARGE, design=DesignConfig(ratio=0.25))
    text = render_design(made, teacher=LARGE, keep="balanced")
    assert f"{made.shape.parameter_count:,}" in text and f"{made.teacher.parameter_count:,}" in text
    assert f"achieved {made.shape.parameter_count:,}" in text and "published results" in text
    untied = design_student(LARGE | {"vocab_size": 200_000}, design=DesignConfig(ratio=0.3, tied=False))
    assert any("tied = true would save" in note for note in untied.notes)
    both = side_by_side({"balanced": made, "width": "no shape"}, teacher=LARGE)
    assert "teacher" in both.splitlines()[0] and both.splitlines()[-1] == "width: no shape"
