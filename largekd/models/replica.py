"""A whole, unsharded copy of a sharded model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from largekd.errors import ConfigError
from largekd.sharding.shards import full_numel, gathered


def whole_bytes(model: nn.Module) -> int:
    """Bytes of all of a model's parameters, whole."""
    return sum(full_numel(parameter) * parameter.element_size() for parameter in model.parameters())


@contextmanager
def whole_copy(model: PreTrainedModel, *, device: torch.device) -> Iterator[PreTrainedModel]:
    """The same model with its weights of this moment, whole on every rank, in eval mode; its memory is given back when
    the block ends. A collective call. Errors: ConfigError for a model that its config.json alone does not describe.

    The sharded model itself is left alone: running it with gathered weights would release them after the first token,
    and taking its hooks off would spoil the order in which its engine fetches ahead. Parameters are gathered one at a
    time.
    """
    with no_init_weights(), torch.device(device):
        copy = type(model)._from_config(deepcopy(model.config), dtype=model.dtype)
    copy.tie_weights()
    copy.requires_grad_(False)
    copy.eval()
    own, buffers = dict(copy.named_parameters()), dict(copy.named_buffers())
    if own.keys() != dict(model.named_parameters()).keys():
        raise ConfigError(
            f"rollouts.gather: a {type(model).__name__} with modules that its config.json does not name cannot be "
            "copied; choose rollouts.gather=streamed."
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with gathered([parameter]):
                own[name].copy_(parameter)
        for name, buffer in model.named_buffers():
            buffers[name].copy_(buffer)
    yield copy
