"""Experts and routers that learn above layers that do not: their gradients are those of one process."""

import pytest
import torch
from moe_jobs import IDS, Answers, gradients_above_frozen_layers
from tiny_moe import tiny_moe

ALL_BUT_EXPERTS = r"^(?!.*(experts|gate|router)).*$"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_experts_learn_above_frozen_layers(two_ranks, family, checkpointing):
    model = Answers(tiny_moe(family, seed=3))
    model(ids=IDS)["loss"].backward()
    results = two_ranks.run(
        gradients_above_frozen_layers, family=family, frozen=ALL_BUT_EXPERTS, checkpointing=checkpointing
    )
    for gradients in results:
        assert {name.split(".layers.")[1][0] for name in gradients} == {"0", "1"}
        assert {"experts" in name for name in gradients} == {True, False}
        for name, gradient in gradients.items():
            wanted = model.get_parameter(name).grad
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7, msg=name)
            assert float(gradient.abs().max()) > 0, name
