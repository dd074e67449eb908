"""Parameters that ZeRO-3 has partitioned: building, gathering, reading and writing shards."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from largekd.sharding.pieces import Pieces

_BUILD_LOCK = threading.Lock()


@contextmanager
def sharded_init(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Every parameter of a module built inside is partitioned over all ranks at once; its values are undefined.

    `ds_config` is a whole DeepSpeed configuration; its placement decides where the shards live and its precision
    decides their dtype. Buffers keep the dtype that the model gives them.
    """
    import deepspeed
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    with (
        _BUILD_LOCK,
        no_init_weights(),
        prevent_arange_dtype_change(),
        deepspeed.zero.Init(config_dict_or_path=dict(ds_config)),
    ):
        yield


@contextmanager
def gathered(parameters: Iterable[Tensor], *, modifier_rank: int | None = None) -> Iterator[None]:
    """Whole parameters inside the block, on every rank; with `modifier_rank`, that rank's changes are kept.

    A collective call: every rank must make it with the same parameters.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank):
        yield


@contextmanager
def gathering_forward(module: nn.Module) -> Iterator[None]:
    """Inside the block, forwards of `module` work without an engine: each submodule gathers its own parameters while
    it runs. Every rank must run the same forwards. For a few evaluations at build; nothing is prefetched."""
    open_blocks: dict[nn.Module, tuple[AbstractContextManager[None], list[nn.Parameter]]] = {}
    held: set[int] = set()

    def enter(inner: nn.Module, _inputs: Any) -> None:
        # What an outer module holds is whole already, and must stay so.
        needed = [parameter for parameter in _used_by(inner) if id(parameter) not in held]
        held.update(map(id, needed))
        block = gathered(needed)
        open_blocks[inner] = (block, needed)
        block.__enter__()

    def leave(inner: nn.Module, _inputs: Any, _output: Any) -> None:
        block, needed = open_blocks.pop(inner)
        held.difference_update(map(id, needed))
        block.__exit__(None, None, None)

    handles = []
    for inner in module.modules():
        if any(is_sharded(parameter) for parameter in _used_by(inner)):
            handles += [inner.register_forward_pre_hook(enter), inner.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _used_by(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters, and those of others that `register_external` gave it."""
    external: dict[int, nn.Parameter] = dict(getattr(module, "ds_external_parameters", dict)())
    return [*module.parameters(recurse=False), *external.values()]


@contextmanager
def sharded_modules(ds_config: Mapping[str, Any], *, seed: int) -> Iterator[None]:
    """Like `sharded_init` for modules that initialise themselves, which they do with the same values on all ranks."""
    import deepspeed

    with _BUILD_LOCK, torch.random.fork_rng():
        torch.manual_seed(seed)
        with deepspeed.zero.Init(config_dict_or_path=dict(ds_config)):
            yield


def gathered_units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Every module inside `module` for whose own call parameters are gathered, with those."""
    from deepspeed.utils import z3_leaf_module

    leaf = z3_leaf_module(module)
    own = list(module.parameters(recurse=leaf))
    if own:
        yield module, own
    if not leaf:
        for child in module.children():
            yield from gathered_units(child)


def shard_parameters(module: nn.Module, *, ds_config: Mapping[str, Any]) -> None:
    """Partition those parameters of `module` that are not yet, with the values of rank 0. A collective call."""
    import deepspeed

    with _BUILD_LOCK:
        deepspeed.zero.Init(module=module, config_dict_or_path=dict(ds_config))


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 owns this parameter."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Any) -> torch.Size:
    """Shape of the whole parameter."""
    return parameter.ds_shape if is_sharded(parameter) else parameter.shape


def full_numel(parameter: Tensor) -> int:
    """Elements of the whole parameter."""
    return int(full_shape(parameter).numel())


def resident_bytes(module: nn.Module) -> int:
    """Bytes of parameter storage that this rank holds at this moment: its shards and whatever is gathered."""
    total = 0
    parameter: Any
    for parameter in module.parameters():
        total += parameter.untyped_storage().nbytes()
        if is_sharded(parameter):
            total += parameter.ds_tensor.untyped_storage().nbytes()
    return total


def write_shard(parameter: Any, value: Tensor | Pieces, *, rank: int) -> None:
    """Copy this rank's part of `value` (the whole tensor, any dtype, usually a mapped file) into its shard.

    No communication, and no more of `value` is read than the shard needs. A shard that lives on NVMe is not in
    memory and is written through a gather instead, so that all ranks must call this together.
    """
    assert full_shape(parameter) == value.shape
    if not is_sharded(parameter):
        with torch.no_grad():
            parameter.copy_(_whole(value))
        return
    shard = parameter.ds_tensor
    if shard.numel() == 0 or shard.final_location is not None:
        with gathered([parameter], modifier_rank=0):
            if rank == 0:
                with torch.no_grad():
                    parameter.copy_(_whole(value))
        return
    total = value.shape.numel()
    start = min(rank * shard.numel(), total)
    stop = min(start + shard.numel(), total)
    with torch.no_grad():
        if isinstance(value, Pieces):
            for offset, part in value.span(start, stop):
                shard[offset : offset + part.numel()].copy_(part)
        else:
            shard[: stop - start].copy_(value.reshape(-1)[start:stop])


def _whole(value: Tensor | Pieces) -> Tensor:
    return value.whole() if isinstance(value, Pieces) else value


def register_external(module: nn.Module, parameter: Tensor) -> None:
    """Tell ZeRO-3 that `module` uses a parameter that another module owns, so that it is whole inside its forward."""
    import deepspeed

    if is_sharded(parameter):
        deepspeed.zero.register_external_parameter(module, parameter)
