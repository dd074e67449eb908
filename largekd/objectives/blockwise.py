"""A sum over blocks whose intermediate results never exist together, in the forward pass or in the backward pass.

Autograd would keep every block's activations until the backward pass. Here each block is differentiated as soon as it
has been evaluated; what is kept is one gradient per input, of the input's own size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BlockValue = Callable[..., Tensor]
Cut = slice | None


def blockwise_sum(value: BlockValue, *, inputs: Sequence[Tensor], blocks: Sequence[Sequence[Cut]]) -> Tensor:
    """Σ_b value(b, *pieces_b): a scalar in at least float32, differentiable with respect to `inputs`.

    A block has one entry per input: a slice of its last dimension but one, or None for the whole tensor. `value` gets
    the block's number and the pieces in at least float32 and returns a scalar; whatever else it reads is a constant.
    Gradients are summed over blocks in that precision and rounded to the input's dtype once. They exist when the
    forward pass ends and are multiplied by the incoming scalar. While gradients are off, none are formed. Second
    derivatives are refused.
    """
    assert inputs and all(len(block) == len(inputs) for block in blocks)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _BlockwiseSum.apply(value, blocks, *inputs)
    with torch.no_grad():
        return _walk(value, blocks=blocks, inputs=inputs, wanted=[False] * len(inputs))[0]


class _BlockwiseSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: BlockValue, blocks: Sequence[Sequence[Cut]], *inputs: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        total, gradients = _walk(value, blocks=blocks, inputs=inputs, wanted=wanted)
        ctx.save_for_backward(*gradients)
        ctx.wanted = wanted
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        kept = iter(ctx.saved_tensors)
        # Not in place: with retain_graph the same gradients are asked for again.
        found = [
            (next(kept) * incoming).to(dtype) if wanted else None
            for wanted, dtype in zip(ctx.wanted, ctx.dtypes, strict=True)
        ]
        return None, None, *found


def _walk(
    value: BlockValue, *, blocks: Sequence[Sequence[Cut]], inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    """The sum, and its gradients with respect to the wanted inputs."""
    buffers = [
        torch.zeros_like(tensor, dtype=precise(tensor.dtype), memory_format=torch.contiguous_format)
        for tensor, wants in zip(inputs, wanted, strict=True)
        if wants
    ]
    dtype = precise(inputs[0].dtype)
    total = torch.zeros((), dtype=dtype, device=inputs[0].device)
    with _full_precision(inputs[0].device.type):
        for number, block in enumerate(blocks):
            pieces = [
                _piece(tensor, cut).to(precise(tensor.dtype)).detach()
                for tensor, cut in zip(inputs, block, strict=True)
            ]
            leaves = [piece.requires_grad_() for piece, wants in zip(pieces, wanted, strict=True) if wants]
            with torch.set_grad_enabled(bool(leaves)):
                found = value(number, *pieces)
            total = total + found.detach()
            cuts = [cut for cut, wants in zip(block, wanted, strict=True) if wants]
            gradients = torch.autograd.grad(found, leaves) if leaves else ()
            for buffer, cut, gradient in zip(buffers, cuts, gradients, strict=True):
                _piece(buffer, cut).add_(gradient)
    return total, buffers


def _full_precision(device_type: str, /) -> AbstractContextManager[Any]:
    # An enclosing autocast would round the pieces to its own dtype again.
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type=device_type, enabled=False)


def precise(dtype: torch.dtype, /) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _piece(tensor: Tensor, cut: Cut, /) -> Tensor:
    return tensor if cut is None else tensor[..., cut, :]
