"""Layers that do not learn for a while, and where the backward pass ends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class FrozenLayers:
    """Indices of decoder layers without gradient; `embeddings`: the look-up of the input embeddings too."""

    layers: tuple[int, ...]
    embeddings: bool

    def __str__(self) -> str:
        if not self.layers:
            return "nothing frozen"
        return f"frozen: layers {_ranges(self.layers)}{' and the embeddings' if self.embeddings else ''}"


def freeze_layers(model: PreTrainedModel, *, frozen: FrozenLayers) -> Callable[[], None]:
    """Switch the gradients of these layers off, before the engine is built; call the result to undo the rest.

    A head that is tied to the embeddings goes on learning, and with it the embeddings; their look-up then is a constant
    of the backward pass, which ends at the lowest layer that learns. Without ties the embeddings get no gradient.
    """
    layers = model.get_decoder().layers
    for index in frozen.layers:
        layers[index].requires_grad_(False)
    if not frozen.embeddings:
        return _nothing
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        embedding.requires_grad_(False)
        return _nothing
    return embedding.register_forward_hook(_detached).remove


def _detached(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.detach()


def _nothing() -> None:
    """There is no hook to remove."""


def _ranges(layers: tuple[int, ...]) -> str:
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
