"""The head's formula equals what each model family computes itself."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.contracts import Batch, TapRequest
from largekd.errors import ConfigError
from largekd.models.decoder import PROVEN_FAMILIES, Decoder, head_spec

SMALL = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXTRA = {
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8},
    "granite": {"logits_scaling": 4.0},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"rope_scaling": None},
}


def formula(hidden, weight, bias, spec):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * spec.scale
    return spec.softcap * torch.tanh(logits / spec.softcap) if spec.softcap else logits


@pytest.mark.parametrize("family", sorted(PROVEN_FAMILIES))
def test_hidden_states_and_head_give_the_family_s_logits(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, **EXTRA.get(family, {}))
    # Transformers has no SDPA for this one: soft-capped attention scores.
    attention = "eager" if family == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    decoder = Decoder(model=model)
    ids = torch.randint(3, 67, (2, 12))
    batch = Batch(
        input_ids_BS=ids,
        labels_BS=ids,
        token_weight_BS=torch.ones(2, 12),
        counted_T=torch.arange(24),
        position_ids_BS=torch.arange(12).repeat(2, 1),
    )
    with torch.no_grad():
        expected = model(**batch.model_inputs, use_cache=False).logits
        found = formula(decoder(batch=batch)["last"], decoder.head_weight, decoder.head_bias, decoder.head_spec)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_scaling_that_is_not_understood_is_refused():
    config = AutoConfig.for_model("llama", **SMALL)
    model = AutoModelForCausalLM.from_config(config)
    model.config.lm_head_multiplier = 0.5
    with pytest.raises(ConfigError, match="lm_head_multiplier"):
        head_spec(model)


@pytest.mark.parametrize("family", sorted(PROVEN_FAMILIES))
def test_the_final_norm_of_the_last_layer_gives_the_last_hidden_states(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, **EXTRA.get(family, {}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if family == "gemma2" else "sdpa")
    decoder = Decoder(model=model.eval())
    ids = torch.randint(3, 67, (2, 12))
    batch = Batch(
        input_ids_BS=ids,
        labels_BS=ids,
        token_weight_BS=torch.ones(2, 12),
        counted_T=torch.arange(24),
        position_ids_BS=torch.arange(12).repeat(2, 1),
    )
    with torch.no_grad():
        outputs = decoder(batch=batch, taps=TapRequest(hidden=(0, 1)))
        assert torch.equal(decoder.final_norm(outputs["hidden.1"]), outputs["last"])
        assert not torch.allclose(decoder.final_norm(outputs["hidden.0"]), outputs["last"])
