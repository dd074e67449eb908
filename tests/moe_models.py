"""Tiny mixture-of-experts models that tests share."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "phimoe", "granitemoe")


def save_moe(folder: Path, family: str, *, seed: int, experts: int = 4, active: int = 2, **changes) -> Path:
    """A random model of a family in a Hugging Face folder, as transformers saves it."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 101,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": experts,
            "num_local_experts": experts,
            "num_experts_per_tok": active,
            "max_position_embeddings": 64,
            "initializer_range": 0.1,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            **changes,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Some families start their routers at zero, where every choice of experts is a tie.
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def shape_like(teacher: Path, target: Path, family: str, **changes) -> Path:
    """config.json of a family with the teacher's sizes and other `changes`."""
    tree = AutoConfig.from_pretrained(teacher).to_dict()
    kept = {key: tree[key] for key in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
        "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range",
    )}  # fmt: skip
    AutoConfig.for_model(family, **{**kept, **changes}).save_pretrained(target)
    return target


def mixture(*, experts: int, active: int, width: int, **changes) -> dict:
    """The keys that say it in either family."""
    return {
        "num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": active,
        "moe_intermediate_size": width, "norm_topk_prob": True, **changes,
    }  # fmt: skip
