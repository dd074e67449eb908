"""A mixture with ordinary MLPs among its layers, at another depth."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.models.build import config_with_layers, layers_path

KINDS = [
    {"decoder_sparse_step": 2},
    {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    {"mlp_only_layers": [0, 3]},
    {},
]


@pytest.mark.parametrize("layers", [(0, 1, 3), (1, 3), (0, 2), (3, 2, 1)])
@pytest.mark.parametrize("kinds", KINDS)
def test_layers_keep_their_experts_and_their_mlps(kinds, layers):
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=67,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        **kinds,
    )
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
        short = AutoModelForCausalLM.from_config(config_with_layers(config, layers=layers))
    path = layers_path(whole)
    for new, old in enumerate(layers):
        ours, theirs = (
            {name: value.shape for name, value in model.get_submodule(f"{path}.{index}").named_parameters()}
            for model, index in ((short, new), (whole, old))
        )
        assert ours == theirs
