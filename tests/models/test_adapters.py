"""Two models on one backbone: whose adapters act, what learns, and what activation checkpointing runs again."""

import pytest
import self_shared_jobs as jobs
import torch
from self_shared_jobs import OBJECTIVE
from tiny import join_rows, make_rows, save_tiny_llama

from largekd.models.adapters import LowRankMap, masked


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("adapters") / "backbone", seed=0, layers=3))


@pytest.fixture(scope="module")
def alone(backbone, one_rank):
    return one_rank.run(jobs.gradients, folder=backbone)[0]


def test_both_models_start_as_the_backbone(backbone, one_rank):
    from transformers import AutoModelForCausalLM

    (found,) = one_rank.run(jobs.hidden_of_each, folder=backbone, noise=0.0)
    model = AutoModelForCausalLM.from_pretrained(backbone)
    batch = join_rows(make_rows(count=2, packed=True))
    with torch.no_grad():
        expected = model.model(**batch.model_inputs, use_cache=False).last_hidden_state
    for name, hidden in found.items():
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("packed", [True, False])
def test_a_forward_for_both_gives_what_each_gives_alone(backbone, one_rank, packed):
    (found,) = one_rank.run(jobs.hidden_of_each, folder=backbone, noise=0.1, packed=packed)
    assert (found["student"] - found["teacher"]).abs().max() > 0.1
    assert torch.equal(found["plain"], found["student"])
    for name in ("student", "teacher"):
        torch.testing.assert_close(found[f"{name} half"], found[name], rtol=1e-5, atol=1e-5)


def test_both_sets_of_adapters_learn_and_the_backbone_does_not(alone):
    learns = {name: gradient for name, gradient in alone["gradients"].items() if gradient is not None}
    assert len(learns) == 3 * 4 * 4 + 2, "layers, linear layers, two of each for two models, and Tr"
    for name, gradient in learns.items():
        assert ".lora_" in name or name.startswith("alignment."), name
        # Tr's second matrix starts at zero, and with it the gradient of the first.
        assert gradient.abs().max() > 0 or name.endswith("down_RD"), name
    assert {name.split(".")[-2] for name in learns if ".lora_" in name} == {"student", "teacher"}
    assert "model.layers.0.self_attn.q_proj.weight" in alone["gradients"]


def test_the_teacher_learns_from_its_own_task_alone(backbone, one_rank, alone):
    (other,) = one_rank.run(jobs.gradients, folder=backbone, objective=OBJECTIVE | {"alpha": 0.1})
    for name, gradient in alone["gradients"].items():
        if ".teacher." in name:
            torch.testing.assert_close(other["gradients"][name], gradient, msg=name)
        elif ".student." in name:
            assert not torch.allclose(other["gradients"][name], gradient, rtol=1e-2), name


def test_what_is_recomputed_has_the_same_adapters(backbone, one_rank, alone):
    (again,) = one_rank.run(jobs.gradients, folder=backbone, checkpointing=True)
    for name, gradient in alone["gradients"].items():
        if gradient is not None:
            torch.testing.assert_close(again["gradients"][name], gradient, msg=name)
    for kind, salience in alone["salience"].items():
        torch.testing.assert_close(again["salience"][kind], salience, msg=kind)


def test_two_ranks_are_one(backbone, two_ranks, alone):
    first, second = two_ranks.run(jobs.gradients, folder=backbone)
    torch.testing.assert_close(first["sums"], alone["sums"])
    for name, gradient in alone["gradients"].items():
        if gradient is not None:
            torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for kind, salience in alone["salience"].items():
        assert torch.equal(first["salience"][kind], second["salience"][kind]), kind
        torch.testing.assert_close(first["salience"][kind], salience, rtol=1e-4, atol=1e-7, msg=kind)


def test_units_before_the_first_adapter_have_a_salience_too(backbone, one_rank, two_ranks):
    teacher = {"adapters": {"pattern": r"layers\.2\.mlp\.down_proj$", "rank": 2}}
    (late,) = one_rank.run(jobs.gradients, folder=backbone, teacher=teacher)
    for kind in ("neurons", "head_groups"):
        assert late["salience"][kind].min() > 0, kind
    (again,) = one_rank.run(jobs.gradients, folder=backbone, teacher=teacher, checkpointing=True)
    first, _ = two_ranks.run(jobs.gradients, folder=backbone, teacher=teacher)
    for kind, salience in late["salience"].items():
        torch.testing.assert_close(again["salience"][kind], salience, msg=kind)
        torch.testing.assert_close(first["salience"][kind], salience, rtol=1e-4, atol=1e-7, msg=kind)
    frozen = [name for name, gradient in late["gradients"].items() if gradient is None]
    assert "model.layers.0.self_attn.q_proj.weight" in frozen and "model.embed_tokens.weight" in frozen


def test_a_step_reports_the_gradient_of_each_term(alone):
    assert len(alone["squares"]) == len(alone["sums"]) == 4
    assert (alone["squares"] > 0).all()


def test_the_salience_is_the_gradient_of_the_mask():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 5, generator=generator), torch.randn(3, 5, generator=generator)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    factor, salience = mask.clone().requires_grad_(), torch.zeros(5)
    plain, tracked = x.clone().requires_grad_(), x.clone().requires_grad_()
    ((plain * factor) @ weight.T).square().sum().backward()
    (masked(tracked, mask, salience=salience) @ weight.T).square().sum().backward()
    torch.testing.assert_close(salience, factor.grad * mask)
    torch.testing.assert_close(tracked.grad, plain.grad)
    assert salience.abs()[mask > 0].min() > 0


def test_a_rank_that_is_not_in_use_does_nothing_and_learns_nothing():
    adapter = LowRankMap(in_width=6, out_width=4, rank=2, room=3, scale=2.0)
    with torch.no_grad():
        adapter.lora_b[:, :2].normal_()
    x = torch.randn(5, 6)
    before = adapter(x)
    torch.testing.assert_close(before, x @ adapter.product().T)
    before.sum().backward()
    assert adapter.lora_a.grad[2].abs().max() == adapter.lora_b.grad[:, 2].abs().max() == 0
    assert adapter.lora_b.grad[:, :2].abs().min() > 0
    adapter.ranks_R.fill_(1.0)
    assert torch.equal(adapter(x), before), "a new rank starts at zero"
    adapter(x).sum().backward()
    assert adapter.lora_b.grad[:, 2].abs().min() > 0
