"""Which process this is, and small agreements between ranks.

Every function works without a process group too: then there is one rank. Objects travel as JSON in uint8 tensors:
what arrives is data, whoever sent it, and is readable in a debugger; tuples arrive as lists.
"""

import builtins
import hashlib
import json
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from largekd import errors

_HOST_BACKENDS = ("gloo", "mpi")
_MAIN_FAILED = "largekd/main_failed"


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. `node` numbers the hosts, `local_rank` the processes of one host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0

    @property
    def is_main(self) -> bool:
        """The one rank that writes what is written once."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """The one rank of this host that does what is done once per host."""
        return self.local_rank == 0


def current_ranks() -> Ranks:
    """Rank and world size of the process group; the place on the host from the launcher, else from host names.

    Without a process group there is one rank, whatever the environment says. Call it on every rank.
    """
    if not dist.is_initialized():
        return Ranks()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hosts = gather_objects(socket.gethostname())
    names = list(dict.fromkeys(hosts))
    peers = [other for other in range(world_size) if hosts[other] == hosts[rank]]
    local_rank, local_world_size, node = peers.index(rank), len(peers), names.index(hosts[rank])
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=_from_environment(("LOCAL_RANK",), default=local_rank),
        local_world_size=_from_environment(("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), default=local_world_size),
        node=_from_environment(("GROUP_RANK", "CROSS_RANK"), default=node),
    )


def new_control_group(*, timeout_s: float) -> dist.ProcessGroup | None:
    """A second gloo group for agreements that must not mix with collectives in flight; None without a process group.

    A rank that fails between two collectives of the default group can still tell the others here.
    """
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def barrier(*, group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank is here."""
    all_agree(True, group=group)


def all_agree(ok: bool, *, group: dist.ProcessGroup | None = None) -> bool:
    """True where every rank says `ok`: all-reduce of the minimum."""
    if not dist.is_initialized():
        return ok
    flag = torch.tensor([int(ok)], dtype=torch.int32, device=collective_device(group=group))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag.item())


def all_sum(tensor: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of `tensor` over ranks, as a new tensor of the same device and dtype; the argument is left alone."""
    if not dist.is_initialized():
        return tensor.clone()
    total = tensor.detach().to(collective_device(group=group), copy=True).contiguous()
    dist.all_reduce(total, group=group)
    return total.to(tensor.device)


def tensor_of_main(tensor: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Rank 0's tensor on every rank; the others pass one of its shape and dtype, whose values are ignored."""
    if not dist.is_initialized():
        return tensor
    found = tensor.detach().to(collective_device(group=group), copy=True).contiguous()
    dist.broadcast(found, src=0, group=group)
    return found.to(tensor.device)


def broadcast_object(value: Any, *, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's JSON value on every rank; what the others pass is ignored."""
    if not dist.is_initialized():
        return json.loads(json.dumps(value))
    device = collective_device(group=group)
    payload = _encode(value) if dist.get_rank() == 0 else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([payload.numel()], dtype=torch.int64, device=device)
    dist.broadcast(length, src=0, group=group)
    buffer = payload.to(device) if dist.get_rank() == 0 else _bytes(int(length.item()), device=device)
    dist.broadcast(buffer, src=0, group=group)
    return _decode(buffer)


def gather_objects(value: Any, *, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's JSON value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [json.loads(json.dumps(value))]
    device = collective_device(group=group)
    payload = _encode(value).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([payload.numel()], dtype=torch.int64, device=device), group=group)
    sizes = [int(length.item()) for length in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    buffers = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(buffers, padded, group=group)
    return [_decode(buffer[:size]) for buffer, size in zip(buffers, sizes, strict=True)]


def raise_together(error: BaseException | None, *, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank if any rank brings an error, so that none waits for one that is gone.

    The failing rank raises its own error. The others raise the lowest failing rank's: an error of `largekd.errors` or
    an OSError keeps its class, anything else becomes a RuntimeError; the message names the rank.
    """
    if all_agree(error is None, group=group):
        return
    reports = gather_objects(None if error is None else _report(error), group=group)
    if error is not None:
        raise error
    rank, (name, code, message) = next((rank, report) for rank, report in enumerate(reports) if report is not None)
    raise _rebuilt(name, code=code, message=f"rank {rank}: {message}")


def main_failed_too(*, ranks: Ranks, wait_s: float = 5.0) -> bool:
    """Whether rank 0 also came here, with an error of its own, within `wait_s`; True on rank 0. Not a collective call.

    Call it on the way out of a failed run: a rank that fails alone must speak for itself.
    """
    if not dist.is_initialized():
        return True
    if ranks.is_main:
        _store_of_group().set(_MAIN_FAILED, "1")
        return True
    try:
        _store_of_group().wait([_MAIN_FAILED], timedelta(seconds=wait_s))
    except (dist.DistError, RuntimeError):
        return False
    return True


def forget_failure(*, ranks: Ranks) -> None:
    """Take back what an earlier run of this process group left for `main_failed_too`."""
    if ranks.is_main and dist.is_initialized():
        _store_of_group().delete_key(_MAIN_FAILED)


def require_same(value: str, *, what: str, key: str) -> None:
    """Errors: ConfigError on every rank when `value` differs between ranks; it names the first rank that differs.

    Nodes may have copies of recipes and data; an old copy on one of them would otherwise be a hang or a wrong count.
    """
    digest = hashlib.sha256(value.encode()).hexdigest()
    reports = gather_objects([digest, socket.gethostname()])
    for other, (found, host) in enumerate(reports):
        if found != reports[0][0]:
            raise errors.ConfigError(
                f"rank {other} on {host} has another {what} than rank 0 on {reports[0][1]}; "
                f"make {key} the same on all nodes."
            )


class Together:
    """Context manager around what one rank may fail at: an error in any rank's body is raised on every rank."""

    def __init__(self, *, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        raise_together(error, group=self._group)


class MainFirst:
    """Context manager: local rank 0 of every host runs the body first, the others when it is done.

    One fills a cache, all read it. An error in any body is raised on every rank. Two agreements per use, in `group`,
    whose time-out must allow for the slowest download or tokenization.
    """

    def __init__(self, *, ranks: Ranks, group: dist.ProcessGroup | None = None) -> None:
        self._first = ranks.is_local_main
        self._group = group

    def __enter__(self) -> None:
        if not self._first:
            raise_together(None, group=self._group)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        raise_together(error, group=self._group)
        if self._first:
            raise_together(None, group=self._group)


def collective_device(*, group: dist.ProcessGroup | None = None) -> torch.device:
    """Where tensors must live for the group's collectives."""
    backend = dist.get_backend(group)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or any(name in backend for name in _HOST_BACKENDS):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _store_of_group() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(buffer: Tensor) -> Any:
    return json.loads(bytes(buffer.cpu().numpy()))


def _bytes(length: int, *, device: torch.device) -> Tensor:
    return torch.empty(length, dtype=torch.uint8, device=device)


def _from_environment(names: tuple[str, ...], *, default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def _report(error: BaseException) -> tuple[str, int | None, str]:
    """What the other ranks need in order to raise it as well: class name, errno, message."""
    name = type(error).__name__
    message = str(error) if isinstance(error, errors.LargeKDError | OSError) else f"{name}: {error}"
    return name, error.errno if isinstance(error, OSError) else None, message


def _rebuilt(name: str, *, code: int | None, message: str) -> Exception:
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.LargeKDError):
        return kind(message)
    if code is not None:
        return OSError(code, message)
    return RuntimeError(message)
