"""Every attack is contained, has the expected verdict, and leaves nothing on the host."""

import os
import selectors
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import pytest

from largekd.config.sandbox import SandboxConfig
from largekd.sandbox.programs import Program, ProgramResult, run_program, run_programs

pytestmark = pytest.mark.usefixtures("unharmed")
ROOT = Path(__file__).resolve().parents[2]


def attack(code: str, *, config: SandboxConfig, **changes: object) -> ProgramResult:
    return run_program(textwrap.dedent(code), config=config.model_copy(update=changes))


def refused(code: str, *, config: SandboxConfig) -> str:
    """Run statements that must raise OSError; the name of its number."""
    body = textwrap.indent(textwrap.dedent(code).strip(), "    ")
    result = attack(
        f"import errno, os\ntry:\n{body}\nexcept OSError as error:\n    print(errno.errorcode[error.errno])\n",
        config=config,
    )
    assert (result.status, result.stderr) == ("ok", "")
    return result.stdout.strip()


# ---- too much of something -----------------------------------------------------------------------------------------


def test_fork_bomb(config: SandboxConfig) -> None:
    # Bounded, so that a failing limit harms nobody.
    result = attack(
        """
        import os, time
        children = 0
        for _ in range(60):
            try:
                if os.fork() == 0:
                    time.sleep(1000)
            except BlockingIOError:
                break
            children += 1
        print(children)
        """,
        config=config,
        processes=8,
    )
    assert (result.status, result.stdout) == ("ok", "7\n")


def test_fork_bomb_of_generations(config: SandboxConfig) -> None:
    result = attack(
        """
        import os, time
        generation = 0
        try:
            while generation < 5:
                os.fork()
                generation += 1
        except BlockingIOError:
            pass
        time.sleep(1000)
        """,
        config=config,
        processes=8,
        wall_s=2.0,
    )
    assert result.status == "timeout"


def test_thread_bomb(config: SandboxConfig) -> None:
    result = attack(
        """
        import threading, time
        started = 0
        try:
            for _ in range(60):
                threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
                started += 1
        except RuntimeError:
            print(started)
        """,
        config=config,
        processes=8,
    )
    assert (result.status, result.stdout) == ("ok", "7\n")


def test_memory_bomb(config: SandboxConfig) -> None:
    result = attack("x = []\nwhile True: x.append(bytearray(10**7))", config=config, memory_bytes=200_000_000)
    assert result.status == "error"
    assert "MemoryError" in result.stderr


def test_memory_bomb_of_several_processes(config: SandboxConfig) -> None:
    result = attack(
        """
        import os, time
        for _ in range(3):
            if os.fork() == 0:
                break
        held = bytearray(os.urandom(1) * 80_000_000)
        time.sleep(1000)
        """,
        config=config,
        memory_bytes=200_000_000,
    )
    assert result.status == "memory_limit"


def test_forked_processes_that_share_their_memory_are_not_a_bomb(config: SandboxConfig) -> None:
    result = attack(
        """
        import os, time
        held = bytearray(os.urandom(1) * 80_000_000)
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                time.sleep(0.5)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        """,
        config=config,
        memory_bytes=200_000_000,
    )
    assert result.status == "ok"


def test_shared_memory_that_belongs_to_no_process(config: SandboxConfig) -> None:
    # Pages of such a mapping outlive MADV_DONTNEED without being in anybody's memory.
    assert refused("import mmap\nmmap.mmap(-1, 4096)", config=config) == "EPERM"
    assert refused("import mmap\nmmap.mmap(os.open('/dev/zero', os.O_RDWR), 4096)", config=config) == "ENOENT"
    private = "import mmap\nprint(len(mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)))"
    assert attack(private, config=config).stdout == "4096\n"


def test_files_without_content_are_memory(config: SandboxConfig) -> None:
    code = """
    import os, time
    for number in range(30_000):
        os.close(os.open(str(number), os.O_CREAT))
    time.sleep(1000)
    """
    assert attack(code, config=config, memory_bytes=30_000_000).status == "memory_limit"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(config: SandboxConfig, stream: str) -> None:
    result = attack(f"import sys\nwhile True: print('x' * 1000, file=sys.{stream})", config=config, output_bytes=5000)
    assert result.status == "output_limit"
    assert {"stdout": len(result.stdout), "stderr": len(result.stderr)}[stream] == 5000


def test_output_faster_than_it_is_read(config: SandboxConfig) -> None:
    result = attack("import os\nos.write(1, b'x' * 60_000)", config=config, output_bytes=50_000)
    assert (result.status, len(result.stdout)) == ("output_limit", 50_000)


def test_endless_loop(config: SandboxConfig) -> None:
    assert attack("while True: pass", config=config, cpu_s=0.3).status == "timeout"


def test_endless_loop_of_several_processes(config: SandboxConfig) -> None:
    code = "import os\nfor _ in range(3): os.fork()\nwhile True: pass"
    assert attack(code, config=config, cpu_s=0.5).status == "timeout"


def test_endless_sleep(config: SandboxConfig) -> None:
    assert attack("import time; time.sleep(1000)", config=config, wall_s=1.0).status == "timeout"


def test_filling_the_scratch_folder(config: SandboxConfig) -> None:
    code = """
    for number in range(100):
        with open(str(number), 'wb') as file:
            file.write(bytes(10**6))
    """
    assert refused(code, config=config.model_copy(update={"scratch_bytes": 3_000_000})) == "ENOSPC"


def test_one_large_file(config: SandboxConfig) -> None:
    assert refused("os.truncate(os.open('x', os.O_CREAT | os.O_RDWR), 10**12)", config=config) == "EFBIG"


def test_shared_memory_counts_as_scratch(config: SandboxConfig) -> None:
    code = "os.posix_fallocate(os.open('/dev/shm/x', os.O_CREAT | os.O_RDWR), 0, 3_500_000)\nprint('filled')"
    assert refused(code, config=config.model_copy(update={"scratch_bytes": 3_000_000})) in ("ENOSPC", "EFBIG")


def test_memory_that_no_limit_counts(config: SandboxConfig) -> None:
    assert refused("os.memfd_create('x')", config=config) == "ENOSYS"
    assert syscall("shmget", 29, "0, 1 << 30, 0o1777", config=config) == "ENOSYS"


def test_too_many_open_files(config: SandboxConfig) -> None:
    assert refused("held = [os.open('/dev/null', os.O_RDONLY) for _ in range(100)]", config=config) == "EMFILE"


def test_deep_recursion(config: SandboxConfig) -> None:
    result = attack("def f(): f()\nf()", config=config)
    assert (result.status, "RecursionError" in result.stderr) == ("error", True)
    code = "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)"
    assert attack(code, config=config).status in ("killed", "error", "timeout")


def test_huge_integers(config: SandboxConfig) -> None:
    assert attack("print(9 ** 9 ** 9)", config=config, cpu_s=0.5).status in ("timeout", "error")
    result = attack("print(10 ** 10_000)", config=config)
    assert (result.status, "4300 digits" in result.stderr) == ("error", True)


# ---- network -------------------------------------------------------------------------------------------------------


def test_network(config: SandboxConfig) -> None:
    for family in ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"):
        code = f"import socket\nsocket.socket(socket.{family}, socket.SOCK_RAW)"
        assert refused(code, config=config) == "EAFNOSUPPORT", family
    result = attack("import urllib.request\nurllib.request.urlopen('http://example.org')", config=config)
    assert result.status == "error"


def test_loopback_of_the_host(config: SandboxConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert refused(code, config=config) == "EAFNOSUPPORT"
        with pytest.raises(TimeoutError):
            server.accept()


def test_unix_sockets_of_the_host(config: SandboxConfig, tmp_path: Path) -> None:
    name = f"largekd-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as path:
        abstract.bind(f"\0{name}")
        path.bind(str(tmp_path / name))
        for server in (abstract, path):
            server.listen()
        for address, reason in ((f"\\0{name}", "ECONNREFUSED"), (str(tmp_path / name), "ENOENT")):
            code = f"import socket\nsocket.socket(socket.AF_UNIX).connect('{address}')"
            assert refused(code, config=config) == reason


# ---- reading and writing -------------------------------------------------------------------------------------------


def test_reading_files_of_the_host(config: SandboxConfig, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("42")
    tmp_path.chmod(0o755)
    for path in ("/etc/shadow", "/etc/passwd", "/root", "/home", "/proc/1/environ", "/sys", "/var", str(ROOT), secret):
        assert refused(f"os.stat({str(path)!r})\nprint('seen')", config=config) == "ENOENT", path


def test_the_tree_is_libraries_and_a_scratch_folder(config: SandboxConfig) -> None:
    result = attack(
        "import os\nprint(*sorted(os.listdir('/')), *sorted(os.listdir('/dev')), os.getcwd())", config=config
    )
    seen = set(result.stdout.split())
    assert seen <= {
        "dev",
        "etc",
        "lib",
        "lib32",
        "lib64",
        "tmp",
        "usr",
        "null",
        "random",
        "urandom",
        "shm",
        "/tmp",
    }
    assert attack("import os\nprint(os.listdir('/etc'))", config=config).stdout in ("['ld.so.cache']\n", "")


def test_the_environment_holds_no_secret(config: SandboxConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LARGEKD_SECRET", "sk-secret")
    result = attack("import os\nprint(sorted(os.environ), os.getuid() == 0)", config=config)
    assert result.stdout == "['HOME', 'LANG', 'PWD'] False\n"


def test_writing_outside_of_the_scratch_folder(config: SandboxConfig) -> None:
    name = f"largekd-{uuid.uuid4().hex}"
    for folder in ("/", "/usr/lib", "/dev", "/etc", "/lib"):
        assert refused(f"open('{folder}/{name}', 'w')\nprint('written')", config=config) in (
            "EROFS",
            "EACCES",
            "ENOENT",
        )
    assert attack(f"open('/tmp/{name}', 'w').write('x')", config=config).status == "ok"
    left = [folder for folder in ("/", "/usr/lib", "/dev", "/etc", "/tmp", "/dev/shm") if Path(folder, name).exists()]
    assert left == []


def test_symlinks_lead_nowhere(config: SandboxConfig, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("42")
    for target in (str(tmp_path / "secret"), "../../../../etc/shadow", "/proc/1/cwd/etc/shadow"):
        assert refused(f"os.symlink({target!r}, 'x')\nopen('x').read()", config=config) == "ENOENT"
    assert refused("os.symlink('/usr/lib', 'x')\nopen('x/largekd-probe', 'w')", config=config) == "EROFS"


def test_nothing_is_left_for_the_next_program(config: SandboxConfig) -> None:
    assert attack("open('left', 'w').write('x')", config=config).status == "ok"
    assert attack("import os\nprint(os.listdir('.'))", config=config).stdout == "['program.py']\n"


# ---- other processes and the kernel --------------------------------------------------------------------------------


def syscall(name: str, number: int, arguments: str, *, config: SandboxConfig) -> str:
    """Make a call by its x86_64 number; the name of the error's number, or 'done'."""
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86_64")
    code = f"""
    import ctypes, errno
    libc = ctypes.CDLL(None, use_errno=True)
    print('done' if libc.syscall({number}, {arguments}) >= 0 else errno.errorcode[ctypes.get_errno()])
    """
    result = attack(code, config=config)
    assert result.status == "ok", name
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("name", "number", "arguments"),
    [
        ("ptrace attach", 101, "16, 1, 0, 0"),
        ("process_vm_readv", 310, "1, 0, 0, 0, 0, 0"),
        ("process_vm_writev", 311, "1, 0, 0, 0, 0, 0"),
        ("unshare user", 272, "0x10000000"),
        ("setns", 308, "0, 0"),
        ("mount", 165, "0, 0, 0, 0, 0"),
        ("pivot_root", 155, "0, 0"),
        ("chroot", 161, "b'/'"),
        ("clone3", 435, "0, 0"),
        ("keyctl", 250, "0, 0, 0, 0, 0"),
        ("bpf", 321, "0, 0, 0"),
        ("perf_event_open", 298, "0, 0, 0, 0, 0"),
        ("io_uring_setup", 425, "1, 0"),
        ("userfaultfd", 323, "0"),
        ("pidfd_open", 434, "1, 0"),
        ("open_by_handle_at", 304, "0, 0, 0"),
        ("reboot", 169, "0, 0, 0, 0"),
        ("setuid", 105, "0"),
    ],
)
def test_calls_that_programs_have_no_use_for(config: SandboxConfig, name: str, number: int, arguments: str) -> None:
    assert syscall(name, number, arguments, config=config) == "ENOSYS"


def test_limits_of_process_1_cannot_be_changed(config: SandboxConfig) -> None:
    # RLIMIT_NOFILE of process 1, which has the same user; one's own can be lowered.
    assert syscall("prlimit64 of process 1", 302, "1, 7, (ctypes.c_ulonglong * 2)(9, 9), 0", config=config) == "EPERM"
    code = "import resource as r\nr.setrlimit(r.RLIMIT_NOFILE, (9, 9))\nprint(r.getrlimit(r.RLIMIT_NOFILE))"
    assert attack(code, config=config).stdout == "(9, 9)\n"


def test_a_new_user_namespace_by_clone(config: SandboxConfig) -> None:
    # CLONE_NEWUSER | SIGCHLD; a plain fork by the same call succeeds.
    assert syscall("clone", 56, "0x10000011, 0, 0, 0, 0", config=config) == "EPERM"
    assert "done" in syscall("clone", 56, "0x11, 0, 0, 0, 0", config=config)


def test_signals_reach_nobody_else(config: SandboxConfig) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert refused(f"os.kill({bystander.pid}, 9)", config=config) == "ESRCH"
        assert refused(f"os.kill({os.getpid()}, 9)", config=config) == "ESRCH"
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n")


def test_process_1_of_the_sandbox_outlives_signals(config: SandboxConfig) -> None:
    result = attack(
        "import os\nfor number in (1, 2, 9, 11, 15, 19): os.kill(1, number)\nprint('still here')", config=config
    )
    assert (result.status, result.stdout) == ("ok", "still here\n")


def test_killing_everything_kills_oneself_at_most(config: SandboxConfig) -> None:
    assert refused("os.kill(-1, 9)", config=config) == "ESRCH"
    result = attack("import os\nos.kill(os.getpid(), 9)", config=config)
    assert (result.status, result.exit_code) == ("killed", -9)


def test_ignoring_all_signals(config: SandboxConfig) -> None:
    code = """
    import signal, time
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1000)
    """
    assert attack(code, config=config, wall_s=1.0).status == "timeout"
    ignoring = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert attack(ignoring, config=config, cpu_s=0.3).status == "timeout"


def test_stopping_oneself(config: SandboxConfig) -> None:
    assert (
        attack("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", config=config, wall_s=1.0).status == "timeout"
    )


def test_a_daemon_does_not_outlive_its_program(config: SandboxConfig, unharmed: list[int]) -> None:
    code = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 64)
            time.sleep(1000)
        os._exit(0)
    os.wait()
    print('done')
    """
    result = attack(code, config=config)
    assert (result.status, result.stdout) == ("ok", "done\n")
    assert len(unharmed) == 1


def test_crash_of_the_interpreter(config: SandboxConfig) -> None:
    result = attack("import ctypes\nctypes.string_at(0)", config=config)
    assert (result.status, result.exit_code) == ("killed", -11)


def test_attacks_at_the_same_time_do_not_meet(config: SandboxConfig) -> None:
    before = threading.active_count()
    bomb = "import os, time\ntry:\n    for _ in range(4): os.fork()\nexcept BlockingIOError: pass\ntime.sleep(1000)"
    forking = "import os\npid = os.fork()\nprint(pid >= 0, flush=True)\nif pid: os.wait()"
    codes = [bomb, "print(1)", bomb, forking, "print(3)"]
    changed = config.model_copy(update={"wall_s": 3.0, "processes": 6})
    found = list(run_programs([Program(code=code) for code in codes], config=changed, at_once=3))
    assert [one.status for one in found] == ["timeout", "ok", "timeout", "ok", "ok"]
    assert (found[1].stdout, found[3].stdout, found[4].stdout) == ("1\n", "True\nTrue\n", "3\n")
    assert threading.active_count() == before


@pytest.mark.parametrize("after_s", [0.0, 1.0])
def test_the_end_of_this_process_is_the_end_of_the_sandbox(after_s: float, unharmed: list[int]) -> None:
    """Also when it comes before the program begins."""
    code = """
import os, sys
from largekd.config.sandbox import SandboxConfig
from largekd.sandbox import process
from largekd.sandbox.programs import run_program
first_pid = process._first_pid
def noted(info, **named):
    pid = first_pid(info, **named)
    print(pid, os.stat(f"/proc/{pid}/ns/pid").st_ino, flush=True)
    return pid
run_program("1", config=SandboxConfig())
process._first_pid = noted
run_program("import time; time.sleep(1000)", config=SandboxConfig(wall_s=600.0))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as host:
        assert host.stdout is not None
        pid, namespace = map(int, host.stdout.readline().split())
        ended = os.pidfd_open(pid)
        time.sleep(after_s)
        host.kill()
    try:
        # Readable when process 1 is gone, and with it all others.
        with selectors.DefaultSelector() as selector:
            selector.register(ended, selectors.EVENT_READ)
            assert selector.select(timeout=60)
    finally:
        os.close(ended)
    unharmed.append(namespace)
