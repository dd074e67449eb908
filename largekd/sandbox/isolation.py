"""What a sandbox is made of: the interpreter, the user, and the command of bubblewrap."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from largekd.config.sandbox import SandboxConfig
from largekd.errors import ConfigError

NOBODY = 65534
_HOMES = (Path("/root"), Path("/home"))
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
# Not /dev/zero: mapped as shared it is memory that is in no process's.
_DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")


@dataclass(frozen=True)
class Interpreter:
    """A Python: its real file, and the folder whose `lib` holds its standard library."""

    file: str
    prefix: str


@dataclass(frozen=True)
class Channels:
    """Descriptors that bubblewrap reads or writes: filter, process number, and the byte that lets it go on."""

    seccomp: int
    info: int
    go: int


def unprivileged() -> dict[str, int | list[int]]:
    """Arguments of Popen that give up root: limits on processes do not hold for it, files of others would be open."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


@cache
def interpreter(python: str) -> Interpreter:
    """The interpreter that `sandbox.python` names. ConfigError: it does not run, or lies in a home folder."""
    found = shutil.which(python)
    if found is None:
        raise ConfigError(f"sandbox.python: {python!r} is no program: name an interpreter, such as /usr/bin/python3")
    command = [
        found,
        "-I",
        "-S",
        "-c",
        "import sys, os; print(os.path.realpath(sys.executable), sys.base_prefix, sep='\\n')",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"sandbox.python: {python!r} does not answer as a Python interpreter: {error}") from error
    file, prefix = answer[0], answer[1]
    for home in (*_HOMES, Path.home()):
        # A service's home may be the root folder, in which everything lies.
        if home != Path("/") and (Path(file).is_relative_to(home) or Path(prefix).is_relative_to(home)):
            raise ConfigError(
                f"sandbox.python: {python!r} is {file}, in the home folder {home}: name one outside of it"
            )
    return Interpreter(file=file, prefix=prefix)


def package_folders(config: SandboxConfig) -> list[str]:
    """The search path's further folders, as the program sees them."""
    if config.isolation == "limits_only":
        return list(config.packages)
    return [f"/packages/{number}" for number in range(len(config.packages))]


def bubblewrap_command(config: SandboxConfig, *, channels: Channels, room_bytes: int) -> list[str]:
    """The command up to the one that runs inside.

    A user, process, network, IPC, host-name and cgroup namespace of its own, no further user namespace, no capability,
    a read-only tree of libraries, three devices and one interpreter, no /proc, and /tmp of `room_bytes`.
    """
    python = interpreter(config.python)
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-user",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
    ]
    command += ["--unshare-cgroup-try", "--disable-userns", "--cap-drop", "ALL", "--as-pid-1", "--new-session"]
    command += ["--die-with-parent", "--clearenv", "--setenv", "LANG", "C.UTF-8", "--setenv", "HOME", "/tmp"]
    command += ["--hostname", "sandbox"]
    places = dict.fromkeys((*_LIBRARIES, f"{python.prefix}/lib"))
    for place in places:
        command += _shown(place)
    command += ["--ro-bind", python.file, python.file]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    for number, folder in enumerate(config.packages):
        command += ["--ro-bind", folder, f"/packages/{number}"]
    # POSIX semaphores and shared memory of Python live in /dev/shm: within the quota.
    command += ["--size", str(room_bytes), "--tmpfs", "/tmp", "--symlink", "/tmp", "/dev/shm", "--remount-ro", "/"]
    command += ["--chdir", "/tmp"]
    command += ["--seccomp", str(channels.seccomp), "--info-fd", str(channels.info), "--block-fd", str(channels.go)]
    return [*command, "--"]


def _shown(place: str) -> list[str]:
    """A folder of the host read-only; a link, such as /lib to usr/lib, as the same link."""
    if os.path.islink(place):
        return ["--symlink", os.readlink(place), place]
    return ["--ro-bind", place, place] if os.path.isdir(place) else []
