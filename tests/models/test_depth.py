"""Layers that are left out of a forward, and which ones."""

from collections import Counter

import pytest
import torch
from models.test_head_families import EXTRA, SMALL
from tiny import make_rows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.errors import ConfigError
from largekd.models.build import layers_path
from largekd.models.decoder import PROVEN_FAMILIES, Decoder
from largekd.models.depth import always_kept, draw_left_out, layers_at_depth


def build(family: str, *, layers: int = 4) -> Decoder:
    torch.manual_seed(0)
    shape = {**SMALL, "vocab_size": 101, "num_hidden_layers": layers, "initializer_range": 0.2}
    config = AutoConfig.for_model(family, **shape, **EXTRA.get(family, {}))
    attention = "eager" if family == "gemma2" else "sdpa"
    return Decoder(model=AutoModelForCausalLM.from_config(config, attn_implementation=attention))


@pytest.mark.parametrize("family", sorted(PROVEN_FAMILIES))
def test_a_layer_that_is_left_out_might_as_well_not_be_there(family):
    decoder, batch = build(family).eval(), make_rows(count=1, packed=True)[0]
    with torch.no_grad():
        whole = decoder(batch=batch)["last"]
        without = decoder(batch=batch, left_out=(1, 2))["last"]
        again = decoder(batch=batch)["last"]
        stack = decoder.model.get_submodule(layers_path(decoder.model))
        parent = decoder.model.get_submodule(layers_path(decoder.model).rpartition(".")[0])
        # A layer's mask depends on its place in families with several kinds: what stays keeps its place.
        for index in (1, 2):
            stack[index] = _Through()
        parent.config.num_hidden_layers = 4
        removed = decoder(batch=batch)["last"]
    assert (whole - without).abs().max() > 1e-3
    torch.testing.assert_close(without, removed, rtol=0, atol=0)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


class _Through(nn.Module):
    attention_type = "full_attention"

    def forward(self, hidden_states, *_arguments, **_options):
        return hidden_states


def test_draws_are_a_function_of_their_arguments_and_have_the_rate():
    def draws(seed):
        return [
            draw_left_out(rate=0.3, depth=12, always={0, 11}, seed=seed, step=step, micro_batch=micro)
            for step in range(500)
            for micro in range(2)
        ]

    assert draws(0) == draws(0) != draws(1)
    counts = Counter(layer for layers in draws(0) for layer in layers)
    assert set(counts) == set(range(1, 11))
    assert all(0.24 < count / 1000 < 0.36 for count in counts.values())
    assert draw_left_out(rate=0.0, depth=12, always=(), seed=0, step=0, micro_batch=0) == ()


@pytest.mark.parametrize("of", [2, 3, 7, 30])
def test_reduced_depths_keep_both_ends_and_spread_the_gaps(of):
    for depth in range(2, of + 1):
        layers = layers_at_depth(depth=depth, of=of, key="k")
        assert len(layers) == depth == len(set(layers))
        assert layers[0] == 0 and layers[-1] == of - 1
    assert layers_at_depth(depth=24, of=30, key="k") == tuple(i for i in range(30) if i not in {3, 8, 12, 17, 22, 26})


@pytest.mark.parametrize("depth", [1, 5])
def test_impossible_depths_are_refused(depth):
    with pytest.raises(ConfigError, match=r"export\.depth = \d: the student has 4 layers; it must be between 2 and 4"):
        layers_at_depth(depth=depth, of=4, key="export.depth")


def test_protected_layers():
    assert always_kept((0, -1), depth=6, needed={2}) == {0, 2, 5}
    with pytest.raises(ConfigError, match=r"protect: 6 is not a layer of the student, which has 6"):
        always_kept((0, 6), depth=6, needed=())
    with pytest.raises(ConfigError, match=r"none can be left out"):
        always_kept((0, 1), depth=3, needed={2})
