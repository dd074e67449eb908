"""Whole tiny runs of students whose shape is computed: the run, the plan and the export agree."""

import json

import pytest
from tiny_run import distil, metrics, settings
from transformers import AutoConfig, AutoModelForCausalLM


def run(assets, folder, two_ranks, **design):
    tree = settings(assets, folder, student__design=design)
    del tree["student"]["teacher_layers"]
    two_ranks.run(distil, tree=tree)
    return json.loads((folder / "plan.json").read_text())


def exported(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    return model.config, model.num_parameters()


def test_a_student_of_a_ratio_learns_and_is_exported(tiny_assets, two_ranks, tmp_path):
    planned = run(tiny_assets, tmp_path / "run", two_ranks, ratio=0.6, keep="depth")
    config, count = exported(tmp_path / "run")
    teacher = AutoConfig.from_pretrained(tiny_assets / "teacher")
    assert planned["student"]["parameters"] == count
    assert count / planned["teachers"]["teacher"]["parameters"] == pytest.approx(0.6, rel=0.1)
    assert config.num_hidden_layers == teacher.num_hidden_layers and config.hidden_size < teacher.hidden_size
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_mixture_of_a_dense_teacher_is_trained_and_exported(tiny_assets, two_ranks, tmp_path):
    planned = run(tiny_assets, tmp_path / "run", two_ranks, experts=4, active_experts=2)
    config, count = exported(tmp_path / "run")
    assert config.model_type == planned["student"]["model_type"] == "mixtral"
    assert planned["student"]["parameters"] == count > planned["student"]["active_parameters"]
