"""Tiny mixtures of experts that tests share."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import VOCAB

EXPERTS, CHOSEN = 4, 2

_SIZES = {"num_experts_per_tok": CHOSEN}
FAMILIES = {
    "mixtral": {**_SIZES, "num_local_experts": EXPERTS},
    "olmoe": {**_SIZES, "num_experts": EXPERTS},
    "qwen3_moe": {**_SIZES, "num_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8},
}


def tiny_moe_config(family: str, *, layers: int = 2, hidden: int = 32, vocab: int = VOCAB, **changes):
    """The configuration of a tiny model of a mixture-of-experts family."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
        **{**FAMILIES[family], **changes},
    )


def tiny_moe(family: str, *, seed: int, skew: float = 0.0, **changes):
    """A random model; routers are drawn too, or a token would go anywhere.

    skew: how much more every router likes its first two experts, by a direction that all hidden states share.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_moe_config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
            if name.endswith(("gate.weight", "router.weight")):
                parameter.normal_(0.0, 0.3)
                parameter[:CHOSEN, 0] += skew
        if skew:
            model.get_input_embeddings().weight[:, 0] = 0.5
    return model


def save_tiny_moe(folder: Path, family: str, *, seed: int, **changes) -> Path:
    """Such a model in a folder, a layer's experts in one tensor as the model has them."""
    model = tiny_moe(family, seed=seed, **changes)
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
