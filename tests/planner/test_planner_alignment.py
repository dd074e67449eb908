"""What alignment and signals of a few ids add to the plan, against real modules and real captured tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_rows, save_tiny_llama

from largekd.config.alignment import AttentionConfig, FeatureConfig
from largekd.config.load import parse_config
from largekd.config.objective import ObjectiveConfig
from largekd.config.run import RunConfig
from largekd.contracts import TapRequest
from largekd.models.decoder import Decoder
from largekd.objectives.attention import AttentionTerm
from largekd.objectives.features import FeatureTerm
from largekd.objectives.layer_maps import pair_layers
from largekd.planner.alignment import TAP_LIMIT_BYTES, alignment_parameters, pair_count
from largekd.planner.memory import MemoryTerm
from largekd.planner.plan import Plan, plan
from largekd.planner.report import plan_text, plan_to_mapping
from largekd.planner.shapes import read_shape

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SMALL = LLAMA | {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, str]]:
    for name, tree in (("teacher", LLAMA), ("student", SMALL)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    return {
        "teacher": {"model": str(tmp_path / "teacher"), "deepspeed": "ds_configs/teacher_zero3.json"},
        "student": {"config": str(tmp_path / "student/config.json"), "deepspeed": "ds_configs/zero3.json"},
    }


def configured(models: dict[str, dict[str, str]], objective: dict[str, Any], **train: Any) -> RunConfig:
    sizes = {"max_steps": 1, "global_batch_size": 16, "micro_batch_size": 2, "sequence_length": 128}
    return parse_config(
        {
            "run": {"dir": "runs/x"},
            **models,
            "data": {"train": "t.jsonl"},
            "train": sizes | {"precision": "bf16"} | train,
            "objective": objective,
            "checkpoint": {"every_steps": 0},
        }
    )


def sizes(made: Plan, *, role: str, name: str) -> list[int]:
    return [term.bytes for term in made.terms if term.role == role and name in term.name]


def added(models: dict[str, dict[str, str]], objective: dict[str, Any], **train: Any) -> list[MemoryTerm]:
    """The terms that the plan without this objective does not have."""
    plain = plan(configured(models, {}, **train), world_size=2)
    made = plan(configured(models, objective, **train), world_size=2)
    assert set(plain.terms) <= set(made.terms)
    return [term for term in made.terms if term not in plain.terms]


def test_an_objective_without_alignment_adds_nothing(models):
    assert added(models, {"alpha": 0.3, "divergences": [{"name": "reverse_kl"}]}) == []
    off = {"features": [{"weight": 0.0}], "attention": [{"weight": 0.0}]}
    assert added(models, off) == []


def test_the_teachers_captured_layers_are_kept_for_the_whole_step(models):
    objective = {
        "features": [{"name": "a"}, {"name": "b", "loss": "cosine"}, {"name": "c", "layers": {"map": "last"}}],
        "attention": [{"layers": {"map": "last", "count": 2}}],
    }
    made = plan(configured(models, objective), world_size=2)
    tokens = 16 // 2 * 128
    # Uniform has a pair for each of the student's three layers, twice the same ones.
    hidden = tokens * (3 + 1) * 512 * 2
    attention = tokens * 2 * (8 + 2 * 4) * 64 * 2
    assert sizes(made, role="teacher", name="captured hidden") == [hidden] * 2
    assert sizes(made, role="teacher", name="captured attention") == [attention] * 2
    four = plan(configured(models, objective, micro_batch_size=1), world_size=4)
    assert sizes(four, role="teacher", name="captured hidden") == [hidden // 2] * 2


def test_drawn_pairs_and_the_depth_bound_what_is_captured(models):
    def captured(**options: Any) -> int:
        made = plan(configured(models, {"features": [options]}), world_size=2)
        return sizes(made, role="teacher", name="captured hidden")[0] // (8 * 128 * 512 * 2)

    assert captured(layers={"map": "uniform"}, sample_pairs=1) == 1
    assert captured(layers={"map": "last", "count": 2}) == 2
    pairs = [[student, teacher] for student in range(3) for teacher in range(8)]
    assert captured(layers={"map": "explicit", "pairs": pairs}) == 8


def test_captured_bytes_are_those_of_real_tensors(tmp_path):
    folder = save_tiny_llama(tmp_path / "model", seed=1, layers=3, hidden=48, heads=8, key_heads=4)
    from transformers import AutoModelForCausalLM

    decoder = Decoder(model=AutoModelForCausalLM.from_pretrained(folder))
    row = make_rows(count=1, packed=True)[0]
    with torch.no_grad():
        outputs = decoder(batch=row, taps=TapRequest(hidden=(0, 2), attention=(1, 2)))
    actual = {
        kind: sum(value.numel() * value.element_size() for name, value in outputs.items() if name.startswith(kind))
        for kind in ("hidden", "attention")
    }
    model = {"model": str(folder), "deepspeed": "ds_configs/zero3.json"}
    objective = {
        "features": [{"layers": {"map": "explicit", "pairs": [[0, 0], [1, 2]]}}],
        "attention": [{"layers": {"map": "last", "count": 2}}],
    }
    made = plan(
        configured(
            {"teacher": model, "student": model},
            objective,
            **{"precision": "fp32", "sequence_length": 24, "micro_batch_size": 1, "global_batch_size": 1},
        ),
        world_size=1,
    )
    for kind, size in actual.items():
        assert sizes(made, role="teacher", name=f"captured {kind}") == [size] * 2


FEATURES: list[dict[str, Any]] = [
    {"projector": {"kind": "pool"}},
    {"projector": {"kind": "linear"}},
    {"projector": {"kind": "linear", "bias": True, "shared": True}},
    {"projector": {"kind": "mlp"}},
    {"projector": {"kind": "mlp", "hidden": 7, "shared": True}},
    {"projector": {"kind": "low_rank_identity", "rank": 3}},
    {"projector": {"kind": "low_rank_identity", "rank": 3, "shared": False}},
    {"projector": {"kind": "linear"}, "loss": "predictive"},
    {"projector": {"kind": "pool"}, "loss": "predictive", "predictor_hidden": 5},
]
ATTENTION: list[dict[str, Any]] = [
    {"head_importance": "learned"},
    {"head_importance": "learned", "match_heads": "repeat"},
    {"head_importance": "learned", "loss": "relation", "relation_heads": 16},
    {"head_importance": "entropy"},
]


@pytest.mark.parametrize("entry", FEATURES)
def test_projectors_are_counted_as_they_are(entry):
    shapes = {"student": read_shape(SMALL), "teacher": read_shape(LLAMA)}
    term = FeatureTerm(
        FeatureConfig.model_validate(entry), pairs=pairs_of({}), student_width=256, teacher_width=512, key="k"
    )
    expected = sum(parameter.numel() for parameter in term.parameters())
    assert alignment_parameters(ObjectiveConfig.model_validate({"features": [entry]}), **shapes) == expected


@pytest.mark.parametrize("entry", ATTENTION)
def test_learned_head_weights_are_counted_as_they_are(entry):
    from largekd.models.taps import AttentionShape

    shapes = {"student": read_shape(SMALL), "teacher": read_shape(LLAMA)}
    heads = {side: AttentionShape(shape.heads, shape.kv_heads, shape.head_dim) for side, shape in shapes.items()}
    term = AttentionTerm(AttentionConfig.model_validate(entry), pairs=pairs_of({}), **heads)
    expected = sum(parameter.numel() for parameter in term.parameters())
    assert alignment_parameters(ObjectiveConfig.model_validate({"attention": [entry]}), **shapes) == expected


def pairs_of(layers: dict[str, Any], *, student: int = 3, teacher: int = 8) -> Any:
    config = FeatureConfig.model_validate({"layers": layers} if layers else {}).layers
    return pair_layers(
        config,
        student_depth=student,
        teacher_depth=teacher,
        kept=tuple(range(student)),
        similarity=torch.rand(student, teacher),
        key="k",
    )


@pytest.mark.parametrize(("student", "teacher"), [(3, 8), (8, 3), (5, 5)])
@pytest.mark.parametrize(
    "layers",
    [
        {"map": "explicit", "pairs": [[0, 0], [-1, -1]]},
        {"map": "uniform"},
        {"map": "uniform", "count": 2},
        {"map": "last", "count": 3},
        {"map": "skip"},
        {"map": "skip", "stride": 3},
        {"map": "closest_non_pruned"},
        {"map": "adaptive", "count": 2},
        {"map": "adaptive"},
    ],
)
def test_pairs_are_as_many_as_the_map_has(layers, student, teacher):
    config = FeatureConfig.model_validate({"layers": layers}).layers
    assert pair_count(config, student, teacher) == len(pairs_of(layers, student=student, teacher=teacher))


def test_projectors_have_weights_gradients_and_optimizer_state(models):
    terms = added(models, {"features": [{"projector": {"kind": "mlp"}}]})
    parameters = 3 * (256 * 512 + 512 + 512 * 512 + 512)
    found = {term.name: term.bytes for term in terms if term.role == "student" and "projector" in term.name}
    assert found == {
        "projectors' weights, own shard": parameters // 2 * 2,
        "projectors' optimizer state, own shard": parameters // 2 * (4 + 8),
        "projectors' gradients, own shard": parameters // 2 * 4,
        "largest projector and its gradient": 2 * parameters // 3 * 2,
    }
    away = models | {"student": models["student"] | {"deepspeed": "ds_configs/zero3_cpu.json"}}
    places = {term.name: term.place for term in added(away, {"features": [{}]}) if "projectors'" in term.name}
    assert set(places.values()) == {"host"} and len(places) == 3


def test_the_student_keeps_rows_gradients_and_with_checkpointing_attention_inputs(models):
    def kept(objective: dict[str, Any], name: str, **train: Any) -> int:
        return sum(
            term.bytes for term in added(models, objective, **train) if term.role == "student" and name in term.name
        )

    tokens = 2 * 128
    linear = {"features": [{"projector": {"kind": "linear"}, "layers": {"map": "last"}}]}
    assert kept(linear, "compared hidden") == tokens * (256 + 512) * 2
    attention = {"attention": [{"layers": {"map": "last"}, "query_block": 16}]}
    assert kept(attention, "gradients of attention") == tokens * (4 + 2) * 64 * 4
    assert kept(attention, "captured attention") == 0
    assert kept(attention, "captured attention", activation_checkpointing=True) == tokens * (4 + 2 * 2) * 64 * 2
    maps = kept(attention, "attention maps")
    assert maps % (tokens * 8 * 16 * 4) == 0 and maps == kept(attention, "attention maps", sequence_length=128)


@pytest.mark.parametrize(
    ("objective", "per_token"),
    [
        ({"signal": {"kind": "top_k", "k": 64}}, 64 * 12),
        ({"signal": {"kind": "sampled", "draws": 10}}, 10 * 16),
        ({"translation": {"method": "spans", "top_k": 32}}, 32 * 12),
    ],
)
def test_signals_of_a_few_ids_are_counted_for_a_micro_batch(models, objective, per_token):
    term, logits = added(models, objective)
    assert (term.role, term.phase, term.bytes) == ("teacher", "student", 2 * 128 * per_token)
    # Four float32 copies of the logits of at most 256 tokens; the micro-batch has as many.
    assert (logits.role, logits.phase, logits.bytes) == ("teacher", "student", 4 * 256 * LLAMA["vocab_size"] * 4)
    assert added(models, objective | {"alpha": 0.0, "divergences": []}) == []


def test_a_step_that_captures_too_much_is_warned_of(models, tmp_path):
    objective = {"features": [{"layers": {"map": "uniform"}}]}
    rows = TAP_LIMIT_BYTES // (2048 * 3 * 512 * 2) + 1
    many = configured(models, objective, sequence_length=2048, global_batch_size=rows, micro_batch_size=1)
    made = plan(many, world_size=1)
    (warning,) = made.warnings
    for key in ("train.global_batch_size", "train.micro_batch_size", "objective.features", "sample_pairs"):
        assert key in warning
    assert f"warning: {warning}" in plan_text(many, world_size=1).splitlines()
    assert plan_to_mapping(made)["warnings"] == [warning]
    fewer = configured(models, objective, sequence_length=2048, global_batch_size=rows - 1, micro_batch_size=1)
    assert plan(fewer, world_size=1).warnings == ()
    assert "warning" not in plan_text(fewer, world_size=1)


def test_the_dry_run_shows_the_entries(models):
    objective = {"features": [{}], "attention": [{}], "signal": {"kind": "top_k", "k": 8}}
    text = plan_text(configured(models, objective), world_size=2)
    assert all(" accelerator " in line for line in text.splitlines() if "accelerator" in line)
    for name in ("captured hidden states", "captured attention", "projectors' weights", "signal of a few ids"):
        assert name in text, name
