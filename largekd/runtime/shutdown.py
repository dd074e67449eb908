"""Being asked to stop: SIGTERM, SIGINT, or a launcher that is gone. A flag is set; the loop saves and leaves.

DeepSpeed's launcher signals one rank at a time, so the flag means something only after the ranks agreed on it.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePath
from types import FrameType, TracebackType
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1
_PR_GET_PDEATHSIG = 2
_LAUNCHERS = ("deepspeed.launcher.launch", "torch.distributed.run", "torch.distributed.launch")
_COMMANDS = ("deepspeed", "torchrun")
_RUNNER = "deepspeed.launcher.runner"

logger = logging.getLogger(__name__)


class StopSignal:
    """Context manager around the loop; `requested` turns true once and `reason` says why.

    With `launched=False` (a notebook, a library call) or outside the main thread no handler is installed and the flag
    is only set by `request`. On exit the former handlers are back and the watching thread has ended.
    A process started by a launcher also stops when the launcher, or the command that started it, is gone; a process
    started from a shell does not, so that `nohup` keeps its meaning.
    """

    def __init__(self, *, launched: bool = True, poll_s: float = 1.0) -> None:
        self._launched = launched and threading.current_thread() is threading.main_thread()
        self._poll_s = poll_s
        self._pid = os.getpid()
        self._reason = ""
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._former_handlers: dict[signal.Signals, Any] = {}
        self._former_death_signal: int | None = None

    @property
    def requested(self) -> bool:
        """True once this rank was told to stop."""
        return bool(self._reason)

    @property
    def reason(self) -> str:
        """What told it, e.g. `SIGTERM`; empty until then."""
        return self._reason

    def request(self, *, reason: str) -> None:
        """Set the flag; the first reason stays."""
        self._reason = self._reason or reason

    def __enter__(self) -> "StopSignal":
        if not self._launched:
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former_handlers[number] = signal.signal(number, self._on_signal)
        ancestors = launcher_ancestors(psutil.Process())
        if ancestors:
            self._former_death_signal = _replace_death_signal(signal.SIGTERM)
            self._thread = threading.Thread(
                target=self._watch, args=(ancestors,), name="largekd-launcher-watch", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if self._former_death_signal is not None:
            _replace_death_signal(self._former_death_signal)
        for number, handler in self._former_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former_handlers.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked worker inherits the handler; whoever ends it by signal expects it to die.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.request(reason=signal.Signals(number).name)

    def _watch(self, ancestors: Sequence[psutil.Process]) -> None:
        while not self._closed.wait(self._poll_s):
            for process in ancestors:
                if not process_lives(process):
                    self.request(reason=f"the launcher (pid {process.pid}) is gone")
                    return


def end_with_launcher(*, poll_s: float = 1.0) -> None:
    """From now on this process gets SIGTERM when its launcher, or the command that started the launcher, is gone.

    To be called first of all: a launcher that dies while the rank still imports would otherwise never be missed.
    Without a launcher nothing is watched.
    """
    ancestors = launcher_ancestors(psutil.Process())
    if not ancestors:
        return
    _replace_death_signal(signal.SIGTERM)

    def watch() -> None:
        while all(process_lives(process) for process in ancestors):
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="largekd-launcher-tie", daemon=True).start()


def launcher_ancestors(process: psutil.Process) -> list[psutil.Process]:
    """The launcher that started `process` and the command that started the launcher; empty when it was a shell."""
    with suppress(psutil.Error):
        parent = process.parent()
        if parent is None or not _is_launcher(parent.cmdline()):
            return []
        command = parent.parent()
        if command is not None and _is_launcher(command.cmdline()):
            return [parent, command]
        return [parent]
    return []


def process_lives(process: psutil.Process) -> bool:
    """False when the process ended, is a zombie, or its pid belongs to a younger process."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_launcher(command_line: Sequence[str]) -> bool:
    """True for `deepspeed …`, `torchrun …` and `python -m deepspeed.launcher.launch …`, module or path."""
    for argument in command_line[:6]:
        path = PurePath(argument)
        module = ".".join(path.with_suffix("").parts[-3:]) if path.suffix == ".py" else argument
        if path.name in _COMMANDS or module in (*_LAUNCHERS, _RUNNER):
            return True
    return False


def _replace_death_signal(number: int) -> int | None:
    """Ask the kernel for `number` when the parent dies; returns the former request, None where there is no prctl."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    former = ctypes.c_int(0)
    if libc.prctl(_PR_GET_PDEATHSIG, ctypes.byref(former), 0, 0, 0) != 0:
        logger.debug("no parent-death signal: prctl failed with errno %d", ctypes.get_errno())
        return None
    libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    return former.value
