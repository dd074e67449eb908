"""Which routers are compared, over which experts, and what is refused before anything is trained."""

import json

import pytest
import torch
from tiny_moe import tiny_moe
from transformers import AutoModelForCausalLM, LlamaConfig

from largekd.config.objective import ObjectiveConfig
from largekd.distillation.router import build_router
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder
from largekd.objectives.terms import build_objective


@pytest.fixture(scope="module")
def teacher():
    return Decoder(model=tiny_moe("mixtral", seed=1, layers=4))


@pytest.fixture(scope="module")
def student():
    return Decoder(model=tiny_moe("qwen3_moe", seed=2, layers=2))


@pytest.fixture(scope="module")
def small():
    return Decoder(model=tiny_moe("olmoe", seed=3, layers=2, num_experts=3))


def built(student, teacher, router, **options):
    objective = build_objective(ObjectiveConfig.model_validate({"router": router}))
    return build_router(objective, student=student, teacher=teacher, teacher_kind="online", **options)


def test_layers_are_paired_by_depth_by_origin_or_as_written(student, teacher):
    def pairs(router, **options):
        return [tuple(pair.layers) for pair in built(student, teacher, router, **options).pairs]

    assert pairs({"distil": {}}) == [(0, 1), (1, 3)]
    assert pairs({"distil": {}}, kept=(0, 3)) == [(0, 0), (1, 3)]
    assert pairs({"distil": {"pairs": [[1, 2]]}}) == [(1, 2)]


def test_terms_are_those_with_a_weight(student, teacher):
    assert built(student, teacher, {}).terms == ("load_balance", "router_z")
    assert built(student, None, {"balance": 0, "z": 0}).terms == ()
    silent = built(student, None, {"z": 0, "distil": {"weight": 0}})
    assert silent.terms == ("load_balance",) and silent.pairs == ()
    assert (
        build_router(build_objective(ObjectiveConfig()), student=student, teacher=None, teacher_kind="online") is None
    )


def test_an_expert_map_from_the_configuration_or_a_file(small, teacher, tmp_path):
    inline = built(small, teacher, {"distil": {"expert_map": [0, 1, 1, 2]}})
    assert [pair.compared for pair in inline.pairs] == [3, 3]
    table = tmp_path / "map.json"
    table.write_text(json.dumps({"0": [0, 1, 1, 2], "1": [2, -1, 0, -1]}))
    first, second = built(small, teacher, {"distil": {"expert_map": str(table)}}).pairs
    assert first.student_X is None and first.teacher_X.tolist() == [0, 1, 1, 2]
    assert second.compared == 2
    assert second.student_X.tolist() == [0, -1, 1] and second.teacher_X.tolist() == [1, -1, 0, -1]
    assert torch.equal(first.teacher_X, inline.pairs[0].teacher_X)


@pytest.mark.parametrize(
    ("distil", "match"),
    [
        ({"pairs": [[0, 9]]}, r"pairs \(teacher\): layer 9 does not exist"),
        ({"expert_map": [0, 1, 2]}, r"has 3 entries: the student has 4 experts and the teacher 4; it needs 4"),
        ({"expert_map": [0, 1, 2, 4]}, r"student layer 0\): 4 is no expert; give 0 to 3"),
        ({"expert_map": "nowhere.json"}, r"expert_map = 'nowhere.json': cannot be read as JSON"),
    ],
)
def test_what_does_not_map_is_refused(student, teacher, distil, match):
    with pytest.raises(ConfigError, match=match):
        built(student, teacher, {"distil": distil})


def test_unequal_counts_need_a_map(small, teacher):
    with pytest.raises(ConfigError, match=r"expert_map = null: the student has 3 experts and the teacher 4"):
        built(small, teacher, {"distil": {}})


def test_a_file_without_a_layer_is_refused(student, teacher, tmp_path):
    table = tmp_path / "map.json"
    table.write_text(json.dumps({"0": [0, 1, 2, 3], "1": "all"}))
    with pytest.raises(ConfigError, match=r"has no list of expert indices under '1'"):
        built(student, teacher, {"distil": {"expert_map": str(table)}})


def test_dense_models_and_absent_teachers_are_refused(student):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = Decoder(model=AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=101, **shape)))
    with pytest.raises(ConfigError, match=r"the student, a 'llama' model, has no router"):
        built(dense, None, {})
    with pytest.raises(ConfigError, match=r"the teacher, a 'llama' model, has no router"):
        built(student, dense, {"distil": {}})
    with pytest.raises(ConfigError, match=r"a teacher of kind 'online' has no router in this job"):
        built(student, None, {"distil": {}})
