"""One sandbox from its start to the end of its last process, watched from outside."""

import io
import json
import math
import os
import platform
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from largekd.config.sandbox import SandboxConfig
from largekd.sandbox.isolation import NOBODY, Channels, bubblewrap_command, interpreter, package_folders, unprivileged
from largekd.sandbox.seccomp import seccomp_program

_LOOK_EVERY_S = 0.1
_START_S = 30.0
_MOST_REPORT = 1 << 20
_DESCRIPTORS = 64
_TASKS_OF_PROCESS_1 = 2
_STACK_BYTES = 8 << 20
_PAGE = 4096
# A file in memory without content: inode and name.
_INODE_BYTES = 1200
# The name of a process, which it chooses itself, has no line break in this file.
_OWN_MEMORY = re.compile(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB$", re.MULTILINE)

Stop = Literal["wall", "cpu", "memory", "output"]


class StartError(Exception):
    """Nothing was started; in bubblewrap's own words where it has said why."""


@dataclass(frozen=True)
class Request:
    """What is to be run: a script, or (`tests`) a module with a judge that asks it."""

    program: bytes
    mode: Literal["script", "tests"]
    stdin: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    more: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Ended:
    """`report`: what process 1 said of the program; empty if it was killed before. `stopped`: why we killed it."""

    report: str
    stdout: bytes
    stderr: bytes
    stopped: Stop | None
    wall_s: float
    cpu_s: float


class Usage(NamedTuple):
    """CPU seconds so far, and bytes of memory that are not files', of several processes."""

    cpu_s: float
    memory_bytes: int


@cache
def _inside() -> str:
    return Path(__file__).with_name("inside.py").read_text(encoding="utf-8")


def run_process(request: Request, *, config: SandboxConfig) -> Ended:
    """Run one request. On return no process of it is left: with namespaces the kernel has said so."""
    with ExitStack() as held:
        fields = held.enter_context(_readable(_encoded(request, config=config)))
        stdin = held.enter_context(_readable(request.stdin))
        report = _pipe(held)
        python = interpreter(config.python).file
        started = _Started(config=config, held=held)
        lifeline = _pipe(held)
        passed = (fields, report.write.fileno(), lifeline.read.fileno())
        command = [python, "-I", "-S", "-c", _inside(), *map(str, passed)]
        process = started.start(command, stdin=stdin, passed=passed, room_bytes=_room(request, config=config))
        report.write.close()
        # Whatever is raised here, such as KeyboardInterrupt: nothing may be left behind.
        held.callback(started.kill)
        return _watched(process, started=started, report=report.read.fileno(), config=config)


class _Started:
    """The processes of one sandbox, as far as they can be waited for and killed."""

    def __init__(self, *, config: SandboxConfig, held: ExitStack) -> None:
        self.config = config
        self.held = held
        self.pid = 0
        self.pidfd = -1
        self.waited_for = False
        self.room_bytes = 0

    def start(
        self, command: list[str], *, stdin: int, passed: tuple[int, ...], room_bytes: int
    ) -> "subprocess.Popen[bytes]":
        """Start `command` in a sandbox; process 1 begins only when it can be killed by descriptor."""
        if self.config.isolation == "limits_only":
            folder = self.held.enter_context(tempfile.TemporaryDirectory(prefix="largekd-", ignore_cleanup_errors=True))
            if os.geteuid() == 0:
                os.chown(folder, NOBODY, NOBODY)
            process = self._open(command, stdin=stdin, passed=passed, folder=folder)
            self.pid = process.pid
            self._hold(os.pidfd_open(process.pid))
            return process
        self.room_bytes = room_bytes
        info, go = _pipe(self.held), _pipe(self.held)
        seccomp = self.held.enter_context(_readable(seccomp_program(platform.machine())))
        channels = Channels(seccomp=seccomp, info=info.write.fileno(), go=go.read.fileno())
        outer = bubblewrap_command(self.config, channels=channels, room_bytes=room_bytes)
        passed = (*passed, channels.info, channels.go, seccomp)
        process = self._open([*outer, *command], stdin=stdin, passed=passed, folder="/")
        info.write.close()
        self.pid = _first_pid(info.read.fileno(), process=process)
        self._hold(os.pidfd_open(self.pid))
        go.write.write(b"1")
        return process

    def _open(
        self, command: list[str], *, stdin: int, passed: tuple[int, ...], folder: str
    ) -> "subprocess.Popen[bytes]":
        try:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                pass_fds=passed,
                start_new_session=True,
                **unprivileged(),  # type: ignore[call-overload]
            )
        except OSError as error:
            raise StartError(str(error)) from error
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            self.held.enter_context(closing(stream))
            os.set_blocking(stream.fileno(), False)
        self.held.callback(process.wait)
        # Bubblewrap's end is the end of all that it started. Does nothing to a process that was waited for.
        self.held.callback(process.kill)
        return process

    def _hold(self, pidfd: int) -> None:
        self.pidfd = pidfd
        self.held.callback(os.close, pidfd)

    def kill(self) -> None:
        """Kill process 1, with which the kernel ends its namespace; without namespaces, the session."""
        if self.waited_for:
            return
        try:
            if self.config.isolation == "limits_only":
                os.killpg(self.pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return

    def usage(self) -> Usage:
        """What all processes of the sandbox have used up to now."""
        cpu_s, memory_bytes = 0.0, self._bytes_of_files()
        try:
            first = psutil.Process(self.pid)
            processes = (first, *first.children(recursive=True))
        except psutil.Error:
            # The first is gone, and all others with it.
            return Usage(cpu_s=0.0, memory_bytes=0)
        for one in processes:
            # A process that ended meanwhile, or was not looked at, is in the figures of the next look.
            with suppress(psutil.Error):
                times = one.cpu_times()
                cpu_s += times.user + times.system + times.children_user + times.children_system
        own_bytes = sum(_own_bytes(one.pid) for one in processes)
        if memory_bytes + own_bytes > self.config.memory_bytes and len(processes) > 1:
            # Pages that forked processes still share were counted for each.
            own_bytes = sum(_proportional_bytes(one) for one in processes)
        return Usage(cpu_s=cpu_s, memory_bytes=memory_bytes + own_bytes)

    def _bytes_of_files(self) -> int:
        """Kernel memory of the scratch folder's files themselves, which its quota does not count."""
        try:
            found = os.statvfs(Path("/proc", str(self.pid), "root", "tmp"))
        except OSError:
            return 0
        # Until bubblewrap has made the folder, this is the host's own.
        is_scratch = self.room_bytes and found.f_blocks == -(-self.room_bytes // found.f_frsize)
        return (found.f_files - found.f_ffree) * _INODE_BYTES if is_scratch else 0


def _own_bytes(pid: int) -> int:
    """Memory of a process that is no file's, also what the kernel has moved to disk; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return 1024 * sum(map(int, _OWN_MEMORY.findall(status)))


def _proportional_bytes(process: psutil.Process) -> int:
    """Proportional set size and swap; 0 for a process that has ended."""
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(memory.pss + memory.swap)


def _watched(process: "subprocess.Popen[bytes]", *, started: _Started, report: int, config: SandboxConfig) -> Ended:
    """Read what is written until process 1 is gone; kill it for time, memory or output."""
    assert process.stdout is not None and process.stderr is not None
    kept: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    os.set_blocking(report, False)
    began = time.monotonic()
    look_at = began + _LOOK_EVERY_S
    stopped: Stop | None = None
    used = Usage(cpu_s=0.0, memory_bytes=0)
    with selectors.DefaultSelector() as selector:
        for descriptor in (*kept, started.pidfd):
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            left = began + config.wall_s - time.monotonic()
            patience = _LOOK_EVERY_S if stopped else max(0.0, min(left, _LOOK_EVERY_S))
            ready = [key.fd for key, _ in selector.select(patience)]
            for descriptor in ready:
                if descriptor in kept and not _take(descriptor, into=kept[descriptor], most=config.output_bytes):
                    selector.unregister(descriptor)
            if started.pidfd in ready:
                break
            if stopped is None and time.monotonic() >= look_at:
                # Looking at all processes of the machine takes milliseconds: never for a program that ends at once.
                used = started.usage()
                look_at = time.monotonic() + _LOOK_EVERY_S
            if stopped is None and (stopped := _excess(kept, left=left, used=used, config=config)):
                started.kill()
    wall_s = time.monotonic() - began
    if config.isolation == "limits_only":
        started.kill()
    process.wait()
    started.waited_for = True
    for descriptor, written in kept.items():
        _take(descriptor, into=written, most=config.output_bytes)
    if stopped is None and any(len(written) > config.output_bytes for written in kept.values()):
        stopped = "output"
    said = bytearray()
    _take(report, into=said, most=_MOST_REPORT)
    out, err = (bytes(written[: config.output_bytes]) for written in kept.values())
    words = said.decode(errors="replace")
    return Ended(report=words, stdout=out, stderr=err, stopped=stopped, wall_s=wall_s, cpu_s=used.cpu_s)


def _excess(kept: Mapping[int, bytearray], *, left: float, used: Usage, config: SandboxConfig) -> Stop | None:
    if any(len(written) > config.output_bytes for written in kept.values()):
        return "output"
    if used.memory_bytes > config.memory_bytes:
        return "memory"
    if used.cpu_s > config.cpu_s:
        return "cpu"
    return "wall" if left <= 0 else None


def _take(descriptor: int, *, into: bytearray, most: int) -> bool:
    """Read what is there, to one byte more than `most`; false at the end of the stream."""
    while len(into) <= most:
        try:
            part = os.read(descriptor, min(65_536, most + 1 - len(into)))
        except BlockingIOError:
            return True
        if not part:
            return False
        into += part
    return True


def _first_pid(info: int, *, process: "subprocess.Popen[bytes]") -> int:
    """The number of process 1 as seen from here."""
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(info, selectors.EVENT_READ)
        deadline = time.monotonic() + _START_S
        while selector.select(max(0.0, deadline - time.monotonic())):
            part = os.read(info, 4096)
            said += part
            if not part or b"}" in part:
                break
    try:
        return int(json.loads(said)["child-pid"])
    except (ValueError, KeyError) as error:
        process.kill()
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), True)
        words = process.stderr.read(4096).decode(errors="replace").strip()
        raise StartError(words or f"bubblewrap said nothing within {_START_S:g} s") from error


def _encoded(request: Request, *, config: SandboxConfig) -> bytes:
    """The fields that `inside.py` reads."""
    limits = (
        math.ceil(config.cpu_s),
        config.memory_bytes,
        max(_PAGE, config.scratch_bytes),
        config.processes + _TASKS_OF_PROCESS_1,
        _DESCRIPTORS,
        _STACK_BYTES,
    )
    fields = [" ".join(map(str, limits)).encode(), request.mode.encode()]
    fields += ["\0".join(package_folders(config)).encode(), request.program, str(len(request.files)).encode()]
    for name, content in request.files.items():
        fields += [name.encode(), content]
    return b"".join(len(one).to_bytes(8, "little") + one for one in (*fields, *request.more))


def _room(request: Request, *, config: SandboxConfig) -> int:
    """Bytes of the scratch folder: what is put there first, in whole pages, does not count."""
    contents = (request.program, *request.files.values())
    return config.scratch_bytes + sum(-(-len(one) // _PAGE) * _PAGE + 2 * _PAGE for one in contents)


@contextmanager
def _readable(content: bytes) -> Iterator[int]:
    """A descriptor, for reading alone, of a file in memory."""
    writable = os.memfd_create("largekd", os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(writable, view) :]
        descriptor = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class _Pipe(NamedTuple):
    """Both ends as objects: closing one twice must not close a descriptor that another thread got meanwhile."""

    read: io.FileIO
    write: io.FileIO


def _pipe(held: ExitStack) -> _Pipe:
    reading, writing = os.pipe()
    return _Pipe(held.enter_context(io.FileIO(reading, "rb")), held.enter_context(io.FileIO(writing, "wb")))
