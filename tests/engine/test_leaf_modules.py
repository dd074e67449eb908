"""Mixtures whose experts are modules of their own: found by their structure, and trained on ranks that route apart."""

import pytest
import torch
from moe_jobs import EXPERTS, ListModel, evaluate_list_model, list_model, rows_of, train_list_model
from pool import RankError, RankPool
from tiny_moe import tiny_moe
from torch import nn

from largekd.engine.leaf_modules import leaf_modules

STEPS = 50


def reference(*, steps):
    """The same training in one process with plain torch."""
    model = list_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        each = [model(rows=rows_of(rank, step=step))["loss"] for rank in range(2)]
        optimizer.zero_grad(set_to_none=False)
        (sum(each) / 2).backward()
        # What no rank used still has a gradient, zero, where weights are sharded.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        losses.append([float(loss.detach()) for loss in each])
    return losses, dict(model.named_parameters())


def test_ranks_that_choose_other_experts_train_as_one_process(two_ranks):
    chosen = [list_model().layers[0].gate(rows_of(rank, step=0)).argmax(-1).unique().tolist() for rank in range(2)]
    assert chosen == [[0], [2]]
    losses, weights = reference(steps=STEPS)
    for rank, result in enumerate(two_ranks.run(train_list_model, steps=STEPS)):
        assert result["losses"] == pytest.approx([each[rank] for each in losses], rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(result["weights"][name], weight.detach(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_without_the_marking_it_dies():
    pool = RankPool(world_size=2)
    try:
        pool.run(train_list_model, steps=2)
        pool._timeout_s = 20.0
        with pytest.raises(RankError):
            pool.run(train_list_model, steps=STEPS, leaf=False)
    finally:
        pool.close()


def test_a_frozen_model_is_marked_too(two_ranks):
    for rank, losses in enumerate(two_ranks.run(evaluate_list_model, steps=3)):
        with torch.no_grad():
            wanted = [float(list_model()(rows=rows_of(rank, step=step))["loss"]) for step in range(3)]
        assert losses == pytest.approx(wanted, rel=1e-5)


def test_mixtures_are_found_and_stacks_of_layers_are_not():
    assert list(leaf_modules(ListModel())) == ["layers.0", "layers.1"]
    for family in ("mixtral", "olmoe", "qwen3_moe"):
        assert leaf_modules(tiny_moe(family, seed=0)) == {}
    stack = nn.Module()
    stack.embed = nn.Embedding(50, 8)
    stack.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    stack.head = nn.Linear(8, 50)
    assert leaf_modules(stack) == {}


def test_other_names_are_found_by_the_router_beside_them():
    block = nn.Module()
    block.router = nn.Linear(8, EXPERTS, bias=False)
    block.mlps = nn.ModuleList(nn.Linear(8, 8) for _ in range(EXPERTS))
    assert list(leaf_modules(nn.Sequential(block))) == ["0"]
    block.mlps.append(nn.Linear(8, 8))
    assert leaf_modules(nn.Sequential(block)) == {}
    block.mlps = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)])
    assert leaf_modules(nn.Sequential(block)) == {}
