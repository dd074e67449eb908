"""A process that has everything imported and forks the ranks of whole jobs: a start then costs a second, not ten.

Reads one JSON object per line: {"script": name, "argv": [...], "environment": {...}, "output": path} ->
{"pid": number}, and
{"wait": pid, "timeout_s": number} -> {"status": exit status, negative for a signal, null while it runs}.
A rank is `launch/<script>.py` with that command line; its stdout and stderr go to the file.
TEST_FILE_LIMIT_BYTES in its environment is the largest file it can write. Ranks die with the server.
"""

import ctypes
import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
LIMIT = "TEST_FILE_LIMIT_BYTES"
_PR_SET_PDEATHSIG = 1
_PRELOADED = (
    "deepspeed",
    "largekd.distillation.run",
    "largekd.distillation.serve",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
)
_statuses: dict[int, int] = {}


def preload() -> None:
    """What a run imports; nothing here may start a thread, which a fork would lose."""
    sys.path.insert(0, str(LAUNCH))
    for module in _PRELOADED:
        importlib.import_module(module)


def start(*, script: str, argv: list[str], environment: dict[str, str], output: str) -> int:
    """Fork one rank; its pid."""
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    os.environ.update(environment)
    if limit := environment.get(LIMIT):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    target = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    sys.argv = [str(LAUNCH / f"{script}.py"), *argv]
    import cli

    main = importlib.import_module(script).main

    # As at the end of a script: threads are waited for and exit handlers run.
    sys.exit(cli.exit_status(lambda: main(argv)))


def wait(*, pid: int, timeout_s: float) -> int | None:
    """The exit status as subprocess gives it; None when the rank still runs after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while pid not in _statuses:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            _statuses[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline_s:
            return None
        else:
            time.sleep(0.01)
    return _statuses[pid]


def serve() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    # A library that prints must not disturb the answers.
    os.dup2(2, 1)
    preload()
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in iter(sys.stdin.readline, ""):
        request: dict[str, Any] = json.loads(line)
        if "wait" in request:
            answer = {"status": wait(pid=request["wait"], timeout_s=request["timeout_s"])}
        else:
            answer = {"pid": start(**request)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
