"""Tiny teachers and students of every family, on plain torch."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NARROW = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EXTRA = {
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8},
    "granite": {"logits_scaling": 4.0},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"rope_scaling": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
FAMILIES = (
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt_neox", "granite", "llama", "mistral", "mixtral",
    "olmo2", "olmoe", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe",
)  # fmt: skip
IDS = torch.arange(3, 51).reshape(3, 16)
# gpt_neox and these derive the size of a head from the width.
_OWN_HEADS = ("gpt_neox", "phi")


def narrow(family: str) -> dict[str, int]:
    """Half of everything, and a layer less."""
    return NARROW | ({"moe_intermediate_size": 8} if family == "qwen3_moe" else {})


def family_config(family: str, **changes):
    values = {**SMALL, **EXTRA.get(family, {}), **changes}
    if family in _OWN_HEADS:
        del values["head_dim"]
    if family == "gpt_neox":
        del values["num_key_value_heads"]
    return AutoConfig.for_model(family, **values)


def build(config, *, seed: int):
    """A random model whose norms and biases are random as well, so that a mixed-up one shows."""
    torch.manual_seed(seed)
    attention = "eager" if config.model_type == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save(model, folder: Path) -> Path:
    """The model's own tensors under its own names."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().clone() for name, value in model.named_parameters()}, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits
