"""Frozen lower layers end the backward pass, whatever a family calls its layers and positions."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.errors import ConfigError
from largekd.models.build import layers_path
from largekd.models.frozen_layers import FrozenLayers, check_freezable, freeze_layers

COMMON = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
FAMILIES = {
    "llama": {"intermediate_size": 24},
    "gpt2": {},
    "falcon": {"alibi": False},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 32},
    "bloom": {},
    "gpt_neox": {"intermediate_size": 24},
}


def made(family, *, tied):
    options = COMMON | FAMILIES[family] | {"tie_word_embeddings": tied, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_nothing_below_the_lowest_layer_that_learns_has_a_backward_pass(family, tied):
    model = made(family, tied=tied)
    layers = model.get_submodule(layers_path(model))
    learning = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _m, _i, out: learning.append((out if isinstance(out, torch.Tensor) else out[0]).requires_grad)
        )
    thaw = freeze_layers(model, frozen=FrozenLayers(layers=(0, 1), embeddings=True))
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert learning == [False, False, True]
    assert all(p.grad is None for layer in layers[:2] for p in layer.parameters())
    assert all(p.grad is not None for p in layers[2].parameters() if p.requires_grad)
    thaw()
    learning.clear()
    model.requires_grad_(True)
    model(input_ids=ids)
    assert learning == [True, True, True]


def test_a_family_whose_layers_are_not_found_is_refused_with_the_key():
    model = made("llama", tied=True)
    check_freezable(model, key="freezing")
    model.config.num_hidden_layers = 7
    with pytest.raises(ConfigError, match="freezing: the decoder layers of a 'llama' model were not found"):
        check_freezable(model, key="freezing")
