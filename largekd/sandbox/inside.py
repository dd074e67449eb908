"""What runs first in a sandbox: process 1 of it. It starts the program as its child, and reports how that ended.

The text of this file is handed to an interpreter that knows neither this package nor any other: standard library
alone, and as little of it as possible, because every program pays for the imports. As process 1 of a process namespace
it cannot be signalled by the program, and its end is the end of all other processes.

Request, a file that is read in order: fields of 8 bytes length and content: limits (six integers), mode, search path,
program, number of files, their names and contents; mode `tests` adds the sources of plain_values and judge, the entry
point and the tests.
The tests are read after the program has become a process of its own, so that no copy of them is in its memory.
Report: one line `exit CODE CPU_SECONDS`, `signal NUMBER CPU_SECONDS`, or `judged CPU_SECONDS` and a line of JSON.
"""

# Not `signal`: its enumerations cost as much as all other imports together.
import _signal as signal
import _thread
import builtins
import os
import resource
import sys
from types import FunctionType, ModuleType

_MOST_DESCRIPTORS = 1024
_LIMITS = (
    resource.RLIMIT_CPU,
    resource.RLIMIT_AS,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_NPROC,
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_STACK,
)


def main() -> None:
    """argv: descriptors of the request, of the report, and of a pipe that ends when the process outside does."""
    request, report, lifeline = (int(one) for one in sys.argv[1:])
    # A process 1 is spared only signals that it has no handler for; Python installs one for SIGINT.
    signal.signal(signal.SIGINT, signal.SIG_DFL if os.getpid() == 1 else signal.SIG_IGN)
    limits = [int(number) for number in read_field(request).split()]
    mode = read_field(request).decode()
    path = read_field(request).decode().split("\0")
    program = read_field(request)
    for _ in range(int(read_field(request))):
        write_file(read_field(request).decode(), content=read_field(request))
    write_file("program.py", content=program)
    # The scratch folder is the program's alone to import from: what it writes there must not run in a judge.
    sys.path[:0] = filter(None, path)
    if mode == "tests":
        os.write(report, judged(request, limits=limits, lifeline=lifeline))
    else:
        os.write(report, watched(limits, lifeline=lifeline))
    os._exit(0)


def read_field(descriptor: int) -> bytes:
    """The next field of the request."""
    return read_exactly(descriptor, count=int.from_bytes(read_exactly(descriptor, count=8), "little"))


def read_exactly(descriptor: int, *, count: int) -> bytes:
    """`count` bytes; fewer at the end of the file."""
    parts: list[bytes] = []
    while count > 0 and (part := os.read(descriptor, min(count, 1 << 20))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def write_file(name: str, *, content: bytes) -> None:
    """A file of the scratch folder, and the folders above it."""
    folder = os.path.dirname(name)
    if folder:
        os.makedirs(folder, exist_ok=True)
    with open(name, "wb") as file:
        file.write(content)


def watched(limits: list[int], *, lifeline: int) -> bytes:
    """Run the program as a script; the report's line."""
    child = os.fork()
    if child == 0:
        close_all_but()
        become_program(limits)
        load("program.py", name="__main__")
        # The interpreter's own end: threads are waited for, streams written out, exit status 0.
        sys.exit()
    _thread.start_new_thread(end_with, (lifeline,))
    status = wait_for(child)
    kind = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    return f"{kind} {cpu_s():.4f}\n".encode()


def judged(request: int, *, limits: list[int], lifeline: int) -> bytes:
    """Run the program as a module in a child, and the tests here, which ask the child; the report's lines."""
    sources = read_field(request), read_field(request)
    to_program, from_judge = os.pipe()
    to_judge, from_program = os.pipe()
    child = os.fork()
    if child == 0:
        close_all_but(to_program, from_program)
        become_program(limits)
        judge = load_judge(sources)
        module = load("program.py", name="program")
        judge.serve(module, ask=to_program, answer=from_program)
        sys.exit()
    _thread.start_new_thread(end_with, (lifeline,))
    os.close(to_program)
    os.close(from_program)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    entry_point, tests = read_field(request).decode(), read_field(request).decode()
    set_limits(limits)
    judge = load_judge(sources)
    verdict = judge.judge(tests, entry_point=entry_point, ask=from_judge, answer=to_judge)
    os.kill(child, signal.SIGKILL)
    wait_for(child)
    return f"judged {cpu_s():.4f}\n{verdict}\n".encode()


def end_with(lifeline: int) -> None:
    """In a thread: end everything when the process that watches us is gone, however early it went."""
    os.read(lifeline, 1)
    if os.getpid() != 1:
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def close_all_but(*kept: int) -> None:
    """Close every descriptor but the standard ones and `kept`."""
    first = 3
    for descriptor in (*sorted(kept), _MOST_DESCRIPTORS):
        os.closerange(first, descriptor)
        first = descriptor + 1


def become_program(limits: list[int]) -> None:
    """In the child: limits that cannot be raised again, no descriptors but the standard ones, usual signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    set_limits(limits)
    sys.argv = ["program.py"]
    sys.path.insert(0, os.getcwd())
    sys.excepthook = without_our_frames
    # Usually given by the module site, which is not loaded; programs use them.
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]


def set_limits(limits: list[int]) -> None:
    """Soft and hard limits alike; only the CPU's hard limit is a second later, so that SIGXCPU tells the reason."""
    for kind, limit in zip(_LIMITS, limits, strict=True):
        resource.setrlimit(kind, (limit, limit + 1 if kind == resource.RLIMIT_CPU else limit))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_MSGQUEUE, resource.RLIMIT_MEMLOCK):
        resource.setrlimit(kind, (0, 0))


def load(file: str, *, name: str) -> ModuleType:
    """A file of the scratch folder, run as the module `name`."""
    path = os.path.join(os.getcwd(), file)
    with open(path, "rb") as opened:
        return load_source(opened.read(), name=name, path=path)


def load_judge(sources: tuple[bytes, bytes]) -> ModuleType:
    """The judge, after the module that it imports by its name in the package."""
    load_source(sources[0], name="largekd.sandbox.plain_values")
    return load_source(sources[1], name="judge")


def load_source(source: bytes, *, name: str, path: str = "<judge>") -> ModuleType:
    """Source text, run as the module `name`."""
    module = ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    FunctionType(compile(source, path, "exec", dont_inherit=True), module.__dict__)()
    return module


def without_our_frames(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Print a traceback that begins in the program."""
    while trace is not None and trace.tb_frame.f_code.co_filename in ("<string>", "<judge>"):  # type: ignore[attr-defined]
        trace = trace.tb_next  # type: ignore[attr-defined]
    sys.__excepthook__(kind, error.with_traceback(trace), trace)  # type: ignore[arg-type]


def wait_for(child: int) -> int:
    """Wait status of `child`; whatever else ends meanwhile is reaped."""
    while True:
        ended, status = os.wait()
        if ended == child:
            return status


def cpu_s() -> float:
    """CPU seconds of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
