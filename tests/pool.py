"""Rank processes that live as long as the test session: starting DeepSpeed costs more than most tests.

`pool.run(function, **kwargs)` calls a module-level function in every rank and returns the ranks' results in order.
"""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class RankError(AssertionError):
    """A rank raised, died or did not answer."""


class RankPool:
    """`world_size` processes joined in one gloo process group."""

    def __init__(self, *, world_size: int, timeout_s: float = 240.0) -> None:
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
        """The results of `function(**kwargs)` on every rank. A failed call ends the pool; the next one starts anew."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((sys.path, function.__module__, function.__qualname__, kwargs))
        answers = [self._answer(rank, function.__qualname__) for rank in range(self._world_size)]
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def _answer(self, rank: int, name: str) -> tuple[bool, Any]:
        pipe = self._pipes[rank]
        try:
            if pipe.poll(self._timeout_s):
                return pipe.recv()
            return False, f"{name} gave no answer within {self._timeout_s:g} s"
        except (EOFError, ConnectionError):
            self._processes[rank].join(timeout=5)
            return False, f"the process died in {name} with status {self._processes[rank].exitcode}"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self._world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self._world_size, port), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    from largekd.sharding.cluster import process_group

    torch.set_num_threads(1)
    with process_group(timeout_s=120):
        while True:
            try:
                paths, module, name, kwargs = pipe.recv()
            except EOFError:
                return
            sys.path[:] = paths
            try:
                function = getattr(__import__(module, fromlist=["_"]), name)
                pipe.send((True, function(**kwargs)))
            except BaseException:  # the test must see whatever happened in the rank
                pipe.send((False, traceback.format_exc()))
