"""One run per run folder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from largekd.errors import ConfigError
from largekd.runtime.files import read_json, write_json
from largekd.runtime.ranks import Ranks, raise_together

_LOCK = ".lock"
_OWNER = ".lock-owner.json"


@contextmanager
def run_lock(folder: Path, *, ranks: Ranks, key: str = "run.dir") -> Iterator[None]:
    """Hold the folder that `key` names; the lock is the kernel's and ends with the process, however it ends.

    Rank 0 holds it, every rank raises when it cannot. Raises ConfigError that names the holder's host and pid, or the
    missing permission.
    """
    lock = filelock.FileLock(folder / _LOCK)
    error = _acquire(lock, folder=folder, key=key) if ranks.is_main else None
    raise_together(error)
    try:
        yield
    finally:
        if ranks.is_main:
            lock.release()


def _acquire(lock: filelock.BaseFileLock, *, folder: Path, key: str) -> ConfigError | None:
    """Take the lock and sign it; the error instead of raising it, so that all ranks can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        write_json(folder / _OWNER, value={"host": socket.gethostname(), "pid": os.getpid()})
    except filelock.Timeout:
        return ConfigError(
            f"{key}={folder}: another run ({_owner(folder)}) is using this folder; stop it or choose another {key}"
        )
    except OSError as error:
        return ConfigError(f"{key}={folder}: cannot be created or written ({error}); choose another {key}")
    return None


def _owner(folder: Path) -> str:
    try:
        owner = read_json(folder / _OWNER)
        return f"host {owner['host']}, pid {owner['pid']}"
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "of unknown host and pid"
