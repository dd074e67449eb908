"""Steps and runs in which layers are left out."""

import json

import pytest
import torch
from check_export import main as check_export
from depth_jobs import gradients_after_a_whole_step, steps_with_drops
from step_jobs import ZERO3
from tiny import make_rows, save_tiny_llama
from tiny_run import distil, distil_until, make_assets, metrics, settings
from torch import nn
from transformers import AutoModelForCausalLM

from largekd.config.load import parse_config
from largekd.errors import ConfigError

ROWS = 4
OBJECTIVE = {"alpha": 0.0, "chunk_tokens": 7}
OFFLOAD = {"zero_optimization": {**ZERO3["zero_optimization"], "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    teacher = save_tiny_llama(folder / "teacher", seed=1, layers=2)
    student = save_tiny_llama(folder / "student", seed=2, layers=4)
    return {"teacher": str(teacher), "student": str(student)}


def reference(student, *, left_out):
    """Gradient of the mean cross-entropy in float64, each row through a model without the layers it leaves out."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    layers = list(model.model.layers)
    rows, total = make_rows(count=ROWS, packed=True), 0.0
    weight = sum(float(row.token_weight_BS.flatten()[row.counted_T].sum()) for row in rows)
    for row, dropped in zip(rows, left_out, strict=True):
        model.model.layers = nn.ModuleList(layer for index, layer in enumerate(layers) if index not in dropped)
        model.config.num_hidden_layers = len(model.model.layers)
        logits = model(**row.model_inputs, use_cache=False).logits.flatten(0, 1)[row.counted_T]
        label, w = row.labels_BS.flatten()[row.counted_T], row.token_weight_BS.flatten()[row.counted_T]
        total = total + (w * nn.functional.cross_entropy(logits, label, reduction="none")).sum() / weight
    total.backward()
    model.model.layers = nn.ModuleList(layers)
    return {
        name: torch.zeros_like(p).float() if p.grad is None else p.grad.float() for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"student_zero": OFFLOAD}], ids=str)
def test_gradient_of_a_step_that_leaves_layers_out(models, two_ranks, options):
    # Two ranks with two micro-batches each; layer 2 is left out of both, layer 1 of the first alone.
    left_out = ((1, 2), (2,))
    expected = reference(models["student"], left_out=left_out * 2)
    norm = torch.stack([gradient.double().norm() for gradient in expected.values()]).norm()
    for result in two_ranks.run(
        gradients_after_a_whole_step, left_out=left_out, rows=ROWS, objective=OBJECTIVE, **models, **options
    ):
        for name, gradient in expected.items():
            found = result["gradients"][name]
            if ".layers.2." in name:
                assert (found == 0).all(), f"{name}: a layer that was left out has an old gradient"
            assert (found.double() - gradient.double()).norm() <= 1e-5 * norm, name
        assert result["norm"] == pytest.approx(float(norm), rel=1e-5)


def test_one_rank_and_two_train_alike(models, one_rank, two_ranks):
    alone = [((1,), (2,), (1,), (2,)), ((), (1, 2), (), (1, 2))]
    shared = [step[:2] for step in alone]
    (one,) = one_rank.run(steps_with_drops, left_out=alone, rows=ROWS, objective=OBJECTIVE, **models)
    for two in two_ranks.run(steps_with_drops, left_out=shared, rows=ROWS, objective=OBJECTIVE, **models):
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


LAYER_DROP = {
    "student__teacher_layers": [0, 1, 1, 0],
    "student__layer_drop": {"rate": {"start": 0.6, "end": 0.2}, "protect": [0]},
    "eval__depths": [3],
    "checkpoint__every_steps": 2,
}


def test_a_run_with_layer_drop_resumes_bit_for_bit_and_exports_fewer_layers(assets, two_ranks, tmp_path):
    straight = settings(assets, tmp_path / "straight", export__depth=2, **LAYER_DROP)
    stopped = settings(assets, tmp_path / "stopped", export__depth=2, **LAYER_DROP)
    (summary, _) = two_ranks.run(distil, tree=straight)
    assert two_ranks.run(distil_until, tree=stopped, step=4, rank=1) == [None, None]
    (again, _) = two_ranks.run(distil, tree=stopped)
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("straight", "stopped")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert again["eval"] == summary["eval"]
    rates = [record["schedule/layer_drop"] for record in metrics(tmp_path / "straight")]
    assert rates[0] == 0.6 and rates[-1] == 0.2 and sorted(rates, reverse=True) == rates

    figures = [json.loads(line) for line in (tmp_path / "straight/evaluation.jsonl").read_text().splitlines()][-1]
    assert figures["eval/depth_3/kl"] != figures["eval/kl"] != figures["eval/depth_2/kl"]
    assert summary["eval"]["after"]["perplexity"] == figures["eval/depth_2/perplexity"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "straight/export", dtype=torch.float32)
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    # Plain transformers finds in the exported folder what the run evaluated at that depth.
    assert check_export([str(tmp_path / "straight")]) == 0


def test_rules_of_leaving_layers_out(assets, tmp_path):
    def refused(**changes):
        with pytest.raises(ConfigError) as error:
            parse_config(settings(assets, tmp_path / "run", **changes))
        return str(error.value)

    rate = {"start": 0.5, "end": 1.0}
    assert "student.layer_drop.rate: goes from 0.5 to 1" in refused(student__layer_drop={"rate": rate})
    assert "remove objective.router" in refused(student__layer_drop={}, objective__router={})
