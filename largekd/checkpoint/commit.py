"""Checkpoints that exist completely or not at all.

A save goes to `.tmp-…` on all ranks, is flushed, hashed into `manifest.json`, renamed to `step_00000500`, and counts
only once `COMPLETE` is in it. A resume looks at the folders themselves (there is no pointer file that could be wrong),
newest first, and takes the first that is proven whole.
"""

import importlib.metadata
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

from largekd.checkpoint.manifest import (
    MARKER,
    FileRecord,
    Group,
    Manifest,
    find_damage,
    hash_share,
    list_files,
    read_manifest,
    write_manifest,
    write_marker,
)
from largekd.checkpoint.retention import delete_checkpoints, expired, remove_leftovers
from largekd.errors import CheckpointError, ConfigError
from largekd.runtime.faults import fault_point
from largekd.runtime.files import TEMPORARY_PREFIX, fsync_path, remove_tree, swap_into_place
from largekd.runtime.ranks import Ranks, Together, broadcast_object, gather_objects, raise_together

STEP_FOLDER = re.compile(r"step_(\d{8,})")
_PACKAGES = ("torch", "deepspeed", "transformers", "safetensors")
_SHARED_WAIT_S = 10.0
# What torch.save says when the disk is full; it raises no OSError.
_WRITER_FAILURES = ("PytorchStreamWriter", "inline_container", "iostream", "file write failed")

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run. Every method is collective unless it says otherwise.

    `group`: a gloo group of its own (`new_control_group`) lets a rank that fails between two collectives of the save
    tell the others; None uses the default group. `fingerprint` identifies the configuration and is kept in manifests.
    """

    def __init__(
        self, folder: Path, *, ranks: Ranks, keep: int = 2, fingerprint: str = "", group: Group = None
    ) -> None:
        assert keep >= 2, keep
        self.folder = folder
        self.ranks = ranks
        self.group = group
        self._keep = keep
        self._fingerprint = fingerprint

    def prepare(self) -> None:
        """Call once, holding the run's lock: make the folder, prove that all ranks share it, sweep leftovers.

        Raises ConfigError when the folder cannot be written or is not shared.
        """
        error = None
        if self.ranks.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.folder)
            except OSError as raised:
                error = ConfigError(f"{self.folder}: cannot be written ({raised}); choose another run.dir")
        raise_together(error, group=self.group)
        require_shared(self.folder, ranks=self.ranks, group=self.group)

    def writing(self, *, step: int) -> "CheckpointWrite":
        """Context manager: the same temporary folder on every rank to write into; the exit commits it."""
        return CheckpointWrite(store=self, step=step)

    def newest(self) -> Path | None:
        """The newest checkpoint, verified in full; None only where no save ever made a `step_…` folder.

        Damaged ones are skipped with a warning. When no complete one is left, a save that was cut off between its
        rename and its marker is completed if its manifest proves it whole.
        Raises CheckpointError when there are checkpoints but none can be used: never a silent restart from step 0.
        """
        damages: dict[str, str] = {}
        for name in self.names():
            damage = self._damage(name)
            if damage is None:
                return self.folder / name
            damages[name] = damage
            self._warn("checkpoint %s is damaged and is skipped: %s", self.folder / name, damage)
        if not damages:
            return None
        return self._finish_interrupted(damages)

    def named(self, name: str) -> Path:
        """The checkpoint called `name` (`step_00000500`), verified in full.

        Raises CheckpointError for any other form of name and for a damaged or absent checkpoint.
        """
        if STEP_FOLDER.fullmatch(name) is None:
            raise CheckpointError(f"{name!r} is not the name of a checkpoint; they are called like step_00000500")
        damage = self._damage(name)
        if damage is not None:
            raise CheckpointError(f"checkpoint {self.folder / name} cannot be used: {damage}")
        return self.folder / name

    def is_whole(self, *, step: int) -> bool:
        """True where a complete, undamaged checkpoint of `step` exists."""
        return step_folder(step) in self.names() and self._damage(step_folder(step)) is None

    def names(self) -> list[str]:
        """Names of all `step_…` entries, newest first, as rank 0 sees them."""
        found = self._scan() if self.ranks.is_main else []
        return list(broadcast_object(found, group=self.group))

    def retire(self, *, newest: str) -> None:
        """Delete what is older than the `keep` newest whole checkpoints; `newest` was verified by its own commit."""
        names = expired(
            self.names(), keep=self._keep, is_whole=lambda name: name == newest or self._damage(name) is None
        )
        if not self.ranks.is_main:
            return
        try:
            delete_checkpoints(self.folder, names=names)
        except OSError as error:
            logger.warning("old checkpoints could not be removed: %s", error)

    def manifest_of(self, *, step: int, files: Mapping[str, FileRecord]) -> Manifest:
        """The manifest that this run writes. Local."""
        return Manifest(
            step=step,
            world_size=self.ranks.world_size,
            fingerprint=self._fingerprint,
            versions=_versions(),
            files=dict(files),
        )

    def explain(self, error: BaseException, *, step: int) -> BaseException:
        """A failed write as a CheckpointError with path, space and way out; other errors as they are. Local."""
        if not _is_write_failure(error):
            return error
        last = next((name for name in self._scan() if (self.folder / name / MARKER).is_file()), None)
        free = "unknown"
        with suppress(OSError):
            free = f"{shutil.disk_usage(self.folder).free:,}"
        kept = "there is no earlier checkpoint"
        if last is not None:
            kept = f"the last complete one is {last}"
            with suppress(CheckpointError):
                kept += f" ({read_manifest(self.folder / last).size_bytes:,} bytes)"
        explained = CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {error}; {free} bytes are free "
            f"there, {kept}; make room or lower checkpoint.keep, then start the run again to resume"
        )
        explained.__cause__ = error
        return explained

    def _scan(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        found = [name for name in os.listdir(self.folder) if STEP_FOLDER.fullmatch(name)]
        return sorted(found, key=step_of, reverse=True)

    def _damage(self, name: str, *, marked: bool = True) -> str | None:
        path = self.folder / name
        kind = None
        if self.ranks.is_main and (path.is_symlink() or not path.is_dir()):
            kind = "it is a link" if path.is_symlink() else "it is not a folder"
        kind = broadcast_object(kind, group=self.group)
        return kind or find_damage(path, step=step_of(name), ranks=self.ranks, group=self.group, marked=marked)

    def _finish_interrupted(self, damages: Mapping[str, str]) -> Path:
        """The newest checkpoint that lacks nothing but its marker, with the marker written."""
        for name in damages:
            if self._damage(name, marked=False) is not None:
                continue
            with Together(group=self.group):
                if self.ranks.is_main:
                    write_marker(self.folder / name)
            self._warn("checkpoint %s was saved completely but not marked; it is used", self.folder / name)
            return self.folder / name
        reasons = "; ".join(f"{name}: {damage}" for name, damage in list(damages.items())[:5])
        raise CheckpointError(
            f"{self.folder} holds {len(damages)} checkpoint(s) and none can be used ({reasons}). Restore one, or set "
            "run.fresh=true to move this run aside and start from step 0"
        )

    def _warn(self, message: str, *values: object) -> None:
        if self.ranks.is_main:
            logger.warning(message, *values)


class CheckpointWrite:
    """One save. On exit all ranks agree, and either the checkpoint is complete or nothing of it is left.

    Raises CheckpointError on every rank when any rank could not write (disk full, quota, permission). Another error
    of the body is raised as it is on its rank and named on the others.
    """

    def __init__(self, *, store: CheckpointStore, step: int) -> None:
        self._store = store
        self._step = step
        self._target = store.folder / step_folder(step)
        self._folder = store.folder
        self._marked = False

    def __enter__(self) -> Path:
        if self._store.is_whole(step=self._step):
            raise CheckpointError(f"{self._target} is complete already; a step is saved once")
        name = f"{TEMPORARY_PREFIX}{self._step}-{uuid.uuid4().hex[:12]}"
        self._folder = self._store.folder / broadcast_object(name, group=self._store.group)
        self._on_main(lambda: self._folder.mkdir(parents=True))
        return self._folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._agree(error)
            self._commit()
        finally:
            if self._store.ranks.is_main and not self._marked:
                with suppress(OSError):
                    remove_tree(self._folder)
        self._store.retire(newest=self._target.name)

    def _commit(self) -> None:
        self._on_all(lambda: self._fault("after_shard"))
        files = self._measure()
        self._on_all(lambda: self._fault("before_manifest"))
        manifest = self._store.manifest_of(step=self._step, files=files)
        self._on_main(lambda: write_manifest(self._folder, manifest=manifest))
        self._on_all(lambda: self._fault("before_rename"))
        self._on_main(self._rename)
        self._on_all(lambda: self._fault("before_marker"))
        self._on_main(self._mark)
        self._fault("after_commit")

    def _measure(self) -> dict[str, FileRecord]:
        """Flush and hash everything under the folder, each rank its share."""
        ranks, group = self._store.ranks, self._store.group
        # Every host lists: a network file system may show another host's new files late, but each its own at once.
        sizes: dict[str, int] = {}
        self._on_all(lambda: sizes.update(list_files(self._folder) if ranks.is_local_main else {}))
        for seen in gather_objects(sizes, group=group):
            sizes.update(seen)
        self._on_all(lambda: self._flush(list(sizes)))
        digests: dict[str, str] = {}
        self._on_all(lambda: digests.update(hash_share(self._folder, sizes=sizes, ranks=ranks)))
        for part in gather_objects(digests, group=group):
            digests.update(part)
        return {path: FileRecord(size=size, sha256=digests[path]) for path, size in sorted(sizes.items())}

    def _flush(self, paths: list[str]) -> None:
        """fsync this rank's share of what the host may have written, and the folders that list it."""
        ranks = self._store.ranks
        for path in sorted(paths)[ranks.local_rank :: ranks.local_world_size]:
            fsync_path(self._folder / path)
        if ranks.is_local_main:
            for root, _, _ in os.walk(self._folder):
                fsync_path(Path(root))

    def _rename(self) -> None:
        former = swap_into_place(self._folder, target=self._target)
        self._folder = self._target
        if former is not None:
            remove_tree(former)

    def _mark(self) -> None:
        write_marker(self._target)
        self._marked = True

    def _fault(self, point: str) -> None:
        fault_point(f"save:{point}", rank=self._store.ranks.rank, step=self._step)

    def _on_main(self, action: Callable[[], object]) -> None:
        self._on_all(action if self._store.ranks.is_main else lambda: None)

    def _on_all(self, action: Callable[[], object]) -> None:
        """Run `action`; a failure on any rank is raised on all."""
        error: BaseException | None = None
        try:
            action()
        except (OSError, CheckpointError) as raised:
            error = raised
        self._agree(error)

    def _agree(self, error: BaseException | None) -> None:
        explained = None if error is None else self._store.explain(error, step=self._step)
        raise_together(explained, group=self._store.group)


def step_folder(step: int) -> str:
    """The folder name of a step: `step_00000500`."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """The step of a folder name."""
    match = STEP_FOLDER.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def require_shared(folder: Path, *, ranks: Ranks, group: Group = None) -> None:
    """Prove that all ranks see the same folder.

    Raises ConfigError on every rank when one does not see what rank 0 wrote there.
    """
    probe = folder / f"{TEMPORARY_PREFIX}probe-{broadcast_object(uuid.uuid4().hex, group=group)}"
    error: ConfigError | None = None
    if ranks.is_main:
        try:
            probe.touch(exist_ok=False)
        except OSError as raised:
            error = ConfigError(f"{folder}: cannot be written ({raised}); choose another run.dir")
    raise_together(error, group=group)
    if not _appears(probe):
        error = ConfigError(
            f"{folder}: rank {ranks.rank} on node {ranks.node} does not see what rank 0 wrote there; run.dir must be "
            "on a file system that all nodes share"
        )
    try:
        raise_together(error, group=group)
    finally:
        if ranks.is_main:
            probe.unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    deadline_s = time.monotonic() + _SHARED_WAIT_S
    while not path.exists():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.1)
    return True


def _is_write_failure(error: BaseException) -> bool:
    if isinstance(error, OSError | SafetensorError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _WRITER_FAILURES)


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
