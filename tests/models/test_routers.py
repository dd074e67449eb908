"""Routers of every family: found, captured as the family itself reports them, and the same under checkpointing."""

import re

import pytest
import torch
from tiny import join_rows, make_rows
from tiny_moe import CHOSEN, EXPERTS, tiny_moe
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.contracts import TapRequest
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder, enable_checkpointing
from largekd.models.router import RouterShape, find_router, read_router
from largekd.models.taps import check_layers, routers_of

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MOE = {"moe_intermediate_size": 16}
# Family -> what its configuration needs, and how its router scores.
FAMILIES = {
    "mixtral": ({"num_local_experts": 4}, "softmax"),
    "olmoe": ({"num_experts": 4}, "softmax"),
    "qwen2_moe": ({"num_experts": 4, **MOE, "shared_expert_intermediate_size": 16}, "softmax"),
    "qwen3_moe": ({"num_experts": 4, **MOE, "head_dim": 8}, "softmax"),
    "phimoe": ({"num_local_experts": 4}, "softmax"),
    "granitemoe": ({"num_local_experts": 4}, "softmax"),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 8}, "softmax"),
    "deepseek_v3": (
        {"n_routed_experts": 4, "num_key_value_heads": 4, **MOE, **LATENT, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 0},
        "sigmoid",
    ),
    "glm4_moe": (
        {"n_routed_experts": 4, **MOE, "head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
        "sigmoid",
    ),
}  # fmt: skip
# Patterns of learning-rate groups, as the README names them.
ROUTERS = r"\.(gate|router)\.(weight|bias)$"
EXPERTS_ONLY = r"\.experts\."
SHARED = r"\.shared_experts?\.|\.shared_expert_gate\."


def model_of(family, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family][0], **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_logits_are_those_that_the_family_reports(family):
    model = model_of(family)
    shape = RouterShape(experts=4, chosen=2, scoring=FAMILIES[family][1])
    assert routers_of(model) == {0: shape, 1: shape}
    batch = join_rows(make_rows(count=2, packed=False))
    decoder = Decoder(model=model)
    with torch.no_grad():
        outputs = decoder(batch=batch, taps=TapRequest(router=(0, 1)))
        reported = model.get_decoder()(**batch.model_inputs, use_cache=False, output_router_logits=True)
    taps = decoder.taps_of(outputs).router
    for layer in (0, 1):
        logits = taps[layer].logits_BSX
        assert logits.shape == (2, 24, 4) and logits.std() > 0
        if getattr(reported, "router_logits", None) is not None:
            torch.testing.assert_close(logits, reported.router_logits[layer].view_as(logits))
        assert torch.equal(taps[layer].choice_BSK.sort(-1).values, logits.topk(2, dim=-1).indices.sort(-1).values)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_capture_changes_no_output_and_survives_checkpointing(family):
    batch = join_rows(make_rows(count=2, packed=True))
    request = TapRequest(router=(0, 1), hidden=(0,))
    gradients, lasts = [], []
    for checkpointing in (False, True):
        model = tiny_moe(family, seed=1).train()
        if checkpointing:
            enable_checkpointing(model)
        decoder = Decoder(model=model)
        lasts.append(decoder(batch=batch)["last"].detach())
        outputs = decoder(batch=batch, taps=request)
        assert torch.equal(outputs["last"], lasts[-1])
        routers = decoder.taps_of(outputs).router
        loss = outputs["last"].square().mean() + sum(tap.logits_BSX.square().mean() for tap in routers.values())
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if name != "lm_head.weight"})
    assert torch.equal(*lasts)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    routers = [gradient for name, gradient in gradients[0].items() if name.endswith("gate.weight")]
    assert len(routers) == 2 and all(gradient.abs().max() > 0 for gradient in routers)


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_of_groups_find_experts_routers_and_shared_parts(family):
    names = [name for name, _ in model_of(family).named_parameters()]
    routers = [name for name in names if re.search(ROUTERS, name)]
    experts = [name for name in names if re.search(EXPERTS_ONLY, name)]
    shared = [name for name in names if re.search(SHARED, name)]
    assert len(routers) == len(set(routers)) and {name.split(".layers.")[1][0] for name in routers} == {"0", "1"}
    assert {name.split(".layers.")[1][0] for name in experts} == {"0", "1"}
    assert bool(shared) == (family in ("qwen2_moe", "deepseek_v3", "glm4_moe"))
    assert not set(routers) & set(experts) and not set(shared) & {*routers, *experts}
    for name in {*names} - {*routers, *experts, *shared}:
        assert "expert" not in name and "router" not in name


def test_a_plain_linear_gate_beside_a_list_of_experts():
    block = torch.nn.Module()
    block.gate = torch.nn.Linear(8, 5, bias=False)
    block.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(5))
    layer = torch.nn.Module()
    layer.mlp = block
    router = find_router(layer)
    assert router is block.gate
    logits, choice = read_router(router(torch.randn(3, 8)), model_type="custom", chosen=2)
    assert logits.shape == (3, 5) and torch.equal(choice, logits.topk(2, dim=-1).indices)


def test_layers_without_a_router_are_refused_by_name():
    model = model_of("deepseek_v3", first_k_dense_replace=1)
    assert list(routers_of(model)) == [1]
    check_layers(TapRequest(router=(1,)), model=model, key="objective.router")
    with pytest.raises(ConfigError, match=r"pairs: layer 0 of the 'deepseek_v3' model has no router.* are 1\."):
        check_layers(TapRequest(router=(0, 1)), model=model, key="pairs")
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    assert routers_of(dense) == {}


def test_tiny_moe_has_the_sizes_that_tests_count_on():
    assert set(routers_of(tiny_moe("mixtral", seed=0)).values()) == {RouterShape(EXPERTS, CHOSEN, "softmax")}
