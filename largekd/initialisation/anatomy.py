"""Where the parts of a decoder layer are that a calibrated rule looks at."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from largekd.models.build import layers_path
from largekd.models.taps import attention_shape, hidden_width
from largekd.sharding.shards import full_shape

_ATTENTION_ENDS = ("o_proj", "out_proj", "dense")
_MLP_ENDS = ("down_proj", "fc2", "dense_4h_to_h")


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer: its norms of the stream's width, those of them whose input is the stream itself (without the
    one that reads the layer's input), the last projections of attention and MLP, and its query heads."""

    layer: nn.Module
    norms: tuple[nn.Module, ...]
    inner_norms: tuple[nn.Module, ...]
    attention_end: nn.Module | None
    mlp_end: nn.Module | None
    heads: int


def layer_parts(model: PreTrainedModel) -> tuple[LayerParts, ...]:
    """The parts of every decoder layer, in order. Errors: ConfigError for a family that keeps its layers elsewhere."""
    layers = model.get_submodule(layers_path(model))
    return tuple(_parts(layer, model=model, index=index) for index, layer in enumerate(layers.children()))


def _parts(layer: nn.Module, *, model: PreTrainedModel, index: int) -> LayerParts:
    width = hidden_width(model)
    norms = dict(_norms(layer, width=width))
    inner = "pre_feedforward_layernorm" if "pre_feedforward_layernorm" in norms else "post_attention_layernorm"
    return LayerParts(
        layer=layer,
        norms=tuple(norms.values()),
        # Where the first norm stands behind attention (OLMo 2), none inside the layer reads the stream.
        inner_norms=(norms[inner],) if "input_layernorm" in norms and inner in norms else (),
        attention_end=_only(layer, names=_ATTENTION_ENDS, part="att"),
        mlp_end=_only(layer, names=_MLP_ENDS, part="mlp"),
        heads=attention_shape(model, layer=index).heads,
    )


def _norms(layer: nn.Module, *, width: int) -> Iterator[tuple[str, nn.Module]]:
    for name, module in layer.named_children():
        own = list(module.named_parameters())
        if "norm" in name and own and all(tuple(full_shape(value)) == (width,) for _, value in own):
            yield name, module


def _only(layer: nn.Module, *, names: tuple[str, ...], part: str) -> nn.Module | None:
    """The one linear module of these names in the layer's attention or MLP; None where there is none, or several."""
    found = [
        module
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) and part in path.split(".")[0].lower() and path.rsplit(".", 1)[-1] in names
    ]
    return found[0] if len(found) == 1 else None
