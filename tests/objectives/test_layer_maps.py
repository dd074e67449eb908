"""Layer maps: closed forms, refusals that name the key, and the drawing of pairs."""

from itertools import combinations, combinations_with_replacement, pairwise

import pytest
import torch
from pydantic import TypeAdapter

from largekd.config.alignment import LayersConfig
from largekd.errors import ConfigError
from largekd.objectives.layer_maps import LayerPair, check_sample_pairs, pair_layers, sample_pairs

KEY = "objective.features.0"


def pairs_of(config: dict, *, student: int, teacher: int, kept=None, similarity=None) -> list[tuple[int, int]]:
    parsed = TypeAdapter(LayersConfig).validate_python(config)
    result = pair_layers(
        parsed, student_depth=student, teacher_depth=teacher, kept=kept, similarity=similarity, key=KEY
    )
    assert all(0 <= pair.student < student and 0 <= pair.teacher < teacher for pair in result)
    assert len(set(result)) == len(result)
    return [tuple(pair) for pair in result]


def test_explicit_pairs_count_from_either_end() -> None:
    pairs = pairs_of({"map": "explicit", "pairs": [[-1, -1], [0, 2], [3, -24]]}, student=4, teacher=24)
    assert pairs == [(3, 23), (0, 2), (3, 0)]


@pytest.mark.parametrize(
    ("config", "student", "teacher", "expected"),
    [
        ({"map": "uniform"}, 4, 4, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ({"map": "uniform"}, 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ({"map": "uniform", "count": 2}, 6, 24, [(2, 11), (5, 23)]),
        ({"map": "uniform", "count": 1}, 5, 7, [(4, 6)]),
        ({"map": "uniform", "count": 3}, 8, 8, [(2, 2), (4, 4), (7, 7)]),
        ({"map": "uniform"}, 6, 2, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]),
        ({"map": "last", "count": 3}, 4, 9, [(1, 6), (2, 7), (3, 8)]),
        ({"map": "skip", "stride": 2}, 6, 12, [(1, 3), (3, 7), (5, 11)]),
        ({"map": "skip", "stride": 2, "teacher_stride": 3}, 5, 9, [(0, 2), (2, 5), (4, 8)]),
        ({"map": "skip", "stride": 2}, 5, 2, [(0, 0), (2, 0), (4, 1)]),
        ({"map": "skip", "stride": 9}, 5, 7, [(4, 6)]),
    ],
)
def test_maps_by_rule(config: dict, student: int, teacher: int, expected: list[tuple[int, int]]) -> None:
    assert pairs_of(config, student=student, teacher=teacher) == expected


@pytest.mark.parametrize("student", range(1, 13))
@pytest.mark.parametrize("teacher", [1, 3, 12, 17])
def test_uniform_maps_of_any_depths_ascend_and_end_with_the_last(student: int, teacher: int) -> None:
    for count in range(1, student + 1):
        pairs = pairs_of({"map": "uniform", "count": count}, student=student, teacher=teacher)
        assert len(pairs) == count and pairs[-1] == (student - 1, teacher - 1)
        gaps = [later[0] - earlier[0] for earlier, later in pairwise(pairs)]
        assert all(gap >= 1 for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)
        assert [pair[1] for pair in pairs] == sorted(pair[1] for pair in pairs)


def test_closest_non_pruned_sends_every_teacher_layer_to_the_nearest_kept_one() -> None:
    pairs = pairs_of({"map": "closest_non_pruned"}, student=3, teacher=7, kept=[0, 4, 6])
    # Teacher layers 2 and 5 are as far from two kept ones: the deeper has them.
    assert pairs == [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4), (2, 5), (2, 6)]


@pytest.mark.parametrize(("student", "count", "teacher"), [(3, 3, 6), (5, 3, 7), (4, 4, 4), (5, 5, 3)])
def test_adaptive_maximises_similarity_over_all_monotone_choices(student: int, count: int, teacher: int) -> None:
    for seed in range(20):
        similarity = torch.rand(student, teacher, generator=torch.Generator().manual_seed(seed))
        pairs = pairs_of({"map": "adaptive", "count": count}, student=student, teacher=teacher, similarity=similarity)
        layers = [pair[0] for pair in pairs]
        assert layers == [pair[0] for pair in pairs_of({"map": "uniform", "count": count}, student=student, teacher=8)]
        choose = combinations if teacher >= count else combinations_with_replacement
        sums = {
            sum(float(similarity[i, j]) for i, j in zip(layers, chosen, strict=True)): list(chosen)
            for chosen in choose(range(teacher), count)
        }
        assert [pair[1] for pair in pairs] == sums[max(sums)]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"map": "explicit", "pairs": [[0, 0], [4, 0]]}, ["layers.pairs.1", "4 is no layer of the student", "0 to 3"]),
        ({"map": "explicit", "pairs": [[0, -7]]}, ["layers.pairs.0", "-7 is no layer of the teacher", "-6 to -1"]),
        ({"map": "explicit", "pairs": [[0, 5], [0, -1]]}, ["layers.pairs.1", "paired before"]),
        ({"map": "uniform", "count": 5}, ["layers.count = 5", "4 layers"]),
        ({"map": "adaptive", "count": 5}, ["layers.count = 5", "4 layers"]),
        ({"map": "last", "count": 5}, ["layers.count = 5", "4 layers"]),
        ({"map": "skip", "stride": 1, "teacher_stride": 2}, ["layers.teacher_stride = 2", "layers.stride"]),
        ({"map": "closest_non_pruned"}, ["layers.map", "student.teacher_layers"]),
    ],
)
def test_impossible_maps_are_refused_with_the_key_to_change(config: dict, named: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        pairs_of(config, student=4, teacher=6, similarity=torch.zeros(4, 6))
    for text in [f"{KEY}.layers", *named]:
        assert text in str(refusal.value)


def test_drawn_pairs_are_one_of_each_block_and_depend_on_seed_and_step_alone() -> None:
    pairs = tuple(LayerPair(i, 2 * i) for i in range(7))
    drawn = [sample_pairs(pairs, count=3, seed=5, step=step) for step in range(300)]
    blocks = [pairs[0:2], pairs[2:4], pairs[4:7]]
    for one in drawn:
        assert all(pair in block for pair, block in zip(one, blocks, strict=True))
    assert set().union(*drawn) == set(pairs)
    thirds = [sum(pair in one for one in drawn) / 300 for pair in blocks[2]]
    assert all(abs(share - 1 / 3) < 0.1 for share in thirds)
    torch.manual_seed(99)
    assert drawn == [sample_pairs(pairs, count=3, seed=5, step=step) for step in range(300)]
    assert drawn != [sample_pairs(pairs, count=3, seed=6, step=step) for step in range(300)]
    assert sample_pairs(pairs, count=7, seed=0, step=0) == pairs


def test_more_drawn_pairs_than_there_are_is_refused() -> None:
    pairs = (LayerPair(0, 0), LayerPair(1, 1))
    check_sample_pairs(2, pairs=pairs, key=KEY)
    check_sample_pairs(None, pairs=pairs, key=KEY)
    with pytest.raises(ConfigError, match=r"objective\.features\.0\.sample_pairs = 3.*2 pairs"):
        check_sample_pairs(3, pairs=pairs, key=KEY)
