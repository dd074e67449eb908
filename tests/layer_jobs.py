"""What the ranks do in test_layers: find the pairs of an objective between two sharded models before any engine."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from alignment_reference import aligned_rows, join
from step_jobs import ZERO3

import largekd.distillation.layers as layers
from largekd.config.load import parse_config
from largekd.config.run import RunConfig
from largekd.config.train import OptimConfig
from largekd.contracts import Batch, TapRequest
from largekd.engine.ds_config import frozen_ds_config, train_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder
from largekd.models.source import read_config
from largekd.objectives.terms import build_objective
from largekd.runtime.ranks import current_ranks
from largekd.sharding.shards import gathering_forward, resident_bytes


def configured(objective: Mapping[str, Any], *, teacher_layers: list[int] | None = None) -> RunConfig:
    """A run's configuration with this objective; nothing else of it is looked at."""
    return parse_config(
        {
            "run": {"dir": "unused"},
            "teacher": {"model": "unused", "deepspeed": "ds_configs/zero3.json"},
            "student": {"deepspeed": "ds_configs/zero3.json"}
            | ({"model": "unused"} if teacher_layers is None else {"teacher_layers": teacher_layers}),
            "data": {"train": "unused.jsonl"},
            "train": {"max_steps": 1, "global_batch_size": 2, "micro_batch_size": 1, "sequence_length": 24}
            | {"precision": "fp32"},
            "objective": dict(objective),
            "checkpoint": {"every_steps": 0},
        }
    )


def sharded(name: str, *, trained: bool = False) -> tuple[Decoder, dict[str, Any]]:
    """A sharded decoder with its weights, and the configuration for its engine."""
    train, world_size = configured({}).train, dist.get_world_size()
    train = train.model_copy(update={"global_batch_size": world_size})
    if trained:
        optim = OptimConfig(lr=1e-3)
        ds_config = train_ds_config(ZERO3, train=train, optim=optim, accumulation=1, world_size=world_size)
    else:
        ds_config = frozen_ds_config(ZERO3, train=train, world_size=world_size)
    model_config = read_config(Path(name), key="model", trust_remote_code=False)
    model = build_model(model_config, ds_config=ds_config, precision="fp32", attention="sdpa")
    load_pretrained(model, folder=Path(name), rank=dist.get_rank())
    return Decoder(model=model), ds_config


def own_rows(count: int, *, packed: bool) -> Iterator[Batch]:
    """This rank's share of the first rows, in micro-batches of one."""
    for row in aligned_rows(count=count, packed=packed)[dist.get_rank() :: dist.get_world_size()]:
        yield join([row])


def pairs_of(
    *, teacher: str, student: str, objective: dict[str, Any], folder: str, packed: bool = True, resumed: bool = False
) -> dict[str, Any]:
    """`pairs` that are found in `folder`, the number of measurements, and bytes of shards before and after."""
    decoders = {"teacher": sharded(teacher)[0], "student": sharded(student, trained=True)[0]}
    before = [resident_bytes(decoder) for decoder in decoders.values()]
    measured, original = [], layers._measure

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        measured.append(original(*arguments, **options))
        return measured[-1]

    layers._measure = counted
    try:
        pairs = layers.find_pairs(
            build_objective(configured(objective).objective),
            config=configured(objective),
            rows=lambda count: own_rows(count, packed=packed),
            folder=Path(folder),
            ranks=current_ranks(),
            resumed=resumed,
            **decoders,
        )
    finally:
        layers._measure = original
    return {
        "pairs": {name: [tuple(pair) for pair in found] for name, found in pairs.items()},
        "similarity": measured,
        "resident": (before, [resident_bytes(decoder) for decoder in decoders.values()]),
        "training": [decoder.training for decoder in decoders.values()],
    }


def forwards(*, teacher: str) -> dict[str, Any]:
    """Outputs with taps of `gathering_forward` and of an engine afterwards, and resident bytes around the former."""
    decoder, ds_config = sharded(teacher)
    taps = TapRequest(hidden=(0, 2), attention=(1,))
    before, outputs = resident_bytes(decoder), []
    for batch in own_rows(4, packed=True):
        with torch.no_grad(), gathering_forward(decoder):
            outputs.append({name: value.clone() for name, value in decoder(batch=batch, taps=taps).items()})
    after = resident_bytes(decoder)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in decoder.modules())
    engine = FrozenEngine(module=decoder, ds_config=ds_config)
    expected = [dict(engine(batch=batch, taps=taps)) for batch in own_rows(4, packed=True)]
    engine.close()
    return {"outputs": outputs, "expected": expected, "resident": (before, after), "hooks": hooks}
