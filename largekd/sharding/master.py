"""This rank's shards as tensors: the optimizer's float32 copy of them, and those of a model that no engine trains."""

from typing import Any

import torch
from torch import Tensor

from largekd.sharding.shards import is_sharded


def master_shard(parameter: Any) -> Tensor:
    """This rank's float32 shard of a ZeRO-3 parameter: the optimizer's own copy where the parameter is trained.

    Before there is an engine, and for a parameter that is not trained, the shard of the model itself. No communication.
    The tensor may be the optimizer's memory: read it, do not keep or change it. With an optimizer in host memory it is
    a copy on the accelerator. A shard on NVMe is out of reach.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    assert is_sharded(parameter)
    if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
        master = safe_get_local_fp32_param(parameter)
        assert master.dtype == torch.float32 and master.numel() == parameter.ds_tensor.numel()
        return master
    return own_shard(parameter).detach().float()


def own_shard(parameter: Any) -> Tensor:
    """This rank's shard of a ZeRO-3 parameter itself; who writes to it calls `drop_whole_copy` afterwards."""
    assert is_sharded(parameter)
    shard: Tensor = parameter.ds_tensor
    assert parameter.ds_tensor.final_location is None, "a shard on NVMe is not in memory"
    return shard


def drop_whole_copy(parameter: Any) -> None:
    """Forget the whole parameter that an engine kept (a small one, under its persistence threshold).

    The next forward gathers it anew from the shards. Every rank drops the same parameters, between two forwards.
    """
    parameter.partition()
