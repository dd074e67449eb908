"""Whole runs whose students have other experts than their teachers; each export is the next run's teacher."""

import json

import pytest
import torch
from moe_models import mixture, shape_like
from safetensors.torch import load_file
from tiny_run import distil, settings
from transformers import AutoModelForCausalLM


@pytest.fixture
def made(tiny_assets, tmp_path, two_ranks):
    """Runs two steps with a student of another kind; its folder, and the perplexities of both models before them."""

    def run(name, *, teacher, family, experts, **shape):
        student = shape_like(teacher, tmp_path / f"{name}-shape", family, **shape)
        tree = settings(
            tiny_assets, tmp_path / name, train__max_steps=2, optim__warmup_steps=0, teacher__model=str(teacher),
            student__initialise={"layers": "first", "experts": experts}, student__config=str(student),
        )  # fmt: skip
        del tree["student"]["teacher_layers"]
        summary, _ = two_ranks.run(distil, tree=tree)
        report = json.loads((tmp_path / name / "initialisation.json").read_text())
        return tmp_path / name, summary, report

    return run


def test_dense_to_experts_to_fewer_experts_to_dense(made, tiny_assets):
    width = json.loads((tiny_assets / "teacher/config.json").read_text())["intermediate_size"]
    teacher = tiny_assets / "teacher"
    shape = mixture(experts=4, active=2, width=0)
    first, summary, report = made("first", teacher=teacher, family="mixtral", experts={"noise": 0.05}, **shape)
    assert summary["steps"] == 2
    # Nearly the teacher's function, so nearly nothing to learn.
    assert summary["eval"]["before"]["kl"] < 0.02
    names = load_file(first / "export/model.safetensors").keys()
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    model, loading = AutoModelForCausalLM.from_pretrained(first / "export", output_loading_info=True)
    assert not any(loading.values())
    assert {name for name, _ in model.named_parameters()} == {entry["name"] for entry in report["tensors"]}

    fewer = mixture(experts=2, active=1, width=0)
    _, summary, report = made("second", teacher=first / "export", family="mixtral", experts={}, **fewer)
    assert summary["eval"]["before"]["kl"] < 0.05
    assert any("experts merged" in entry["how"] for entry in report["tensors"])

    _, summary, report = made(
        "third", teacher=first / "export", family="llama", experts={"to_dense": "average"}, intermediate_size=width
    )
    assert summary["eval"]["before"]["kl"] < 0.05
    assert not any(entry["how"] == "drawn" for entry in report["tensors"])
    assert torch.isfinite(torch.tensor(summary["eval"]["after"]["perplexity"]))
