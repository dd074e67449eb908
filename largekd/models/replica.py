"""A whole, unsharded copy of a sharded model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from largekd.models.lora import plain_names, whole_parameters
from largekd.sharding.shards import full_numel


def whole_bytes(model: nn.Module) -> int:
    """Bytes of all of a model's parameters, whole."""
    return sum(full_numel(parameter) * parameter.element_size() for parameter in model.parameters())


def is_copyable(model: PreTrainedModel) -> bool:
    """Whether config.json alone describes all of the model's parameters and buffers. Takes no memory for weights."""
    return _names(_blank(model, on=torch.device("meta"))) == _names(model)


def _names(model: nn.Module) -> tuple[set[str], set[str]]:
    return set(plain_names(model)), {name for name, _ in model.named_buffers()}


def _blank(model: PreTrainedModel, *, on: torch.device) -> PreTrainedModel:
    """The model that config.json describes, without its weights."""
    with no_init_weights(), on:
        blank = type(model)._from_config(deepcopy(model.config), dtype=model.dtype)
    blank.tie_weights()
    return blank


@contextmanager
def whole_copy(model: PreTrainedModel, *, device: torch.device) -> Iterator[PreTrainedModel]:
    """The same model with its weights of this moment, adapters merged, whole on every rank, in eval mode; its memory
    is given back when the block ends. A collective call, for a model that is copyable.

    The sharded model itself is left alone: running it with gathered weights would release them after the first token,
    and taking its hooks off would spoil the order in which its engine fetches ahead. Parameters are gathered one at a
    time.
    """
    copy = _blank(model, on=device)
    assert _names(copy) == _names(model), "see is_copyable"
    copy.requires_grad_(False)
    copy.eval()
    own, buffers = dict(copy.named_parameters()), dict(copy.named_buffers())
    with torch.no_grad():
        for name, parameter in whole_parameters(model):
            own[name].copy_(parameter)
        for name, buffer in model.named_buffers():
            buffers[name].copy_(buffer)
    yield copy
