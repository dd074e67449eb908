"""What a checkpoint consists of, with a SHA-256 per file, and the proof that a folder still is that.

`torch.load` checks no sums: a flipped bit in a shard loads silently. Everything is therefore verified before anything
is read, and nothing that the manifest does not list may lie in the folder. The hashing is shared among the ranks.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch.distributed as dist
from pydantic import Field

from largekd.config.common import Frozen
from largekd.errors import CheckpointError
from largekd.runtime.files import atomic_write, write_json
from largekd.runtime.ranks import Ranks, broadcast_object, gather_objects

MANIFEST = "manifest.json"
MARKER = "COMPLETE"
Group = dist.ProcessGroup | None


class FileRecord(Frozen):
    """One file: size in bytes and SHA-256 of its content."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Frozen):
    """The content of `manifest.json`. Paths are relative to the checkpoint, with forward slashes."""

    step: int = Field(ge=0)
    world_size: int = Field(ge=1)
    fingerprint: str
    versions: dict[str, str]
    files: dict[str, FileRecord]

    @property
    def size_bytes(self) -> int:
        """Sum over the files."""
        return sum(record.size for record in self.files.values())


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint that was verified before.

    Raises CheckpointError when it is absent or not a manifest.
    """
    try:
        return Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except (OSError, pydantic.ValidationError) as error:
        raise CheckpointError(f"{path / MANIFEST}: not a checkpoint manifest ({error})") from error


def list_files(folder: Path) -> dict[str, int]:
    """Relative path -> size of every file under `folder`, sorted.

    Raises CheckpointError for a link or a special file: what it leads to is not part of the checkpoint.
    """
    found: dict[str, int] = {}
    for root, folders, files in os.walk(folder, onerror=_raise):
        for name in (*folders, *files):
            path = Path(root, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                found[path.relative_to(folder).as_posix()] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise CheckpointError(f"{path.relative_to(folder)} is a link or a special file")
    return dict(sorted(found.items()))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_share(folder: Path, *, sizes: Mapping[str, int], ranks: Ranks) -> dict[str, str]:
    """Path -> SHA-256 of this rank's share: every world_size-th file, largest first."""
    ordered = sorted(sizes, key=lambda path: (-sizes[path], path))
    return {path: hash_file(folder / path) for path in ordered[ranks.rank :: ranks.world_size]}


def write_manifest(folder: Path, *, manifest: Manifest) -> None:
    """Write `manifest.json` for good (fsync)."""
    write_json(folder / MANIFEST, value=manifest.model_dump())


def write_marker(folder: Path) -> None:
    """Write `COMPLETE`: it holds the manifest's SHA-256, and its presence ends a save."""
    # Prepared outside: a kill at this moment must not leave an unlisted file in the checkpoint.
    atomic_write(folder / MARKER, data=_marker((folder / MANIFEST).read_bytes()), prepare_in=folder.parent)


def find_damage(folder: Path, *, step: int, ranks: Ranks, group: Group = None, marked: bool = True) -> str | None:
    """Why `folder` is not the whole checkpoint of `step`, or None; the same answer on every rank. Collective.

    Sizes and names are compared first, on rank 0; the hashes afterwards, by all ranks. `marked=False` asks whether
    the save reached its rename: everything is checked but the marker, which must be absent.
    """
    answer: dict[str, Any] = {}
    if ranks.is_main:
        answer = _inspect(folder, step=step, marked=marked)
    answer = broadcast_object(answer, group=group)
    if answer["damage"] is not None:
        return str(answer["damage"])
    listed: Mapping[str, Mapping[str, Any]] = answer["files"]
    findings = gather_objects(_compare_share(folder, listed=listed, ranks=ranks), group=group)
    return next((finding for finding in findings if finding is not None), None)


def _inspect(folder: Path, *, step: int, marked: bool) -> dict[str, Any]:
    """Rank 0's part: {"damage": reason or None, "files": the manifest's records}."""
    try:
        sizes = list_files(folder)
        for name in (MARKER, MANIFEST) if marked else (MANIFEST,):
            if name not in sizes:
                return {"damage": f"{name} is missing: the save did not finish"}
        raw = (folder / MANIFEST).read_bytes()
        if marked and (folder / MARKER).read_bytes() != _marker(raw):
            return {"damage": f"{MANIFEST} is not the one that {MARKER} was written for"}
        manifest = Manifest.model_validate_json(raw)
    except CheckpointError as error:
        return {"damage": str(error)}
    except (OSError, ValueError) as error:
        return {"damage": f"{MARKER} or {MANIFEST} cannot be read ({type(error).__name__}: {error})"}
    own = (MARKER, MANIFEST) if marked else (MANIFEST,)
    damage = _compare_sizes(manifest, step=step, found={path: sizes[path] for path in sizes if path not in own})
    return {"damage": damage, "files": {path: record.model_dump() for path, record in manifest.files.items()}}


def _marker(manifest: bytes) -> bytes:
    """The content of `COMPLETE` for a manifest."""
    return (json.dumps({"manifest_sha256": hashlib.sha256(manifest).hexdigest()}) + "\n").encode()


def _compare_sizes(manifest: Manifest, *, step: int, found: Mapping[str, int]) -> str | None:
    if manifest.step != step:
        return f"its manifest is that of step {manifest.step}"
    if missing := sorted(set(manifest.files) - set(found)):
        return f"{_some(missing)} missing"
    if extra := sorted(set(found) - set(manifest.files)):
        return f"{_some(extra)} not in the manifest"
    for path, size in found.items():
        if size != manifest.files[path].size:
            return f"{path} has {size} bytes instead of {manifest.files[path].size}"
    return None


def _compare_share(folder: Path, *, listed: Mapping[str, Mapping[str, Any]], ranks: Ranks) -> str | None:
    """This rank's share of the hashing."""
    sizes = {path: int(record["size"]) for path, record in listed.items()}
    try:
        for path, digest in hash_share(folder, sizes=sizes, ranks=ranks).items():
            if digest != listed[path]["sha256"]:
                return f"{path} has another SHA-256 than when it was saved"
    except OSError as error:
        return f"rank {ranks.rank} cannot read it ({error})"
    return None


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _raise(error: OSError) -> None:
    raise error
