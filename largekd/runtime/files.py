"""Writes that a crash cannot leave half done, and folders that change places in one system call."""

import ctypes
import errno
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_EXCHANGE_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def temporary_sibling(path: Path, *, label: str) -> Path:
    """A name next to `path` that no reader takes for the finished thing: `.tmp-<label>-<random>`."""
    return path.parent / f"{TEMPORARY_PREFIX}{label}-{uuid.uuid4().hex[:12]}"


def atomic_write(path: Path, *, data: bytes, prepare_in: Path | None = None) -> None:
    """`path` holds `data` afterwards, or what it held before: temporary file, fsync, rename, fsync of the folder.

    The temporary file lies next to `path`, or in `prepare_in`, a folder of the same file system.
    """
    temporary = temporary_sibling(path if prepare_in is None else prepare_in / path.name, label=path.name)
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_json(path: Path, *, value: Any) -> None:
    """`atomic_write` of `value` as JSON: two-space indent, sorted keys, final newline."""
    atomic_write(path, data=(json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises OSError when it cannot be read and ValueError when it is not UTF-8 JSON.
    """
    return json.loads(path.read_bytes())


def fsync_path(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Delete a file, a link (never what it points to) or a folder; an absent path is fine."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def swap_into_place(new: Path, *, target: Path) -> Path | None:
    """Rename `new` to `target` and flush the folder; returns where the former `target` went, for the caller to delete.

    Where the kernel and the file system can exchange two names, a reader finds either the old or the new folder at
    every moment; elsewhere the old one is first moved aside.
    """
    if not os.path.lexists(target):
        os.replace(new, target)
        fsync_path(target.parent)
        return None
    if _exchange(new, other=target):
        fsync_path(target.parent)
        return new
    aside = temporary_sibling(target, label=f"old-{target.name}")
    os.replace(target, aside)
    os.replace(new, target)
    fsync_path(target.parent)
    return aside


def _exchange(path: Path, *, other: Path) -> bool:
    """True when the two names were exchanged (renameat2); False when this system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _EXCHANGE_UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(path), None, str(other))
