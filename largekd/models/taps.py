"""Hidden states, attention inputs and router logits of chosen decoder layers, captured on the way through an unchanged
model.

Hidden states and routers come from forward hooks. Queries, keys and values come from the one place where every
attention implementation meets: the function that an attention module looks up in the transformers attention interface
under its configuration's name for it. While a forward is armed, a module that is asked for sees a view of its
configuration with the name of a recording function; that function gives the module its own configuration back, records,
and calls what the module would have called. So only the modules asked for are touched, once per forward; the model's
configuration, from which masks are made and which flash attention asks for its version, keeps its name; and whatever
activation checkpointing runs again in the backward pass finds the model as it was and records nothing.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from largekd.contracts import TapRequest
from largekd.errors import ConfigError
from largekd.models.build import layers_path
from largekd.models.router import RouterShape, find_router, read_router, router_layers, router_shape

_RECORDING = "largekd_recording"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"
# What changes the scores in a way that AttentionInputs cannot say, by keyword argument of the attention function.
_UNKNOWN_TERMS = ("s_aux", "position_bias")
_KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of a model's attention. `value_width` None: values are as wide as queries and keys."""

    heads: int
    key_heads: int
    head_width: int
    value_width: int | None = None

    def total_width(self, letter: str, /) -> int:
        """Width of all heads of queries ("q"), keys ("k") or values ("v"), key heads repeated to the query heads."""
        return self.heads * (self.value_width or self.head_width if letter == "v" else self.head_width)


@dataclass(frozen=True)
class ScoreRule:
    """How a layer makes scores of queries and keys: softcap(scale · query · keyᵀ) over the last `window` positions."""

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass
class Capture:
    """What one forward recorded, by layer: outputs, and (query, key, value) in the shapes that the model used."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    rules: dict[int, ScoreRule] = field(default_factory=dict)
    router: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def covers(self, request: TapRequest) -> bool:
        """Whether everything that was asked for is here."""
        return (
            self.hidden.keys() == set(request.hidden)
            and self.attention.keys() == set(request.attention)
            and self.router.keys() == set(request.router)
        )

    def take_output(self, _module: nn.Module, _inputs: Any, output: Any, *, layer: int) -> None:
        """The forward hook of decoder layer `layer`."""
        self.hidden[layer] = output if isinstance(output, Tensor) else output[0]

    def take_router(
        self, _module: nn.Module, _inputs: Any, output: Any, *, layer: int, model_type: str, chosen: int
    ) -> None:
        """The forward hook of the router of decoder layer `layer`."""
        self.router[layer] = read_router(output, model_type=model_type, chosen=chosen)

    def take_attention(
        self, *, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None, options: Mapping[str, Any]
    ) -> None:
        """What an attention function was called with; `window` is the mask's, for families that do not pass it on.

        Errors: ConfigError for scores of an unknown kind.
        """
        for name in _UNKNOWN_TERMS:
            if options.get(name) is not None:
                raise ConfigError(
                    f"objective.attention: the attention of layer {layer} adds {name} to its scores; queries and keys "
                    "alone do not give its maps. Remove the attention terms or choose another model."
                )
        scaling = options.get("scaling")
        self.attention[layer] = (query, key, value)
        self.rules[layer] = ScoreRule(
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            window=options.get("sliding_window") or window,
            softcap=options.get("softcap"),
        )


@contextmanager
def capturing(model: PreTrainedModel, *, request: TapRequest) -> Iterator[Capture]:
    """Record the first run of the layers asked for inside the block; `check_layers` must have passed the request.

    The block is one forward. The tensors keep their graph, and the model computes bit for bit what it does without.
    """
    capture = Capture()
    if not request:
        yield capture
        return
    layers = _decoder_layers(model)
    hooks, configs = [], []
    try:
        for index in request.hidden:
            # Registered last, it sees what the next layer sees, after the hooks of parameter partitioning.
            hooks.append(layers[index].register_forward_hook(partial(capture.take_output, layer=index)))
        for index in request.router:
            router = find_router(layers[index])
            shape = None if router is None else router_shape(router, model=model)
            assert router is not None and shape is not None
            record = partial(capture.take_router, layer=index, model_type=model.config.model_type, chosen=shape.chosen)
            hooks.append(router.register_forward_hook(record))
        if request.attention:
            AttentionInterface.register(_RECORDING, _recording_attention)
        for index in request.attention:
            attention = _attention_of(layers[index])
            assert attention is not None
            configs.append((attention, attention.config))
            attention.config = _RecordingConfig(
                config=attention.config, layer=index, window=_mask_window(model, layer=index), capture=capture
            )
        yield capture
    finally:
        for hook in hooks:
            hook.remove()
        for attention, config in configs:
            attention.config = config


class _RecordingConfig:
    """A model's configuration under another attention implementation."""

    _attn_implementation = _RECORDING

    def __init__(self, *, config: Any, layer: int, window: int | None, capture: Capture) -> None:
        self.own = config
        self.layer = layer
        self.window = window
        self.capture = capture

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def _recording_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> Any:
    """The attention function of a module that is asked for: record, and do what the module does otherwise."""
    recording = module.config
    assert isinstance(recording, _RecordingConfig)
    # Before anything else: flash attention reads the module's implementation, and a recomputation must not record.
    module.config = recording.own
    recording.capture.take_attention(
        layer=recording.layer, query=query, key=key, value=value, window=recording.window, options=options
    )
    return _attention_function(module)(module, query, key, value, attention_mask, **options)


def _attention_function(module: Any) -> Callable[..., Any]:
    """What the module's own look-up gives: its modelling file's interface and its modelling file's eager function."""
    names = _forward_of(module).__globals__
    return names[_INTERFACE].get_interface(module.config._attn_implementation, names.get(_EAGER))


def _mask_window(model: PreTrainedModel, *, layer: int) -> int | None:
    """The window in the mask that the model makes for a layer."""
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        windowed = kinds[layer] == "sliding_attention"
    else:
        windowed = _uses(model.get_decoder(), "create_sliding_window_causal_mask")
    return (getattr(model.config, "sliding_window", None) or None) if windowed else None


def _forward_of(module: nn.Module) -> Any:
    # The class's: an instance's may be wrapped by an engine, and a decorated one hides the names it uses.
    return inspect.unwrap(type(module).forward)


def _uses(module: nn.Module, name: str) -> bool:
    code = getattr(_forward_of(module), "__code__", None)
    return code is not None and name in code.co_names


def _attention_of(layer: nn.Module) -> Any:
    """The one module of a decoder layer that looks its function up in the attention interface; None: there is none."""
    found = [module for module in layer.modules() if _uses(module, _INTERFACE) and hasattr(module, "config")]
    return found[0] if len(found) == 1 else None


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.get_submodule(layers_path(model))
    assert isinstance(layers, nn.ModuleList)
    return layers


def depth(model: PreTrainedModel) -> int:
    """Number of decoder layers."""
    return int(model.config.num_hidden_layers)


def hidden_width(model: PreTrainedModel) -> int:
    """Width of a decoder layer's output."""
    return int(model.config.hidden_size)


def attention_shape(model: PreTrainedModel, *, layer: int) -> AttentionShape:
    """Heads of a layer that `check_layers` has passed for attention."""
    config = model.config
    attention = _attention_of(_decoder_layers(model)[layer])
    heads = int(config.num_attention_heads)
    width = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    return AttentionShape(
        heads=heads, key_heads=int(getattr(config, "num_key_value_heads", None) or heads), head_width=int(width)
    )


def routers_of(model: PreTrainedModel) -> dict[int, RouterShape]:
    """The decoder layers that have a router, with its shape; none for a dense model."""
    return router_layers(model, layers=_decoder_layers(model))


def check_layers(request: TapRequest, *, model: PreTrainedModel, key: str) -> None:
    """Refuse at build what cannot be captured; `key` names what asked for it, such as `objective.attention[0].layers`.

    Errors: ConfigError for a layer that does not exist, and for attention that queries and keys do not determine.
    """
    layers = _decoder_layers(model)
    for index in (*request.hidden, *request.attention, *request.router):
        if not 0 <= index < len(layers):
            raise ConfigError(
                f"{key}: layer {index} does not exist; the {model.config.model_type!r} model has layers "
                f"0 to {len(layers) - 1}."
            )
    routers = router_layers(model, layers=layers) if request.router else {}
    for index in request.router:
        if index not in routers:
            raise ConfigError(
                f"{key}: layer {index} of the {model.config.model_type!r} model has no router; the layers with one are "
                f"{', '.join(map(str, routers)) or 'none'}."
            )
    for index in request.attention:
        reason = _refusal(model, layer=layers[index], index=index)
        if reason is not None:
            raise ConfigError(
                f"{key}: the attention of layer {index} of the {model.config.model_type!r} model cannot be captured: "
                f"{reason}."
            )


def _refusal(model: PreTrainedModel, *, layer: nn.Module, index: int) -> str | None:
    """Why the attention of a layer cannot be captured; None: it can."""
    config, attention = model.config, _attention_of(layer)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[index] not in _KNOWN_LAYER_TYPES:
        return f"it is of the type {kinds[index]!r}, and only full and sliding-window attention are understood"
    if attention is None:
        return "no module of it goes through the attention interface of transformers"
    if config._attn_implementation == "eager" and not (
        _uses(attention, _EAGER) and _EAGER in _forward_of(attention).__globals__
    ):
        return "its eager function is not where transformers has it; set teacher.attention or student.attention to sdpa"
    if getattr(config, "kv_lora_rank", None):
        return "its heads have latent keys, wider than its values"
    if getattr(attention, "sinks", None) is not None:
        return "its softmax has attention sinks beside the keys"
    if not getattr(attention, "is_causal", True):
        return "it is not causal"
    return None
