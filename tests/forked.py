"""Rank processes that may be killed: forked from a server that has torch loaded, so that each costs little."""

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_PRELOAD = ["torch", "torch.distributed", "largekd.checkpoint.state", "largekd.checkpoint.export", "forked"]


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: exit status (negative: killed by that signal), what it returned, its traceback, its stderr."""

    status: int | None
    value: Any
    error: str
    stderr: str


def run_forked(
    function: Callable[..., Any],
    *,
    tmp_path: Path,
    world_size: int = 1,
    timeout_s: float = 60.0,
    group_timeout_s: float = 50.0,
    environment: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Outcome]:
    """Call `function(**kwargs)` in `world_size` new processes joined by gloo; whatever is left at the end is killed."""
    ranks = start_forked(
        function,
        tmp_path=tmp_path,
        world_size=world_size,
        group_timeout_s=group_timeout_s,
        environment=environment,
        **kwargs,
    )
    return [rank.outcome(timeout_s=timeout_s) for rank in ranks]


def start_forked(
    function: Callable[..., Any],
    *,
    tmp_path: Path,
    world_size: int = 1,
    group_timeout_s: float = 50.0,
    environment: dict[str, str] | None = None,
    **kwargs: Any,
) -> list["ForkedRank"]:
    """The same without waiting."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    environment = {"GROUP_TIMEOUT_S": str(group_timeout_s), **(environment or {})}
    store = tmp_path / f"store-{os.urandom(4).hex()}"
    ranks = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        stderr = tmp_path / f"{store.name}-stderr-{rank}.txt"
        arguments = (theirs, function, kwargs, rank, world_size, str(store), str(stderr), environment)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        ranks.append(ForkedRank(process=process, pipe=ours, stderr=stderr))
    return ranks


@dataclass(frozen=True)
class ForkedRank:
    """One running process."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    stderr: Path

    def outcome(self, *, timeout_s: float = 60.0) -> Outcome:
        """Wait for the end, at most `timeout_s`; then kill."""
        value, error = None, ""
        try:
            if self.pipe.poll(timeout_s):
                value, error = json.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            pass
        self.process.join(timeout=10)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            self.process.join()
        text = self.stderr.read_text(errors="replace") if self.stderr.exists() else ""
        return Outcome(status=status, value=value, error=error, stderr=text)


def _serve(
    pipe: Connection,
    function: Callable[..., Any],
    kwargs: dict[str, Any],
    rank: int,
    world_size: int,
    store: str,
    stderr: str,
    environment: dict[str, str],
) -> None:
    import torch.distributed as dist

    os.environ.update(environment)
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644), 2)
    status = 0
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=float(os.environ["GROUP_TIMEOUT_S"])),
            )
        pipe.send_bytes(json.dumps([function(**kwargs), ""]).encode())
    except BaseException:  # the test must see whatever happened in the rank
        pipe.send_bytes(json.dumps([None, traceback.format_exc()]).encode())
        status = 1
    os._exit(status)
