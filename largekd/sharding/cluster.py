"""Joining and leaving the job's process group."""

import atexit
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from largekd.errors import ConfigError
from largekd.runtime.build_lock import require_buildable_ops
from largekd.sharding.accelerator import use_prebuilt_ops

_SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@contextmanager
def process_group(*, timeout_s: int) -> Iterator[None]:
    """Join the process group that the launcher describes, or make one of a single rank; leave it when the process ends.

    `timeout_s` bounds every collective. A group that exists is used, whoever made it.
    Errors: ConfigError for an op that cannot be built and for a master port that is busy or out of reach.
    """
    if dist.is_initialized():
        yield
        return
    use_prebuilt_ops()
    require_buildable_ops()
    _describe_single_rank()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        # Under Slurm a task may see its own device alone.
        accelerator.set_device(int(os.environ["LOCAL_RANK"]) % accelerator.device_count())
    # DeepSpeed calls collectives by names that torch is about to drop; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)
    except dist.DistNetworkError as error:
        raise _unreachable(error) from error
    if accelerator.device_name() == "cpu":
        _forget_shared_buffer()
    yield
    # DeepSpeed keeps hold of the group, so a second run in this process needs the same one: it is left at the very end,
    # and not at all after an error, when peers may still be inside a collective.
    atexit.register(_leave)


def _forget_shared_buffer() -> None:
    """Remove the name of this rank's all-reduce buffer in shared memory; its mappings stay until the ranks end.

    DeepSpeed never removes it, so that every job on a new port would leave 66 MB per rank behind, also one that is
    killed. A collective call: nobody may look for the name any more.
    """
    dist.barrier()
    address, port, rank = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _unreachable(error: dist.DistNetworkError) -> ConfigError:
    """What to do when the ranks cannot meet: on rank 0 mostly a port that somebody else holds."""
    address, port, rank = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    reason = str(error).strip().splitlines()[0]
    if rank == "0":
        hint = "If another job holds the port, choose a free one: `deepspeed --master_port N ...` (or MASTER_PORT=N)."
    else:
        hint = "Check that rank 0 runs there, and that no firewall stands between."
    return ConfigError(f"rank {rank} cannot join the process group at {address}:{port} ({reason}). {hint}")


def _describe_single_rank() -> None:
    """Fill the environment of torch.distributed from Slurm's, or for a run of one rank."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        os.environ.update({name: os.environ[slurm] for name, slurm in _SLURM_NAMES.items()})
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        _bind_gloo_to_route(os.environ["MASTER_ADDR"])
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _bind_gloo_to_route(master: str) -> None:
    """Choose the network interface by which this host reaches the master: gloo otherwise picks by host name."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 9))
        except OSError:
            return
        address = probe.getsockname()[0]
    interfaces = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }
    several_hosts = os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE"))
    if address.startswith("127.") and several_hosts:
        # The master's own name often resolves to loopback, where no other host can reach it.
        address = next((other for other in interfaces if not other.startswith("127.")), address)
    if address in interfaces:
        os.environ["GLOO_SOCKET_IFNAME"] = interfaces[address]
