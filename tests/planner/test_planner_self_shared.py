"""The plan of one backbone for two models, against the modules and what autograd keeps of them; and of rollouts."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import largekd.models.adapters as adapters
from largekd.config.adapters import AdaptersConfig
from largekd.contracts import Batch
from largekd.distillation.self_shared import twice
from largekd.models.decoder import Decoder
from largekd.models.pruning import PrunedStudent
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
