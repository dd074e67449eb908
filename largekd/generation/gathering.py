"""Whether a sharded model writes from a whole copy on every rank, or from its shards."""

import logging
from typing import Literal

import psutil
import torch
from transformers import PreTrainedModel

from largekd.errors import ConfigError
from largekd.models.replica import is_copyable, whole_bytes
from largekd.runtime.ranks import Ranks, all_agree

logger = logging.getLogger(__name__)

Gather = Literal["whole", "streamed", "auto"]

_ROOM = 2.0
"""Free memory that `auto` asks for, in times of the whole weights: keys and values take some too."""


def possible(model: PreTrainedModel, *, gather: Gather, key: str, ranks: Ranks) -> Gather:
    """`gather`, or `streamed` in place of `auto` for a model that cannot be copied.

    Errors: ConfigError for `whole` and such a model; `key` is the configuration key.
    """
    if gather == "streamed" or is_copyable(model):
        return gather
    name = type(model).__name__
    if gather == "whole":
        raise ConfigError(
            f"{key} = whole: a {name} with modules that its config.json does not name cannot be copied; "
            f"choose {key}=streamed."
        )
    if ranks.is_main:
        logger.info("%s = auto: shards, for config.json does not describe all of this %s", key, name)
    return "streamed"


def fitting(model: PreTrainedModel, *, key: str, device: torch.device, ranks: Ranks) -> Literal["whole", "streamed"]:
    """whole where every rank has room for a copy. A collective call."""
    needed = whole_bytes(model)
    if device.type == "cpu":
        free = psutil.virtual_memory().available // ranks.local_world_size
    else:
        free = torch.get_device_module(device).mem_get_info()[0]
    fits = all_agree(_ROOM * needed <= free)
    if ranks.is_main:
        how = "a whole copy of the weights" if fits else "shards, gathered for every token"
        logger.info("%s = auto: %s (%.2f GB whole, %.2f GB free)", key, how, needed / 1e9, free / 1e9)
    return "whole" if fits else "streamed"
