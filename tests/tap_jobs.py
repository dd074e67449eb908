"""What the ranks do in test_taps: a loss on taps inside a sharded engine, and a frozen engine that taps."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import join_rows, make_rows
from torch import Tensor, nn

from largekd.config.train import OptimConfig, TrainConfig
from largekd.contracts import Batch, TapRequest
from largekd.engine.ds_config import frozen_ds_config, train_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.engine.train import TrainEngine
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder, enable_checkpointing
from largekd.models.source import read_config
from largekd.optim.groups import build_groups

ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
REQUEST = TapRequest(hidden=(0, 2), attention=(1, 2))


class TapLoss(nn.Module):
    """A sum over all taps with fixed factors, and over the last hidden states so that every weight takes part."""

    def __init__(self, *, decoder: Decoder, request: TapRequest = REQUEST, last: float = 1.0) -> None:
        super().__init__()
        self.decoder = decoder
        self.request = request
        self.last = last

    def forward(self, *, batch: Batch) -> dict[str, Tensor]:
        outputs = self.decoder(batch=batch, taps=self.request)
        taps = self.decoder.taps_of(outputs)
        loss = self.last * weighted(outputs["last"])
        for hidden in taps.hidden.values():
            loss = loss + weighted(hidden)
        for inputs in taps.attention.values():
            loss = loss + weighted(inputs.query_BHSd) + weighted(inputs.key_BGSd) + weighted(inputs.value_BGSd)
        return {"loss": loss}


def weighted(values: Tensor) -> Tensor:
    """Σ factor · value² with factors that differ from place to place."""
    factor = torch.cos(torch.arange(values.numel(), dtype=values.dtype)).reshape(values.shape)
    return (factor * values.square()).sum() / values.shape[-1]


def batch_of(rank: int, *, packed: bool) -> Batch:
    return join_rows(make_rows(count=2, packed=packed, seed=rank))


def train_config() -> TrainConfig:
    ranks = dist.get_world_size()
    return TrainConfig(global_batch_size=2 * ranks, micro_batch_size=2, sequence_length=24, precision="fp32")


def sharded(folder: str, *, ds_config: dict[str, Any]) -> Decoder:
    path = Path(folder)
    config = read_config(path, key="model", trust_remote_code=False)
    model = build_model(config, ds_config=ds_config, precision="fp32", attention="sdpa")
    load_pretrained(model, folder=path, rank=dist.get_rank())
    return Decoder(model=model)


def sharded_gradients(*, folder: str, checkpointing: bool, packed: bool, last: float) -> dict[str, Tensor]:
    """The gradient of the loss on taps, a mean over ranks, as ZeRO-3 holds it."""
    from deepspeed.utils import safe_get_full_grad

    optim = OptimConfig(lr=1e-3, schedule="constant", weight_decay=0.0)
    placed = train_ds_config(ZERO3, train=train_config(), optim=optim, accumulation=1, world_size=dist.get_world_size())
    decoder = sharded(folder, ds_config=placed)
    if checkpointing:
        enable_checkpointing(decoder.model)
    module = TapLoss(decoder=decoder, last=last)
    groups = build_groups(module.named_parameters(), config=optim)
    engine = TrainEngine(module=module, groups=groups, ds_config=placed)
    engine.train()
    loss = engine(batch=batch_of(dist.get_rank(), packed=packed))["loss"]
    engine.backward(loss, last=True)
    gradients = {
        name.removeprefix("decoder.model."): safe_get_full_grad(parameter).clone()
        for name, parameter in module.named_parameters()
    }
    engine.close()
    return gradients


def frozen_taps(*, folder: str) -> dict[str, Tensor]:
    """What a frozen sharded decoder captures of this rank's batch."""
    placed = frozen_ds_config(ZERO3, train=train_config(), world_size=dist.get_world_size())
    decoder = sharded(folder, ds_config=placed)
    engine = FrozenEngine(module=decoder, ds_config=placed)
    outputs = engine(batch=batch_of(dist.get_rank(), packed=True), taps=REQUEST)
    engine.close()
    return outputs
