"""Feature terms inside a ZeRO-3 engine on two ranks: gradients are those of one process without DeepSpeed."""

import feature_jobs
import pytest
import torch
from pool import RankPool

from largekd.config.alignment import FeatureConfig

CONFIGS = [
    {"loss": "mse", "projector": {"kind": "linear", "bias": True}},
    {"loss": "predictive", "projector": {"kind": "low_rank_identity", "rank": 3}},
    {"loss": "cka", "projector": {"kind": "mlp", "hidden": 7}},
    {"loss": "cosine", "projector": {"kind": "linear", "shared": True}},
    {"loss": "normalised_mse", "projector": {"kind": "pool"}},
    {"loss": "predictive", "projector": {"kind": "none"}},
]


def expected_gradients(config: FeatureConfig, *, weights: dict) -> list[dict[str, torch.Tensor]]:
    host = feature_jobs.Host(config)
    host.load_state_dict(weights)
    host.double()
    result = []
    for step in range(len(feature_jobs.STEPS)):
        host.zero_grad()
        for rank in range(2):
            inputs = feature_jobs.inputs_of(step, rank=rank, config=config)
            inputs["states"] = inputs["states"].double()
            inputs["teacher"] = {layer: states.double() for layer, states in inputs["teacher"].items()}
            host(**inputs, scale=1.0)["loss"].backward()
        result.append({name: parameter.grad.clone() for name, parameter in host.named_parameters()})
    return result


@pytest.mark.parametrize("built_sharded", [False, True])
def test_gradients_of_two_ranks_are_those_of_one_process(two_ranks: RankPool, built_sharded: bool) -> None:
    answers = two_ranks.run(feature_jobs.gradients, configs=CONFIGS, built_sharded=built_sharded)
    for place, written in enumerate(CONFIGS):
        config = FeatureConfig.model_validate(written)
        for answer in (ranks[place] for ranks in answers):
            expected = expected_gradients(config, weights=answer["weights"])
            for step, (ours, theirs) in enumerate(zip(answer["gradients"], expected, strict=True)):
                largest = max(gradient.abs().max() for gradient in theirs.values())
                assert largest > 0
                for name, gradient in theirs.items():
                    difference = (ours[name].double() - gradient).abs().max()
                    assert difference <= 1e-5 * largest, (written, step, name)
            # The last step's active pairs moved, and every matrix of them.
            still = [name for name, far in answer["moved"].items() if far == 0 and "term." in name]
            assert not [name for name in still if "bias" not in name and "1_2" not in name and "down_RD" not in name]
