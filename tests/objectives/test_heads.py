"""Matching of head counts, and weights of heads."""

from typing import Any

import pytest
import torch

from largekd.config.alignment import AttentionConfig
from largekd.errors import ConfigError
from largekd.models.taps import AttentionShape
from largekd.objectives.heads import (
    LearnedHeadWeights,
    match_maps,
    matched_heads,
    matching_weights,
    teacher_importance,
)


def shape(heads: int, **options: Any) -> AttentionShape:
    return AttentionShape(**{"heads": heads, "key_heads": 1, "head_width": 8, **options})


@pytest.mark.parametrize(
    ("mode", "student", "teacher", "expected"),
    [
        ("group", 4, 12, 4),
        ("group", 12, 4, 4),
        ("repeat", 4, 12, 12),
        ("repeat", 12, 4, 12),
        ("pool", 14, 9, 9),
        ("pool", 9, 14, 9),
        ("group", 7, 7, 7),
        ("repeat", 7, 7, 7),
    ],
)
def test_matched_counts(mode: str, student: int, teacher: int, expected: int) -> None:
    config = AttentionConfig(match_heads=mode)
    assert matched_heads(config, student=shape(student), teacher=shape(teacher)) == expected


@pytest.mark.parametrize("mode", ["group", "repeat"])
def test_counts_that_do_not_divide_are_refused_with_both_counts_and_the_remedy(mode: str) -> None:
    config = AttentionConfig(match_heads=mode, name="maps")
    with pytest.raises(ConfigError, match=r"objective\.attention\.maps\.match_heads.*14.*9.*'pool'"):
        matched_heads(config, student=shape(14), teacher=shape(9))


def test_widths_that_relation_heads_do_not_divide_are_refused() -> None:
    config = AttentionConfig(loss="relation", relation_heads=6, relations=("qk",))
    assert matched_heads(config, student=shape(3), teacher=shape(9)) == 6
    with pytest.raises(ConfigError, match=r"objective\.attention\.attention\.relation_heads is 6.*teacher's width 40"):
        matched_heads(config, student=shape(3), teacher=shape(5))


def test_widths_of_values_matter_for_relations_of_values_alone() -> None:
    narrow = shape(3, value_width=5)
    config = AttentionConfig(loss="relation", relation_heads=6, relations=("qk",))
    assert matched_heads(config, student=narrow, teacher=shape(3)) == 6
    with pytest.raises(ConfigError, match="student's width 15"):
        matched_heads(config.model_copy(update={"relations": ("qk", "vv")}), student=narrow, teacher=shape(3))


def maps(heads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(heads)
    return torch.softmax(torch.randn(2, heads, 3, 5, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize(("count", "into"), [(12, 4), (9, 3), (14, 9), (5, 2), (7, 6)])
def test_fewer_heads_are_adaptive_average_pooling(count: int, into: int) -> None:
    source = maps(count)
    expected = torch.nn.functional.adaptive_avg_pool1d(source.permute(0, 2, 3, 1).reshape(-1, 1, count), into)
    found = match_maps(source, matching_weights(count, into, like=source))
    torch.testing.assert_close(found, expected.reshape(2, 3, 5, into).permute(0, 3, 1, 2))
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)))


def test_divisible_counts_are_means_of_groups() -> None:
    source = maps(12)
    found = match_maps(source, matching_weights(12, 4, like=source))
    torch.testing.assert_close(found, source.unflatten(1, (4, 3)).mean(2))


def test_more_heads_are_repeats() -> None:
    source = maps(4)
    found = match_maps(source, matching_weights(4, 12, like=source))
    torch.testing.assert_close(found, source.repeat_interleave(3, dim=1), rtol=0, atol=0)


def test_equal_counts_are_left_alone() -> None:
    source = maps(4)
    assert matching_weights(4, 4, like=source) is None
    assert match_maps(source, None) is source


def test_learned_weights_start_equal_and_sum_to_one() -> None:
    module = LearnedHeadWeights(pairs=2, heads=5)
    torch.testing.assert_close(module(), torch.full((2, 5), 0.2))
    with torch.no_grad():
        module.logits_PH.copy_(torch.randn(2, 5))
    torch.testing.assert_close(module().sum(1), torch.ones(2))
    assert module.bfloat16()().dtype == torch.float32


@pytest.mark.parametrize("kind", ["entropy", "variance"])
def test_focused_heads_weigh_more_and_weights_sum_to_one(kind: Any) -> None:
    flat, middle, sharp = [0.25] * 4, [0.4, 0.3, 0.2, 0.1], [0.97, 0.01, 0.01, 0.01]
    row = torch.tensor([flat, middle, sharp])[None, :, None]
    weights = teacher_importance(kind, row, columns_BQ=torch.tensor([[4]]))[0, :, 0]
    assert weights[0] < weights[1] < weights[2]
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_entropy_weights_are_inverse_to_the_number_of_keys_in_use() -> None:
    row = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4])[None, :, None]
    weights = teacher_importance("entropy", row, columns_BQ=torch.tensor([[4]]))[0, :, 0]
    torch.testing.assert_close(weights, torch.tensor([4.0, 2, 1]) / 7)


@pytest.mark.parametrize("kind", ["entropy", "variance"])
def test_one_visible_key_gives_equal_weights(kind: Any) -> None:
    row = torch.tensor([1.0, 0, 0]).expand(1, 5, 1, 3)
    weights = teacher_importance(kind, row, columns_BQ=torch.tensor([[1]]))
    torch.testing.assert_close(weights, torch.full((1, 5, 1), 0.2))
