"""Fewer layers than a model has: left out at random during training, or evenly for good.

A layer that is left out of a forward hands its input on (LayerDrop, arXiv 1909.11556). Which layers those are is said
around the forward, not inside of a checkpointed block: what is run again in the backward pass is only what ran.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from largekd.errors import ConfigError
from largekd.models.build import layers_path
from largekd.sharding.shards import gathered_units

# Apart from other draws of the same seed and step.
_PURPOSE = 0x1A7E6D


def draw_left_out(
    *, rate: float, depth: int, always: Collection[int], seed: int, step: int, micro_batch: int
) -> tuple[int, ...]:
    """Each layer that is not in `always`, with probability `rate`: a function of its arguments, equal on all ranks."""
    if rate <= 0:
        return ()
    draws = np.random.default_rng((_PURPOSE, seed, step, micro_batch)).random(depth)
    return tuple(layer for layer in range(depth) if draws[layer] < rate and layer not in always)


def layers_at_depth(*, depth: int, of: int, key: str) -> tuple[int, ...]:
    """The `depth` layers that are kept of `of`: the first, the last, and the rest with evenly spread gaps.

    Errors: ConfigError naming `key`.
    """
    if not 2 <= depth <= of:
        raise ConfigError(f"{key} = {depth}: the student has {of} layers; it must be between 2 and {of}.")
    gaps = of - depth
    inner = of - 2
    left_out = {1 + (2 * gap + 1) * inner // (2 * gaps) for gap in range(gaps)}
    return tuple(layer for layer in range(of) if layer not in left_out)


def always_kept(protect: Sequence[int], *, depth: int, needed: Collection[int]) -> frozenset[int]:
    """Layers that may never be left out: `protect` (−1 is the last) and those whose attention is `needed`.

    Errors: ConfigError for a layer that does not exist, and when no layer is left to leave out.
    """
    wrong = [layer for layer in protect if not -depth <= layer < depth]
    if wrong:
        raise ConfigError(f"student.layer_drop.protect: {wrong[0]} is not a layer of the student, which has {depth}.")
    kept = frozenset({layer % depth for layer in protect} | set(needed))
    if len(kept) == depth:
        raise ConfigError(
            f"student.layer_drop.protect = {list(protect)}: with the layers whose attention is compared, all {depth} "
            "layers are protected and none can be left out; protect fewer, or set student.layer_drop to null."
        )
    return kept


@contextmanager
def leaving_out(model: PreTrainedModel, *, layers: Sequence[int]) -> Iterator[None]:
    """Inside the block, these decoder layers return their input.

    Where gradients are recorded, their parameters get a gradient of zero: ZeRO-3 would otherwise use the latest one
    again. They are gathered for that, as always, but nothing is computed with them. The block is one forward.
    """
    if not layers:
        yield
        return
    stack = model.get_submodule(layers_path(model))
    assert isinstance(stack, nn.ModuleList)
    replaced: list[nn.Module] = []

    def replace(module: nn.Module, forward: Callable[..., Tensor]) -> None:
        assert "forward" not in vars(module), "a layer's forward is its class's"
        # Registering it as an attribute of the instance hides the class's, and the hooks around it stay.
        module.forward = forward  # type: ignore[method-assign]
        replaced.append(module)

    try:
        for index in layers:
            layer, own, units = stack[index], list[nn.Parameter](), list[nn.Module]()
            for module, parameters in gathered_units(layer) if torch.is_grad_enabled() else ():
                trained = [parameter for parameter in parameters if parameter.requires_grad]
                if module is layer:
                    own = trained
                elif trained:
                    replace(module, _idle(trained))
                    units.append(module)
            replace(layer, _passing_on(units, own=own))
        yield
    finally:
        for module in replaced:
            del module.forward


def _passing_on(units: Sequence[nn.Module], *, own: Sequence[nn.Parameter]) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *_arguments: Any, **_options: Any) -> Tensor:
        for unit in units:
            hidden_states = unit(hidden_states)
        result: Tensor = _Idle.apply(hidden_states, *own) if own else hidden_states
        return result

    return forward


def _idle(parameters: Sequence[nn.Parameter]) -> Callable[[Tensor], Tensor]:
    def forward(hidden_BSD: Tensor) -> Tensor:
        result: Tensor = _Idle.apply(hidden_BSD, *parameters)
        return result

    return forward


class _Idle(torch.autograd.Function):
    """The first input; the others get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, hidden_BSD: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return hidden_BSD.view_as(hidden_BSD)

    @staticmethod
    def backward(ctx: Any, gradient_BSD: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return (gradient_BSD, *zeros)
