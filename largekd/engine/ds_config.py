"""Merging a placement file with the keys that the run configuration owns."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from largekd.config.train import OptimConfig, TrainConfig


def frozen_ds_config(placement: Mapping[str, Any], *, train: TrainConfig, world_size: int) -> dict[str, Any]:
    """The whole DeepSpeed configuration of a model that is only evaluated: no optimizer, no gradients."""
    merged = deepcopy(dict(placement))
    # An optimizer's placement has no meaning without one, and DeepSpeed would try to honour it.
    merged["zero_optimization"].pop("offload_optimizer", None)
    return merged | _owned(train=train, accumulation=1, world_size=world_size)


def train_ds_config(
    placement: Mapping[str, Any], *, train: TrainConfig, optim: OptimConfig, accumulation: int, world_size: int
) -> dict[str, Any]:
    """The whole DeepSpeed configuration of the student."""
    merged = deepcopy(dict(placement)) | _owned(train=train, accumulation=accumulation, world_size=world_size)
    merged["optimizer"] = {"type": "AdamW", "params": _adamw(optim)}
    merged["zero_force_ds_cpu_optimizer"] = optim.implementation == "deepspeed"
    return merged


def _adamw(optim: OptimConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "lr": optim.lr,
        "betas": list(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    if optim.implementation == "torch":
        # The fused form updates in one sweep; torch's other forms need as many temporaries as there are weights.
        parameters |= {"torch_adam": True, "fused": True}
    return parameters


def _owned(*, train: TrainConfig, accumulation: int, world_size: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": train.micro_batch_size * accumulation * world_size,
        # DeepSpeed clips at 1.0 when the key is absent; 0 is off.
        "gradient_clipping": train.gradient_clipping,
        "bf16": {"enabled": train.precision == "bf16"},
        # ZeRO-3 would otherwise accumulate gradients in the model's dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31 - 1,
    }
