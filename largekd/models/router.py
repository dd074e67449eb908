"""The routers of a mixture-of-experts model: where they are, and what one of them says.

A router is the child `gate` or `router` of a module that also has a child `experts`. Families differ in what its
forward returns: the logits alone, or a tuple of logits, scores and chosen experts.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROUTERS = ("gate", "router")
_EXPERTS = "experts"
# Where the logits are in a router's tuple; elsewhere they are its first entry.
_LOGITS_PLACE = {"llama4": 1, "llama4_text": 1}
_CHOSEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class RouterShape:
    """Sizes of a layer's router: experts, experts that a token is sent to, and how logits become probabilities.

    softmax: p = softmax(logits). sigmoid: p = σ(logits) / Σ σ(logits), in families that score experts one by one.
    """

    experts: int
    chosen: int
    scoring: Literal["softmax", "sigmoid"]


def find_router(layer: nn.Module, /) -> nn.Module | None:
    """The router of a decoder layer; None: it has none, or more than one."""
    found = [
        getattr(module, name)
        for module in layer.modules()
        if isinstance(getattr(module, _EXPERTS, None), nn.Module)
        for name in _ROUTERS
        if isinstance(getattr(module, name, None), nn.Module)
    ]
    return found[0] if len(found) == 1 else None


def router_shape(router: nn.Module, *, model: PreTrainedModel) -> RouterShape | None:
    """The sizes of a router that `find_router` gave; None: they are not known."""
    matrices = [parameter for parameter in router.parameters() if len(_whole_shape(parameter)) == 2]
    config = model.config
    chosen = next((getattr(config, key) for key in _CHOSEN_KEYS if getattr(config, key, None)), None)
    if len(matrices) != 1 or not isinstance(chosen, int):
        return None
    experts = int(_whole_shape(matrices[0])[0])
    code = getattr(inspect.unwrap(type(router).forward), "__code__", None)
    sigmoid = code is not None and "sigmoid" in code.co_names
    return RouterShape(experts=experts, chosen=chosen, scoring="sigmoid" if sigmoid else "softmax")


def read_router(output: Any, *, model_type: str, chosen: int) -> tuple[Tensor, Tensor]:
    """Logits (tokens, X) and chosen experts (tokens, K) in what a router's forward returned.

    Runs in a forward hook inside of checkpointed blocks: it makes nothing that a gradient would need.
    """
    parts = (output,) if isinstance(output, Tensor) else output
    place = _LOGITS_PLACE.get(model_type, 0) if len(parts) > 1 else 0
    logits = parts[place]
    choice = next((part for part in parts if isinstance(part, Tensor) and not part.dtype.is_floating_point), None)
    if choice is None:
        choice = logits.detach().topk(chosen, dim=-1).indices
    return logits.reshape(-1, logits.shape[-1]), choice.reshape(-1, choice.shape[-1])


def router_layers(model: PreTrainedModel, *, layers: nn.ModuleList) -> dict[int, RouterShape]:
    """The decoder layers that have a router, with its shape."""
    shapes: dict[int, RouterShape] = {}
    for index, layer in enumerate(layers):
        router = find_router(layer)
        shape = None if router is None else router_shape(router, model=model)
        if shape is not None:
            shapes[index] = shape
    return shapes


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter that may be sharded."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
