"""The folder of a cache: what it is bound to, its shards, and reading them in place.

    <path>/job.json                   the identity, written first: what an unfinished cache is being made of
    <path>/train/shard_00000.safetensors, .json    one range of sample ids; the JSON file holds its checksum
    <path>/eval/…
    <path>/teacher/                   the teacher's config.json and tokenizer; head.safetensors for hidden states
    <path>/manifest.json              written last: without it there is no cache

A shard's tensors have one row for each stored token, and `offsets` (samples + 1) int64 says where samples begin. Stored
are the positions whose label is to be learnt, in order; that depends on the sample alone. Captured activations, whose
names begin with `tap.`, have one row for each position of a sample; `position_offsets` says where samples begin there.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from largekd.config.cache import CodecConfig
from largekd.config.common import Frozen
from largekd.contracts import Origin, Segment
from largekd.errors import ConfigError, TeacherError
from largekd.runtime.faults import fault_point
from largekd.runtime.files import fsync_path, read_json, temporary_sibling, write_json
from largekd.runtime.ranks import Ranks
from largekd.teachers.cache_taps import POSITION_PREFIX, StoredLayers, TapIdentity

FORMAT = 2
JOB_FILE = "job.json"
MANIFEST_FILE = "manifest.json"
TEACHER_FOLDER = "teacher"
HEAD_FILE = "head.safetensors"
ORIGINS: tuple[Origin, ...] = ("train", "eval")

_HASH_CHUNK_BYTES = 1 << 22
_MAKE_AGAIN = "start launch/cache_teacher.py again, it makes what is missing"


class TeacherIdentity(Frozen):
    """The teacher: hashes of its weights (SHA-256 over the files' hashes), config.json and tokenizer; its sizes."""

    model: str
    weights: str
    config: str
    tokenizer: str
    vocab_size: int
    width: int
    precision: Literal["fp32", "bf16", "fp16"]
    attention: str


class DataIdentity(Frozen):
    """One data set: what its samples' ids and masks are, and the hash of the chat template that made them."""

    fingerprint: str
    chat_template: str | None
    samples: int


class HeadIdentity(Frozen):
    """The formula of the stored head, see VocabularyHead, and the hash of its file."""

    vocab_size: int
    scale: float
    softcap: float | None
    sha256: str


class Identity(Frozen):
    """Everything that decides a cache's bytes."""

    format: int
    codec: CodecConfig
    taps: TapIdentity | None = None
    teacher: TeacherIdentity
    data: dict[Origin, DataIdentity]
    sequence_length: int
    packing: bool
    micro_batch_size: int
    shard_samples: int


class ShardRecord(Frozen):
    """A finished shard. `positions`: rows of captured activations."""

    sha256: str
    samples: int
    tokens: int
    positions: int = 0


class Manifest(Frozen):
    """A whole cache. `layers`: of what captured activations are. `digest`: SHA-256 over all the rest."""

    identity: Identity
    shards: dict[Origin, tuple[ShardRecord, ...]]
    head: HeadIdentity | None
    layers: StoredLayers | None = None
    digest: str

    @classmethod
    def of(
        cls,
        identity: Identity,
        *,
        shards: Mapping[Origin, Sequence[ShardRecord]],
        head: HeadIdentity | None,
        layers: StoredLayers | None = None,
    ) -> "Manifest":
        """With its digest."""
        found = {origin: tuple(records) for origin, records in shards.items()}
        whole = cls(identity=identity, shards=found, head=head, layers=layers, digest="")
        text = json.dumps(whole.model_dump(mode="json"), sort_keys=True)
        return whole.model_copy(update={"digest": hashlib.sha256(text.encode()).hexdigest()})


def read_manifest(folder: Path, *, key: str = "teacher.path") -> Manifest:
    """The manifest of a whole cache. Errors: TeacherError when there is none, or it is damaged or of another format."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        unfinished = (folder / JOB_FILE).is_file()
        why = "launch/cache_teacher.py has not finished it; start it again" if unfinished else "there is no cache"
        raise TeacherError(f"{key} = {str(folder)!r}: no {MANIFEST_FILE} in that folder: {why}.")
    try:
        value = read_json(path)
        found = value["identity"]["format"]
        if found != FORMAT:
            raise TeacherError(
                f"{path}: the cache has format {found}, and this version reads {FORMAT}; make it again with "
                "launch/cache_teacher.py in another cache.path."
            )
        manifest = Manifest.model_validate_json(json.dumps(value))
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise TeacherError(f"{path}: not a cache's manifest ({error}); make the cache again.") from error
    whole = Manifest.of(manifest.identity, shards=manifest.shards, head=manifest.head, layers=manifest.layers)
    if whole.digest != manifest.digest:
        raise TeacherError(
            f"{path}: its digest is not that of its contents: the file was changed. Make the cache again."
        )
    return manifest


def shard_path(folder: Path, *, origin: Origin, number: int) -> Path:
    """The file of a shard; its record lies beside it."""
    return folder / origin / f"shard_{number:05d}.safetensors"


def write_shard(
    path: Path,
    *,
    tensors: Mapping[str, Tensor],
    offsets: NDArray[np.int64],
    rank: int,
    number: int,
    position_offsets: NDArray[np.int64] | None = None,
) -> ShardRecord:
    """Write a shard and then its record; a reader finds both or takes the shard for missing.

    position_offsets: where samples begin in the captured activations among `tensors`; None: there are none.
    Errors: ConfigError when the disk does not take it.
    """
    record_path = path.with_suffix(".json")
    record_path.unlink(missing_ok=True)
    temporary = temporary_sibling(path, label=path.name)
    try:
        places = {"offsets": offsets}
        if position_offsets is not None:
            places["position_offsets"] = position_offsets
        save_file({**tensors, **{name: torch.from_numpy(array) for name, array in places.items()}}, temporary)
        fsync_path(temporary)
        fault_point("cache:before_shard", rank=rank, step=number)
        record = ShardRecord(
            sha256=file_hash(temporary),
            samples=len(offsets) - 1,
            tokens=int(offsets[-1]),
            positions=0 if position_offsets is None else int(position_offsets[-1]),
        )
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"cache.path: {path} cannot be written ({error}); make room, and start the same command again."
        ) from error
    fsync_path(path.parent)
    fault_point("cache:after_shard", rank=rank, step=number)
    write_json(record_path, value=record.model_dump(mode="json"))
    return record


def verified_shard(path: Path) -> ShardRecord | None:
    """The record of a shard whose bytes have its checksum; None: it is not there, or not whole."""
    try:
        record = ShardRecord.model_validate(read_json(path.with_suffix(".json")))
        return record if file_hash(path) == record.sha256 else None
    except (OSError, ValueError):
        return None


def check_shards(
    folder: Path, *, manifest: Manifest, origins: Iterable[Origin], token_bytes: int, ranks: Ranks
) -> None:
    """Whether each of the manifest's shards is there with all its bytes; the ranks of a host share them out.

    Args: token_bytes: of a token's record, see Codec. Errors: TeacherError naming one that is not.
    """
    position_bytes = 0 if manifest.layers is None else manifest.layers.codec.position_bytes
    tables = 1 if manifest.layers is None else 2
    shards = [(origin, number) for origin in origins for number in range(len(manifest.shards[origin]))]
    for origin, number in shards[ranks.local_rank :: ranks.local_world_size]:
        record, path = manifest.shards[origin][number], shard_path(folder, origin=origin, number=number)
        try:
            with open(path, "rb") as stream:
                # A safetensors file: eight bytes with the length of the header, the header, the tensors.
                header = int.from_bytes(stream.read(8), "little")
                size = os.fstat(stream.fileno()).st_size
        except OSError as error:
            raise TeacherError(f"{path}: a shard of the cache cannot be read ({error}); {_MAKE_AGAIN}.") from error
        rows = record.tokens * token_bytes + record.positions * position_bytes
        if size != 8 + header + rows + tables * 8 * (record.samples + 1):
            raise TeacherError(f"{path}: a shard of the cache is damaged, it has {size} bytes; {_MAKE_AGAIN}.")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    total = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            total.update(chunk)
    return total.hexdigest()


class CacheReader:
    """Random access to the stored rows of any samples; shards are mapped into memory when they are first used."""

    def __init__(self, folder: Path, *, manifest: Manifest, pin: bool = False) -> None:
        """Args: pin: rows are given in page-locked memory, so that copies to an accelerator need not be waited for."""
        self.manifest = manifest
        self._folder = folder
        self._pin = pin
        self._shards: dict[tuple[Origin, int], _Shard] = {}
        self._size = manifest.identity.shard_samples

    def rows(
        self, segments: Sequence[Segment], *, origin: Origin, records: bool = True, taps: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """Each tensor's rows of the segments' samples, one sample after the other, in host memory: of the tokens'
        `records` all, of the captured activations those that `taps` names.

        Errors: TeacherError when the cache lacks this data set, or a shard cannot be read.
        """
        if origin not in self.manifest.shards:
            raise TeacherError(
                f"{self._folder}: the cache holds nothing of data.{origin}; make it again with data.{origin} set, or "
                f"take data.{origin} out."
            )
        places = [(self._shard(origin, s.sample_id // self._size), s.sample_id % self._size) for s in segments]
        # Where there is nothing to read, the first shard says what the columns are.
        like = places[0][0] if places else self._shard(origin, 0)
        tokens = [name for name in like.columns if records and not name.startswith(POSITION_PREFIX)]
        found = self._read(tokens, like=like, ranges=[shard.tokens_of(place) for shard, place in places])
        if taps:
            ranges = [shard.positions_of(place) for shard, place in places]
            found |= self._read(taps, like=like, ranges=ranges)
        return found

    def _read(self, names: Sequence[str], *, like: "_Shard", ranges: Sequence["_Range"]) -> dict[str, Tensor]:
        total = sum(stop - start for _, start, stop in ranges)
        found = {}
        for name in names:
            dtype, first = like.columns[name]
            out = torch.empty((total, *first.shape[1:]), dtype=dtype, pin_memory=self._pin)
            if ranges:
                pieces = [shard.columns[name][1][start:stop] for shard, start, stop in ranges]
                np.concatenate(pieces, out=_as_numpy(out))
            found[name] = out
        return found

    def _shard(self, origin: Origin, number: int) -> "_Shard":
        key = (origin, number)
        if key not in self._shards:
            path = shard_path(self._folder, origin=origin, number=number)
            self._shards[key] = _Shard(path, record=self.manifest.shards[origin][number])
        return self._shards[key]


class _Shard:
    """A mapped file: per tensor its dtype and a NumPy view, for slices of NumPy cost less than those of torch."""

    def __init__(self, path: Path, *, record: ShardRecord) -> None:
        try:
            # The tensors are views of a private map of the file: nothing is read before it is looked at.
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise TeacherError(f"{path}: a shard of the cache cannot be read ({error}); {_MAKE_AGAIN}.") from error
        self.offsets: NDArray[np.int64] = tensors.pop("offsets").numpy()
        # Without captured activations there is no sample to look up.
        self.position_offsets = tensors.pop("position_offsets", torch.zeros(1, dtype=torch.int64)).numpy()
        self.columns = {name: (tensor.dtype, _as_numpy(tensor)) for name, tensor in tensors.items()}
        found = len(self.offsets) - 1, int(self.offsets[-1]), int(self.position_offsets[-1])
        if found != (record.samples, record.tokens, record.positions):
            raise TeacherError(f"{path}: another shard than manifest.json says; make the cache again.")

    def tokens_of(self, place: int) -> "_Range":
        """The rows of a sample's labels."""
        start, stop = self.offsets[place : place + 2].tolist()
        return self, start, stop

    def positions_of(self, place: int) -> "_Range":
        """The rows of a sample's positions."""
        start, stop = self.position_offsets[place : place + 2].tolist()
        return self, start, stop


_Range = tuple[_Shard, int, int]


def _as_numpy(tensor: Tensor) -> NDArray:
    # NumPy has no bfloat16.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
