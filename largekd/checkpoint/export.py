"""The student as a plain Hugging Face folder, written tensor by tensor."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from largekd.checkpoint.manifest import list_files
from largekd.errors import CheckpointError
from largekd.runtime.files import TEMPORARY_PREFIX, fsync_path, remove_tree, swap_into_place, temporary_sibling
from largekd.runtime.ranks import Ranks, Together

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LABEL = "export"


def write_export(
    folder: Path,
    *,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int,
    save_extras: Callable[[Path], None],
    ranks: Ranks,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `folder` with safetensors shards, their index, and what `save_extras` adds (config, tokenizer). Collective.

    `tensors` yields (name, whole tensor) once each; every rank runs it to its end, because gathering is collective,
    and rank 0 keeps what it needs: at most one shard and one tensor. What a yielded tensor points to may be freed
    afterwards. A tensor beyond `max_shard_bytes` gets a shard of its own; tied weights are yielded once.
    `dtype` converts floating-point tensors. An earlier export is replaced when the new one is whole, not before.
    Raises CheckpointError on every rank when the folder cannot be written.
    """
    temporary = temporary_sibling(folder, label=f"{_LABEL}-{folder.name}")
    shards = _Shards(temporary, max_bytes=max_shard_bytes) if ranks.is_main else None
    try:
        with Together(), _explained_as(folder):
            if shards is not None:
                _make_room(temporary, folder=folder)
        failure = _consume(tensors, shards=shards, dtype=dtype)
        with Together(), _explained_as(folder):
            if failure is not None:
                raise failure
            if shards is not None:
                shards.close()
                save_extras(temporary)
                _put_into_place(temporary, folder=folder)
    finally:
        if shards is not None:
            remove_tree(temporary)


def _consume(
    tensors: Iterable[tuple[str, Tensor]], *, shards: "_Shards | None", dtype: torch.dtype | None
) -> Exception | None:
    """Run the iterator to its end, filling `shards`; returns the first failure to write.

    After a failure the rest is still consumed: the other ranks are inside the same collectives.
    """
    failure: Exception | None = None
    for name, tensor in tensors:
        if shards is None or failure is not None:
            continue
        try:
            shards.add(name, tensor=_converted(tensor, dtype=dtype))
        except (OSError, SafetensorError) as error:
            failure = error
    return failure


class _Shards:
    """Collects tensors and writes a file whenever the next one would not fit."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, *, tensor: Tensor) -> None:
        """Keep a copy of `tensor`, after writing what is pending if the two do not fit together."""
        assert name not in self._pending and all(name not in names for names in self._files), name
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write the last shard, give the files their final names, write the index."""
        self._flush()
        if len(self._files) == 1:
            self._path(0).rename(self.folder / _SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05d}-of-{len(self._files):05d}.safetensors"
            self._path(number).rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        save_file(self._pending, self._path(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"


def _make_room(temporary: Path, *, folder: Path) -> None:
    """Create the temporary folder; what earlier exports to the same folder left behind is removed.

    Others beside it may be at work, as exports of other runs.
    """
    ours = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}(?:{_LABEL}|old)-{re.escape(folder.name)}-[0-9a-f]{{12}}")
    for leftover in temporary.parent.glob(f"{TEMPORARY_PREFIX}*"):
        if ours.fullmatch(leftover.name):
            remove_tree(leftover)
    temporary.mkdir(parents=True)


def _converted(tensor: Tensor, *, dtype: torch.dtype | None) -> Tensor:
    """A contiguous copy on the host; the caller may free the original."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(device="cpu", dtype=wanted, copy=True).contiguous()


def _put_into_place(temporary: Path, *, folder: Path) -> None:
    """Flush everything and exchange it with the earlier export."""
    for path in list_files(temporary):
        fsync_path(temporary / path)
    fsync_path(temporary)
    former = swap_into_place(temporary, target=folder)
    if former is not None:
        remove_tree(former)


@contextmanager
def _explained_as(folder: Path) -> Iterator[None]:
    """Turn a failure to write into a CheckpointError that names the folder and the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the export could not be written to {folder}: {error}; an earlier export there is unchanged. Make room or "
            "check the permission of run.dir"
        ) from error
