"""What the ranks do in test_loading."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from step_jobs import ZERO3
from tiny import join_rows, make_rows

from largekd.checkpoint.export import write_export
from largekd.config.train import TrainConfig
from largekd.engine.ds_config import frozen_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.models.build import build_model, config_with_layers, initialise_randomly, load_layers, load_pretrained
from largekd.models.decoder import Decoder
from largekd.models.export import stream_tensors
from largekd.models.source import read_config
from largekd.monitoring.memory import process_memory
from largekd.runtime.ranks import Ranks
from largekd.sharding.shards import gathered, resident_bytes


def ds_config(*, zero: dict | None = None, precision: str = "fp32") -> dict:
    ranks = dist.get_world_size()
    train = TrainConfig(
        global_batch_size=ranks, micro_batch_size=1, sequence_length=24, precision=precision, max_steps=1
    )
    return frozen_ds_config(ZERO3 | (zero or {}), train=train, world_size=ranks)


def build(folder: str, *, layers: list[int] | None = None, zero: dict | None = None, precision: str = "fp32"):
    config = read_config(Path(folder), key="teacher.model", trust_remote_code=False)
    if layers is not None:
        config = config_with_layers(config, layers=layers)
    placed = ds_config(zero=zero, precision=precision)
    return build_model(config, ds_config=placed, precision=precision, attention="sdpa")


def whole(model) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            tensors[name] = parameter.detach().clone()
    return tensors


def loaded_weights(*, folder: str, layers: list[int] | None = None, zero: dict | None = None) -> dict:
    model = build(folder, layers=layers, zero=zero)
    if layers is None:
        report = load_pretrained(model, folder=Path(folder), rank=dist.get_rank())
    else:
        report = load_layers(model, folder=Path(folder), rank=dist.get_rank(), layers=layers)
    return {
        "weights": whole(model),
        "unused": report.unused,
        "inv_freq": model.get_decoder().rotary_emb.inv_freq.clone(),
    }


def random_weights(*, folder: str, seed: int) -> dict:
    model = build(folder)
    initialise_randomly(model, seed=seed, rank=dist.get_rank())
    return whole(model)


def hidden_and_residency(*, folder: str, precision: str = "fp32") -> dict:
    """Hidden states of a packed batch, and the bytes this rank holds between forwards."""
    model = build(folder, precision=precision)
    load_pretrained(model, folder=Path(folder), rank=dist.get_rank())
    decoder = Decoder(model=model)
    engine = FrozenEngine(module=decoder, ds_config=ds_config(precision=precision))
    hidden = [engine(batch=join_rows(make_rows(count=2, packed=True)))["last"] for _ in range(3)][-1]
    held = resident_bytes(decoder)
    engine.close()
    return {"hidden": hidden.float(), "held": held, "inv_freq": model.get_decoder().rotary_emb.inv_freq.dtype}


def loading_peak(*, folder: str) -> dict:
    """Growth of this rank's own (anonymous) memory while a checkpoint streams in, and its share of the model."""
    model = build(folder, precision="bf16")
    shard = sum(parameter.ds_tensor.numel() * parameter.ds_tensor.element_size() for parameter in model.parameters())
    largest = max(parameter.ds_numel * parameter.element_size() for parameter in model.parameters())
    before = process_memory().anonymous_bytes
    peak = before
    import largekd.sharding.stream as stream

    write = stream.write_shard

    def watched(parameter, value, *, rank):
        nonlocal peak
        write(parameter, value, rank=rank)
        peak = max(peak, process_memory().anonymous_bytes)

    stream.write_shard = watched
    try:
        load_pretrained(model, folder=Path(folder), rank=dist.get_rank())
    finally:
        stream.write_shard = write
    return {"growth": peak - before, "shard": shard, "largest": largest}


def exported(*, folder: str, target: str) -> None:
    """The model of `folder`, loaded in shards and written as a plain folder, without a tokenizer."""
    model = build(folder)
    load_pretrained(model, folder=Path(folder), rank=dist.get_rank())
    ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size())
    write_export(
        Path(target),
        tensors=stream_tensors(model),
        max_shard_bytes=10**9,
        save_extras=model.config.save_pretrained,
        ranks=ranks,
    )


def two_of_an_unknown_family(*, folder: str, module: str) -> list[bool]:
    """Whether the experts of two models have what their class's decorator gives them; `module` must be new here."""
    assert module not in sys.modules
    models = [build(folder) for _ in range(2)]
    return [hasattr(model.model.layers[0].mlp.experts, "config") for model in models]
