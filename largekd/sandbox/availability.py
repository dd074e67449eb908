"""Whether this machine can run programs as configured; nothing weaker is ever taken instead."""

import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from largekd.config.sandbox import SandboxConfig
from largekd.errors import ConfigError
from largekd.sandbox.isolation import NOBODY, interpreter, unprivileged
from largekd.sandbox.process import Request, StartError, run_process
from largekd.sandbox.syscalls import ARCHITECTURES


def isolation_available(config: SandboxConfig | None = None) -> str | None:
    """None where programs can be run in namespaces; otherwise the reason why not, with the remedy.

    Tried, not guessed: an interpreter is started with the options that programs get, once per process.
    """
    config = config or SandboxConfig()
    return _tried(config.python)


@cache
def _tried(python: str) -> str | None:
    if platform.machine() not in ARCHITECTURES:
        return f"no system-call filter for {platform.machine()}, only for {', '.join(ARCHITECTURES)}"
    if shutil.which("bwrap") is None:
        return "bwrap not found: install bubblewrap (apt-get install bubblewrap)"
    try:
        ended = run_process(Request(program=b"", mode="script"), config=SandboxConfig(python=python, wall_s=30.0))
    except ConfigError as error:
        return str(error)
    except StartError as error:
        return f"bubblewrap is refused here: {error}"
    return None if ended.report.startswith("exit 0 ") else f"an empty program failed: {ended.stderr[-500:]!r}"


def check_isolation(config: SandboxConfig) -> None:
    """Raise ConfigError where programs cannot be run as configured. Nothing weaker is ever taken instead."""
    interpreter(config.python)
    for folder in config.packages:
        _check_folder(folder)
    if config.isolation == "namespaces" and (reason := isolation_available(config)):
        raise ConfigError(
            f"sandbox.isolation=namespaces: {reason}. Or set isolation: limits_only, for programs that you trust: "
            "they can then read your files and use the network"
        )


@cache
def _check_folder(folder: str) -> None:
    if not Path(folder).is_absolute() or not Path(folder).is_dir():
        raise ConfigError(f"sandbox.packages: {folder!r} is not the absolute path of a folder")
    if os.geteuid() != 0:
        return
    found = subprocess.run(["test", "-r", folder, "-a", "-x", folder], check=False, **unprivileged())  # type: ignore[call-overload]
    if found.returncode != 0:
        raise ConfigError(f"sandbox.packages: {folder!r} cannot be read by user {NOBODY}, as whom programs run")
