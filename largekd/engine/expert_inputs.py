"""Mixtures whose input needs no gradient: ZeRO-3 would release their weights in the middle of the backward pass.

DeepSpeed 0.19.8 gathers a mixture as one unit and reduces its gradients when those of its inputs are there. Above
frozen layers no input asks for one: torch then calls the hook as soon as the output's gradient is known, and the
experts find weights of size 0.
"""

from typing import Any

import torch
from torch import Tensor, nn


def ask_for_input_gradients(module: nn.Module, /) -> None:
    """Let what is gathered as one unit compute the gradients of its inputs whenever something in it learns.

    To be called when the engine is built, which marks such units. It costs a product of matrices in the lowest layer
    that learns.
    """
    from deepspeed.utils import z3_leaf_module

    for part in module.modules():
        if z3_leaf_module(part) and _ask not in part._forward_pre_hooks.values():
            # Before the engine's own hooks, which look at the inputs.
            part.register_forward_pre_hook(_ask, prepend=True)


def _ask(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    return tuple(_with_gradient(value) for value in inputs)


def _with_gradient(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value
