"""Filling a sharded student from a teacher's checkpoint, one tensor at a time."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from largekd.errors import ConfigError
from largekd.initialisation.derive import Derivation
from largekd.initialisation.report import Entry, InitialisationReport
from largekd.sharding.shards import full_shape, gathered, is_sharded, write_shard
from largekd.sharding.stream import open_tensors, persistent_buffers


def fill_from(
    model: PreTrainedModel,
    *,
    derivations: Mapping[str, Derivation],
    folder: Path,
    rank: int,
    seed: int,
    teacher: nn.Module | None = None,
) -> InitialisationReport:
    """Give every parameter of `model` its first value, made of tensors of the checkpoint in `folder`.

    Parameters without a derivation are drawn as the model's family draws them, the same values for one seed on any
    number of ranks. teacher: a module that names its tensors, where it is of another family than the model; its weights
    are not looked at. A rank holds one derivation's tensors at a time. A collective call.
    Errors: ConfigError for a tensor that the checkpoint lacks, or one that comes out in another shape than the model's.
    """
    parameters = dict(model.named_parameters())
    draw_missing(model, made=derivations, seed=seed, rank=rank)
    entries = []
    with open_tensors(folder, module=model if teacher is None else teacher) as read:
        for name, parameter in parameters.items():
            derivation = derivations.get(name)
            if derivation is not None:
                write_shard(parameter, _made(name, derivation, read, shape=full_shape(parameter)), rank=rank)
            entries.append(_entry(name, derivation, shape=full_shape(parameter)))
        for name, buffer in persistent_buffers(model):
            derivation = derivations.get(name)
            if derivation is not None:
                with torch.no_grad():
                    buffer.copy_(_made(name, derivation, read, shape=buffer.shape))
                entries.append(_entry(name, derivation, shape=buffer.shape))
    return InitialisationReport(entries=tuple(entries))


def draw_missing(model: PreTrainedModel, *, made: Mapping[str, Derivation], seed: int, rank: int) -> None:
    """Draw the parameters that are not in `made`, and whatever else their modules own. A collective call.

    A parameter with several names, as a tied head, is made under any of them.
    """
    done = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if name in made}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, prefix=path))
        if all(id(value) in done for value in own.values()):
            continue
        with gathered([parameter for parameter in own.values() if is_sharded(parameter)], modifier_rank=0):
            if rank == 0 or not any(map(is_sharded, own.values())):
                _draw(model, module, seed=_seed_of(path, seed=seed))


def _draw(model: PreTrainedModel, module: nn.Module, *, seed: int) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model._init_weights(module)


def _seed_of(path: str, *, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:8], "big") >> 1


def _made(name: str, derivation: Derivation, read: Callable[[str], Tensor], *, shape: torch.Size) -> Tensor:
    value = derivation.make(read)
    if value.shape != shape:
        raise ConfigError(
            f"student.initialise: {name!r} must have shape {tuple(shape)}, and {' and '.join(derivation.sources)} of "
            f"the teacher ({derivation.how}) gives {tuple(value.shape)}. Choose a shape of the teacher's family."
        )
    return value


def _entry(name: str, derivation: Derivation | None, *, shape: torch.Size) -> Entry:
    if derivation is None:
        return Entry(name=name, shape=tuple(shape), sources=(), how="drawn", copied_frac=0.0)
    return Entry(
        name=name,
        shape=tuple(shape),
        sources=derivation.sources,
        how=derivation.how,
        copied_frac=derivation.copied_frac,
    )
