"""The plan of one backbone for two models, against the modules and what autograd keeps of them; and of rollouts."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from transformers import AutoConfig, AutoModelForCausalLM

import largekd.models.adapters as adapters
from largekd.config.adapters import AdaptersConfig
from largekd.config.load import parse_config
from largekd.contracts import Batch
from largekd.distillation.self_shared import twice
from largekd.models.decoder import Decoder
from largekd.models.pruning import PrunedStudent
from largekd.planner.plan import Plan, plan
from largekd.planner.report import plan_text
from largekd.planner.self_shared import shared_layer_bytes, shared_shapes
from largekd.planner.shapes import read_shape

PATTERNS = {
    "default": AdaptersConfig().pattern,
    "all": r"_proj$",
    "outputs": r"\.(o|down)_proj$",
    "one layer": r"\.0\.mlp\.gate_proj$",
}
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 144,
    "vocab_size": 96,
}
ROWS, POSITIONS = 2, 32


def adapted(monkeypatch, *, config, model_type="llama", depth=3, dtype=torch.float32):
    """A model with adapters for both models, whole in this process."""
    monkeypatch.setattr(adapters, "sharded_modules", lambda *_, **__: nullcontext())
    sizes = AutoConfig.for_model(model_type, **SHAPE, num_hidden_layers=depth, use_cache=False)
    model = AutoModelForCausalLM.from_config(sizes, dtype=dtype, attn_implementation="sdpa").train()
    adapters.adapt(model, config=config, ds_config={}, seed=0)
    return model.to(dtype)


def shape_of(model_type="llama", *, depth=3):
    return read_shape({"model_type": model_type, **SHAPE, "num_hidden_layers": depth})


@pytest.mark.parametrize("name", PATTERNS)
def test_adapters_are_those_of_the_model(monkeypatch, name):
    config = AdaptersConfig(pattern=PATTERNS[name], rank=3, max_rank=5)
    model = adapted(monkeypatch, config=config)
    sizes, shapes = adapters.adapter_sizes(model), shared_shapes(shape_of(), config=config)
    backbone = shape_of().parameter_count
    assert sizes.backbone == backbone
    assert shapes.student.parameter_count == backbone + sizes.student
    assert shapes.teacher.parameter_count == backbone + sizes.teacher
    assert shapes.adapters.parameter_count == sizes.student + sizes.teacher > 0
    assert sorted(t.numel for t in shapes.both.tensors) == sorted(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["default", "all", "outputs"])
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("llama", torch.float32), ("qwen2", torch.bfloat16), ("qwen3", torch.bfloat16), ("qwen3", torch.float32)],
)
def test_activations_of_both_models_are_those_that_autograd_saves(monkeypatch, model_type, dtype, name):
    config = AdaptersConfig(pattern=PATTERNS[name], rank=4, max_rank=8)
    # What ZeRO-3 puts in place of torch's function.
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)

    def saved(depth: int) -> float:
        model = adapted(monkeypatch, config=config, model_type=model_type, depth=depth, dtype=dtype)
        PrunedStudent(model)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept: dict[int, Any] = {}
        ids = torch.zeros(ROWS, POSITIONS, dtype=torch.int64)
        batch = Batch(ids, ids, torch.ones(ids.shape), torch.arange(0), attention_mask_BS=torch.ones_like(ids))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage()), tensor)[1],
            lambda tensor: tensor,
        ):
            outputs = Decoder(model=model)(batch=twice(batch), adapters="both")
        assert outputs["last"].requires_grad
        return sum(storage.nbytes() for key, storage in kept.items() if key not in own) / ids.numel()

    expected = shared_layer_bytes(shape_of(model_type), layer=1, config=config, dtype_bytes=dtype.itemsize)
    assert (saved(3) - saved(1)) / 2 == pytest.approx(expected, rel=0.02)


SMALL = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
TOKENS = 2 * 128


def planned(tmp_path: Path, *, world_size: int = 2, **changes: Any) -> Plan:
    """A run on a small Llama; `changes` are whole top-level blocks."""
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model/config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    tree = {
        "run": {"dir": "runs/x"},
        "teacher": {"kind": "self_shared", "adapters": {"pattern": r"\.q_proj$", "rank": 4, "max_rank": 6}},
        "student": {"model": str(tmp_path / "model"), "deepspeed": "ds_configs/zero3.json"},
        "data": {"train": "t.jsonl"},
        "train": {
            "max_steps": 1,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "sequence_length": 128,
            "precision": "bf16",
        },
    }
    return plan(parse_config({**tree, **changes}), world_size=world_size)


def online(tmp_path: Path) -> dict[str, Any]:
    return {"kind": "online", "model": str(tmp_path / "model"), "deepspeed": "ds_configs/teacher_zero3.json"}


def size(made: Plan, name: str) -> int:
    found = [term.bytes for term in made.terms if term.name == name]
    assert found, f"no term {name!r} among {[term.name for term in made.terms]}"
    return sum(found)


def test_only_adapters_have_gradients_and_optimizer_state(tmp_path: Path) -> None:
    made = planned(tmp_path)
    backbone, own = read_shape(SMALL).parameter_count, 4 * (4 + 6) * (512 + 512)
    assert size(made, "weights, own shard") == 2 * (backbone + own) // 2
    assert size(made, "Adam moments") == 8 * own // 2
    assert size(made, "gradients, own shard") == size(made, "float32 master weights") == 4 * own // 2
    assert size(made, "adapters' gradients of one layer") == 2 * own // 4
    assert size(made, "two chunks of logits") == 2 * TOKENS * 32_000 * 2
    assert size(made, "both models' hidden states' gradients") == 2 * TOKENS * 512 * 2
    names = {term.name for term in made.terms}
    assert "vocabulary head's gradient" not in names and not [t for t in made.terms if t.role == "teacher"]
    assert made.teachers[0][1].parameter_count == backbone + own * 4 // 10
    assert made.student.parameter_count == backbone + own * 6 // 10
    assert made.peaks["accelerator"] < planned(tmp_path, teacher=online(tmp_path)).peaks["accelerator"]


def test_checkpointing_keeps_two_inputs_of_every_layer(tmp_path: Path) -> None:
    train = {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 128, "precision": "bf16"}
    stored = size(planned(tmp_path), "activations of both models")
    checkpointed = planned(tmp_path, train={**train, "activation_checkpointing": True})
    recomputed = size(checkpointed, "activations of both models, checkpointed")
    config = AdaptersConfig(pattern=r"\.q_proj$", rank=4, max_rank=6)
    layer = shared_layer_bytes(read_shape(SMALL), layer=0, config=config, dtype_bytes=2)
    assert stored - recomputed == TOKENS * (3 * layer - 2 * 4 * 512 * 2)


def test_compared_layers_are_activations_of_the_one_pass(tmp_path: Path) -> None:
    feature = {"loss": "mse", "layers": {"map": "last", "count": 2}, "projector": {"kind": "none"}}
    made = planned(tmp_path, objective={"features": [feature]})
    assert size(made, "compared hidden states") == TOKENS * 2 * (2 * 512 + 2 * 512)
    assert not [term for term in made.terms if "captured" in term.name]


def test_the_table_is_made(tmp_path: Path) -> None:
    planned(tmp_path)
    recipe = {
        "run": {"dir": "runs/x"},
        "teacher": {"kind": "self_shared"},
        "student": {"model": str(tmp_path / "model"), "deepspeed": "ds_configs/zero3.json"},
        "data": {"train": "t.jsonl"},
        "train": {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 128},
    }
    shown = plan_text(parse_config(recipe), world_size=2)
    assert "student: activations of both models" in shown and "peak" in shown


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_a_writer_has_a_copy_and_its_keys_and_values(tmp_path: Path, source: str) -> None:
    rollouts = {"source": source, "prompt_tokens": 40, "max_new_tokens": 24, "batch_size": 5, "gather": "whole"}
    plain = planned(tmp_path, teacher=online(tmp_path))
    made = planned(tmp_path, teacher=online(tmp_path), rollouts=rollouts)
    added = [term for term in made.terms if term not in plain.terms]
    assert {term.role for term in added} == {source} and {term.phase for term in added} == {"rollout"}
    assert size(made, "writer's whole copy") == 2 * read_shape(SMALL).parameter_count
    assert size(made, "writer's keys and values") == 5 * (40 + 24) * 4 * 2 * 4 * 64 * 2
    assert size(made, "writer's logits of a token") == 5 * 32_000 * (2 + 4)
    auto = planned(tmp_path, teacher=online(tmp_path), rollouts={**rollouts, "gather": "auto"})
    assert size(auto, "writer's whole copy, if it fits") == size(made, "writer's whole copy")
    streamed = planned(tmp_path, teacher=online(tmp_path), rollouts={**rollouts, "gather": "streamed"})
    assert size(streamed, "writer's gathered module") == 2 * 32_000 * 512
    off = planned(tmp_path, teacher=online(tmp_path), rollouts={**rollouts, "share": 0})
    assert off.terms == plain.terms


def test_a_large_writer_decides_the_peak(tmp_path: Path) -> None:
    rollouts = {"prompt_tokens": 64, "max_new_tokens": 64, "batch_size": 4000, "gather": "whole"}
    plain = planned(tmp_path, teacher=online(tmp_path))
    made = planned(tmp_path, teacher=online(tmp_path), rollouts=rollouts)
    always = sum(t.bytes for t in made.terms if t.place == "accelerator" and t.phase == "always")
    written = sum(t.bytes for t in made.terms if t.phase == "rollout")
    assert made.peaks["accelerator"] == always + written > plain.peaks["accelerator"]
