"""Programs that nobody has read: run one, or many at once, and be told how each ended."""

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Literal, TypeVar

from largekd.config.sandbox import SandboxConfig
from largekd.errors import DataError, GenerationError
from largekd.sandbox.availability import check_isolation
from largekd.sandbox.process import Ended, Request, StartError, run_process

Status = Literal["ok", "error", "killed", "timeout", "memory_limit", "output_limit"]
_STATUS_OF_STOP: Mapping[str, Status] = {
    "wall": "timeout",
    "cpu": "timeout",
    "memory": "memory_limit",
    "output": "output_limit",
}
_PROGRAM = "program.py"


@dataclass(frozen=True)
class Program:
    """A Python script with its standard input, and files that lie in its working folder."""

    code: str
    stdin: str = ""
    files: Mapping[str, str] | None = None


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended.

    ok: exit status 0. error: another exit status, such as after an exception (`exit_code`). killed: by a signal
    (`exit_code` is its negative number), or by the kernel for lack of memory (None). timeout: wall clock or CPU time.
    memory_limit, output_limit: more than allowed. `stdout` and `stderr` hold what was written up to the limit.
    """

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str
    wall_s: float
    cpu_s: float


def run_program(
    code: str, *, config: SandboxConfig, stdin: str = "", files: Mapping[str, str] | None = None
) -> ProgramResult:
    """Run a Python script in a sandbox of its own; no process of it is left on return.

    `files` are texts by their path relative to the working folder. ConfigError: this machine does not allow the
    configured isolation. DataError: a file's name that leads elsewhere. GenerationError: no sandbox could be started.
    """
    check_isolation(config)
    return _run(Program(code=code, stdin=stdin, files=files), config=config)


def run_programs(programs: Iterable[Program], *, config: SandboxConfig, at_once: int) -> Iterator[ProgramResult]:
    """The result of every program, in order, `at_once` of them running; reads no further ahead than that."""
    check_isolation(config)
    return in_order(programs, run=lambda program: _run(program, config=config), at_once=at_once)


Given = TypeVar("Given")
Found = TypeVar("Found")


def in_order(given: Iterable[Given], *, run: Callable[[Given], Found], at_once: int) -> Iterator[Found]:
    """run(one) for each, in threads, in order. Threads suffice: the work is done by the programs' own processes."""
    source = iter(given)
    with ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="sandbox") as pool:
        waiting: list[Future[Found]] = [pool.submit(run, one) for one in islice(source, 2 * at_once)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(run, one) for one in islice(source, 1)]


def _run(program: Program, *, config: SandboxConfig) -> ProgramResult:
    request = Request(
        program=encoded(program.code),
        mode="script",
        stdin=encoded(program.stdin),
        files=checked_files(program.files),
    )
    return result_of(started(request, config=config))


def started(request: Request, *, config: SandboxConfig) -> Ended:
    """Run a request; GenerationError where no sandbox could be started although they are available here."""
    try:
        return run_process(request, config=config)
    except StartError as error:
        raise GenerationError(f"sandbox: {error}. Is the machine out of processes or memory?") from error


def result_of(ended: Ended) -> ProgramResult:
    """What process 1 said, and why the sandbox was ended, as one verdict."""
    status, exit_code, cpu_s = _verdict(ended)
    if ended.stopped:
        status = _STATUS_OF_STOP[ended.stopped]
    return ProgramResult(
        status=status,
        exit_code=exit_code,
        stdout=ended.stdout.decode(errors="replace"),
        stderr=ended.stderr.decode(errors="replace"),
        wall_s=ended.wall_s,
        cpu_s=max(cpu_s, ended.cpu_s),
    )


def _verdict(ended: Ended) -> tuple[Status, int | None, float]:
    words = ended.report.split()
    if len(words) < 3 or words[0] not in ("exit", "signal"):
        return "killed", None, 0.0
    number, cpu_s = int(words[1]), float(words[2])
    if words[0] == "exit":
        return ("ok" if number == 0 else "error"), number, cpu_s
    # The CPU limit sends the one; the other follows when that was ignored.
    return ("timeout" if number == signal.SIGXCPU else "killed"), -number, cpu_s


def encoded(text: str) -> bytes:
    """UTF-8; lone surrogates, which models do write, as question marks."""
    return text.encode(errors="replace")


def checked_files(files: Mapping[str, str] | None) -> dict[str, bytes]:
    """Contents by name. DataError: a name that is not a plain relative path, or the program's own."""
    found: dict[str, bytes] = {}
    for name, text in (files or {}).items():
        parts: Sequence[str] = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name or name == _PROGRAM:
            raise DataError(f"files: {name!r} must be a path below the working folder, and not {_PROGRAM}")
        found[encoded(name).decode()] = encoded(text)
    return found
