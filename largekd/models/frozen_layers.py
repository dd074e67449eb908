"""Layers that do not learn for a while, and where the backward pass ends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from largekd.errors import ConfigError
from largekd.models.build import layers_path

# Between the look-up and the layers: of OPT and of BLOOM.
_BEFORE_LAYERS = ("project_in", "word_embeddings_layernorm")


@dataclass(frozen=True)
class FrozenLayers:
    """Indices of decoder layers without gradient; `embeddings`: the look-up of the input embeddings too."""

    layers: tuple[int, ...]
    embeddings: bool

    def __str__(self) -> str:
        if not self.layers:
            return "nothing frozen"
        return f"frozen: layers {_ranges(self.layers)}{' and the embeddings' if self.embeddings else ''}"


def check_freezable(model: PreTrainedModel, *, key: str) -> None:
    """Errors: ConfigError names `key` where the layers of this family were not found."""
    try:
        layers_path(model)
    except ConfigError as error:
        raise ConfigError(
            f"{key}: the decoder layers of a {model.config.model_type!r} model were not found, and so cannot be frozen "
            "one by one; remove it or choose another student."
        ) from error


def freeze_layers(model: PreTrainedModel, *, frozen: FrozenLayers) -> Callable[[], None]:
    """Switch the gradients of these layers off, before the engine is built; call the result to undo the rest.

    A head that is tied to the embeddings goes on learning, and with it the embeddings; their look-up then is a constant
    of the backward pass, which ends at the lowest layer that learns. Without ties the embeddings get no gradient.
    Learned positions and whatever else stands before the layers in the decoder is frozen with the look-up.
    """
    path = layers_path(model)
    layers, decoder = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    for index in frozen.layers:
        layers.get_submodule(str(index)).requires_grad_(False)
    if not frozen.embeddings:
        return _nothing
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in decoder.named_children():
        if module is not embedding and (isinstance(module, nn.Embedding) or name in _BEFORE_LAYERS):
            module.requires_grad_(False)
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
