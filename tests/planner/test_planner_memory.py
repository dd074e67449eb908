import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.config.load import parse_config
from largekd.config.render import config_to_mapping
from largekd.config.run import RunConfig
from largekd.errors import ConfigError
from largekd.planner.memory import layer_activation_bytes, peak_bytes
from largekd.planner.plan import Plan, plan
from largekd.planner.report import plan_record, plan_text, render_plan
from largekd.planner.shapes import read_shape

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": 32_000,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    return tmp_path / "teacher"


def configured(
    teacher_folder: Path, *, teacher: str = "teacher_zero3", student: str = "zero3", **train: Any
) -> RunConfig:
    return parse_config(
        {
            "run": {"dir": "runs/x"},
            "teacher": {"model": str(teacher_folder), "deepspeed": f"ds_configs/{teacher}.json"},
            "student": {"teacher_layers": [0, 3, 7], "deepspeed": f"ds_configs/{student}.json"},
            "data": {"train": "t.jsonl"},
            "train": {"max_steps": 1, "global_batch_size": 16, "micro_batch_size": 2, "sequence_length": 128} | train,
            "checkpoint": {"every_steps": 0},
        }
    )


def size(made: Plan, *, role: str, name: str, place: str | None = None) -> int:
    return sum(
        term.bytes
        for term in made.terms
        if term.role == role and name in term.name and (place is None or term.place == place)
    )


@pytest.mark.parametrize(("keep", "parts"), [(False, 4), (True, 12)])
def test_what_is_carried_at_a_switch_is_in_host_memory(teacher_folder: Path, keep: bool, parts: int) -> None:
    stages = [{"name": "one", "steps": 2}, {"name": "two", "steps": 2, "keep_optimizer": keep}]
    tree = config_to_mapping(configured(teacher_folder)) | {"stages": stages}
    tree["train"] = {**tree["train"], "max_steps": None}
    tree["optim"] = {**tree["optim"], "warmup_steps": 0}
    made = plan_record(parse_config(tree), world_size=2)
    (carried,) = (term for term in made["terms"] if term["name"] == "carried at a switch")
    assert (carried["place"], carried["phase"]) == ("host", "switch")
    assert carried["bytes"] == -(-made["student"]["parameters"] // 2) * parts
    assert not any("switch" in term["phase"] for term in plan_record(configured(teacher_folder), world_size=2)["terms"])


def test_freezing_carries_moments(teacher_folder: Path) -> None:
    tree = config_to_mapping(configured(teacher_folder, max_steps=8)) | {"freezing": {"parts": 2}}
    made = plan_record(parse_config(tree), world_size=2)
    sizes = {term["name"]: term["bytes"] for term in made["terms"] if term["role"] == "student"}
    assert sizes["carried at a switch"] == sizes["Adam moments"] * 3 // 2


def test_shards_shrink_with_ranks_and_state_follows_the_precision(teacher_folder: Path) -> None:
    one = plan(configured(teacher_folder, precision="bf16"), world_size=1)
    four = plan(configured(teacher_folder, precision="bf16"), world_size=4)
    count = one.student.parameter_count
    assert size(one, role="student", name="weights, own shard") == 2 * count
    assert size(one, role="student", name="float32 master") == 4 * count
    assert size(one, role="student", name="Adam moments") == 8 * count
    assert size(one, role="student", name="gradients, own shard") == 4 * count
    assert size(four, role="teacher", name="weights, own shard") == 2 * one.teachers[0][1].parameter_count // 4
    assert size(four, role="student", name="Adam moments") == 8 * count // 4
    assert (one.accumulation, four.accumulation) == (8, 2)
    assert not [term for term in one.terms if term.role == "teacher" and "Adam" in term.name]
    plain = plan(configured(teacher_folder, precision="fp32"), world_size=1)
    assert size(plain, role="student", name="float32 master") == 0
    assert size(plain, role="teacher", name="weights, own shard") == 4 * one.teachers[0][1].parameter_count


@pytest.mark.parametrize(
    ("student", "weights", "moments"),
    [
        ("zero3", "accelerator", "accelerator"),
        ("zero3_optimizer_cpu", "accelerator", "host"),
        ("zero3_cpu", "host", "host"),
        ("zero3_param_nvme", "nvme", "host"),
        ("zero3_nvme", "nvme", "nvme"),
    ],
)
def test_offload_moves_the_students_state(teacher_folder: Path, student: str, weights: str, moments: str) -> None:
    made = plan(configured(teacher_folder, student=student), world_size=2)
    assert size(made, role="student", name="weights, own shard", place=weights) > 0
    assert size(made, role="student", name="weights, own shard") == size(
        made, role="student", name="weights, own shard", place=weights
    )
    assert size(made, role="student", name="Adam moments", place=moments) == 8 * made.student.parameter_count // 2
    assert bool(size(made, role="student", name="NVMe parameter buffers", place="host")) == (weights == "nvme")


@pytest.mark.parametrize(("teacher", "place"), [("teacher_cpu", "host"), ("teacher_nvme", "nvme")])
def test_offload_moves_the_teacher(teacher_folder: Path, teacher: str, place: str) -> None:
    here = plan(configured(teacher_folder), world_size=2)
    away = plan(configured(teacher_folder, teacher=teacher), world_size=2)
    assert size(away, role="teacher", name="weights, own shard", place=place) > 0
    assert away.peaks["accelerator"] == here.peaks["accelerator"] - size(
        here, role="teacher", name="weights, own shard"
    )


def test_the_peak_is_what_stays_plus_the_largest_phase(teacher_folder: Path) -> None:
    made = plan(configured(teacher_folder), world_size=2)
    by_phase = {
        phase: sum(t.bytes for t in made.terms if t.place == "accelerator" and t.phase == phase)
        for phase in ("always", "teacher", "student", "update")
    }
    always = by_phase.pop("always")
    assert peak_bytes(made.terms, place="accelerator") == always + max(by_phase.values())
    assert min(by_phase.values()) > 0


def test_vocabulary_and_hidden_states(teacher_folder: Path) -> None:
    made = plan(configured(teacher_folder, precision="bf16"), world_size=2)
    assert size(made, role="teacher", name="vocabulary head") == 32_000 * 512 * 2
    assert size(made, role="student", name="head's gradient") == 32_000 * 512 * 2
    assert size(made, role="student", name="chunks of logits") == 2 * 256 * 32_000 * 2
    # Kept while the teacher computes them and while the student uses them: 4 micro-batches of 2 rows.
    assert [t.bytes for t in made.terms if t.name.startswith("hidden states of")] == [4 * 2 * 128 * 512 * 2] * 2


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all(teacher_folder: Path) -> None:
    stored = size(plan(configured(teacher_folder), world_size=1), role="student", name="activations")
    recomputed = size(
        plan(configured(teacher_folder, activation_checkpointing=True), world_size=1),
        role="student",
        name="activations",
    )
    layer = layer_activation_bytes(read_shape(LLAMA), dtype_bytes=2) * 2 * 128
    assert stored - recomputed == 2 * layer - 3 * 512 * 2 * 2 * 128


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_autograd_saves(model_type: str, dtype: torch.dtype) -> None:
    def saved(depth: int) -> float:
        """Bytes per token in distinct storages, parameters aside."""
        config = AutoConfig.for_model(
            model_type,
            **{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
            **{"intermediate_size": 144, "num_hidden_layers": depth, "vocab_size": 64, "use_cache": False},
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").base_model.train()
        kept = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()}
        weights = set(kept)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage()), tensor)[1],
            lambda tensor: tensor,
        ):
            model(input_ids=torch.zeros(2, 32, dtype=torch.long))
        return sum(storage.nbytes() for key, storage in kept.items() if key not in weights) / (2 * 32)

    expected = layer_activation_bytes(
        read_shape(
            {"model_type": model_type, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
            | {"head_dim": 32, "intermediate_size": 144, "num_hidden_layers": 1, "vocab_size": 64}
        ),
        dtype_bytes=dtype.itemsize,
    )
    assert (saved(3) - saved(1)) / 2 == pytest.approx(expected, rel=0.02)


def test_rows_longer_than_the_positions_are_refused(teacher_folder: Path) -> None:
    assert plan(configured(teacher_folder, sequence_length=256), world_size=1).tokens_per_step == 16 * 256
    with pytest.raises(ConfigError, match=r"train\.sequence_length = 257: .*teacher\.model has 256 positions"):
        plan(configured(teacher_folder, sequence_length=257), world_size=1)


def test_the_students_positions_count_too(teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.json").write_text(json.dumps(LLAMA | {"max_position_embeddings": 64}), encoding="utf-8")
    config = configured(teacher_folder)
    student = config.student.model_copy(update={"config": str(tmp_path / "short.json")})
    with pytest.raises(ConfigError, match=r"student\.model has 64 positions"):
        plan(config.model_copy(update={"student": student}), world_size=1)


def test_layers_that_the_teacher_lacks_are_refused(teacher_folder: Path) -> None:
    config = configured(teacher_folder)
    student = config.student.model_copy(update={"teacher_layers": (0, 8)})
    with pytest.raises(ConfigError, match=r"8 is not a layer of .*whose layers are 0 to 7"):
        plan(config.model_copy(update={"student": student}), world_size=1)


def test_nvme_buffers_hold_the_largest_shard(teacher_folder: Path, tmp_path: Path) -> None:
    placement = {
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "nvme", "nvme_path": "/x", "buffer_size": 9_000_000},
        }
    }
    (tmp_path / "small.json").write_text(json.dumps(placement), encoding="utf-8")
    config = configured(teacher_folder)
    config = config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"deepspeed": str(tmp_path / "small.json")})}
    )
    plan(config, world_size=2)
    with pytest.raises(ConfigError, match=r"buffer_size = 9000000 elements, .*largest tensor has 16384000"):
        plan(config, world_size=1)


def test_an_absent_model_gives_a_reason_instead_of_a_plan(tmp_path: Path) -> None:
    config = configured(tmp_path / "absent")
    assert plan_text(config, world_size=1).startswith("no plan: ")
    assert set(plan_record(config, world_size=1)) == {"unavailable"}
    with pytest.raises(ConfigError, match="must be a multiple of 3 ranks"):
        plan_text(config, world_size=3)


def test_the_report_and_the_record_agree(teacher_folder: Path) -> None:
    config = configured(teacher_folder)
    record = json.loads(json.dumps(plan_record(config, world_size=2)))
    made = plan(config, world_size=2)
    assert record["peak_bytes"] == made.peaks
    assert record["student"]["parameters"] == made.student.parameter_count
    assert sum(record["teachers"]["teacher"]["by_part"].values()) == made.teachers[0][1].parameter_count
    text = render_plan(made)
    assert f"{made.peaks['accelerator'] / 1e9:.3f}" in text
    assert text.count("\n") >= len(made.terms)
