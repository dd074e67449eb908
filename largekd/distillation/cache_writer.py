"""Writing a cache's shards: each is a range of sample ids, walked by itself and stored sample by sample."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from largekd.contracts import IGNORE_LABEL, Batch, Origin, TapRequest, VocabularyHead
from largekd.data.collate import collate
from largekd.data.packing import one_per_row, pack
from largekd.data.store import SampleStore
from largekd.engine.frozen import FrozenEngine
from largekd.errors import ConfigError, TeacherError
from largekd.models.decoder import Decoder
from largekd.models.taps import depth, hidden_width
from largekd.runtime.files import fsync_path, temporary_sibling
from largekd.runtime.ranks import Ranks, Together, all_agree, gather_objects
from largekd.runtime.shutdown import StopSignal
from largekd.sharding.accelerator import device
from largekd.sharding.shards import gathered
from largekd.teachers.cache_codec import AnyCodec, HiddenCodec
from largekd.teachers.cache_format import (
    HEAD_FILE,
    TEACHER_FOLDER,
    HeadIdentity,
    Identity,
    ShardRecord,
    file_hash,
    shard_path,
    write_shard,
)
from largekd.teachers.cache_taps import StoredAttention, StoredLayers, TapCodec, positions_of
from largekd.teachers.readout import Readout

logger = logging.getLogger(__name__)

Rows = dict[str, torch.Tensor]

# Of a rank's free memory; joining one tensor's samples needs that tensor twice.
_SHARE = 0.4


@dataclass(frozen=True)
class ShardWriter:
    """The teacher with its codecs; all ranks call the same methods in the same order. Without `taps` no layer is
    captured."""

    folder: Path
    identity: Identity
    engine: FrozenEngine
    decoder: Decoder
    codec: AnyCodec
    taps: TapCodec | None
    ranks: Ranks

    def write_missing(
        self, samples: SampleStore, *, origin: Origin, shards: dict[int, ShardRecord], stop: StopSignal
    ) -> bool:
        """Write the shards that are not in `shards`, and add them to it. False: the ranks agreed to stop."""
        size, world = self.identity.shard_samples, self.ranks.world_size
        count = -(-len(samples) // size)
        missing = [number for number in range(count) if number not in shards]
        with Together():
            check_memory(
                max((self._bytes(samples, number=number) for number in missing), default=0),
                free=psutil.virtual_memory().available // self.ranks.local_world_size,
                shard_samples=size,
            )
        for start in range(0, len(missing), world):
            if not all_agree(not stop.requested):
                return False
            dealt = missing[start : start + world]
            number = dealt[self.ranks.rank] if self.ranks.rank < len(dealt) else None
            batches = [] if number is None else self._batches(samples, origin=origin, number=number)
            record: ShardRecord | None = None
            rows = self._walk(batches, samples=samples, origin=origin, number=number)
            with Together():
                if number is not None:
                    record = self._write(rows, samples=samples, origin=origin, number=number)
            found = gather_objects(None if record is None else [number, record.model_dump(mode="json")])
            shards.update({pair[0]: ShardRecord.model_validate(pair[1]) for pair in found if pair is not None})
            if self.ranks.is_main:
                logger.info("data.%s: %d of %d shards", origin, len(shards), count)
        return True

    def _bytes(self, samples: SampleStore, *, number: int) -> int:
        """What a shard takes in host memory, as if every position had a label."""
        positions = int(samples.lengths[self._ids(samples, number=number)].sum())
        return positions * (self.codec.token_bytes + (0 if self.taps is None else self.taps.position_bytes))

    def _ids(self, samples: SampleStore, *, number: int) -> NDArray[np.int64]:
        size = self.identity.shard_samples
        return np.arange(number * size, min((number + 1) * size, len(samples)), dtype=np.int64)

    def _batches(self, samples: SampleStore, *, origin: Origin, number: int) -> list[Batch]:
        order = self._ids(samples, number=number)
        identity = self.identity
        if identity.packing:
            rows = pack(samples.lengths, sequence_length=identity.sequence_length, order=order)
        else:
            rows = one_per_row(samples.lengths, order=order)
        size = identity.micro_batch_size
        return [
            collate(
                [*rows[start : start + size], *[()] * max(0, start + size - len(rows))],
                samples=samples,
                sequence_length=identity.sequence_length,
                packing=identity.packing,
                origin=origin,
            )
            for start in range(0, len(rows), size)
        ]

    def _walk(
        self, batches: list[Batch], *, samples: SampleStore, origin: Origin, number: int | None
    ) -> dict[int, Rows]:
        """Each sample's rows; as many forwards as the longest shard of the ranks needs."""
        found: dict[int, Rows] = {}
        problem: TeacherError | None = None
        for place in range(max(gather_objects(len(batches)))):
            batch = batches[place] if place < len(batches) else self._filler(samples)
            batch = batch.to(device=device())
            outputs = self.engine(batch=batch, taps=self._request)
            with ExitStack() as stack:
                if not isinstance(self.codec, HiddenCodec):
                    stack.enter_context(gathered(self.decoder.head_parameters))
                if place >= len(batches):
                    continue
                labels_P = batch.labels_BS.flatten()
                rows_T = (labels_P != IGNORE_LABEL).nonzero().squeeze(-1)
                hidden_BSE = outputs["last"]
                readout = Readout(
                    hidden_BSE.reshape(-1, hidden_BSE.shape[-1]), self._head(), self.identity.teacher.vocab_size
                )
                seed = self._seed(origin, number=number or 0, place=place)
                rows = self.codec.encode(readout, rows_T, labels_T=labels_P[rows_T], seed=seed)
            captured: Rows = {}
            if self.taps is not None:
                captured = self.taps.encode(self.decoder.taps_of(outputs), places_P=positions_of(batch))
            bad = _take(found, batches[place], rows=_on_host(rows), captured=_on_host(captured))
            if bad is not None and problem is None:
                record = int(samples.records[bad])
                problem = TeacherError(
                    f"data.{origin}: the teacher's output for record {record} is not a number; nothing of this shard "
                    "was stored. Look at that record, or use train.precision bf16 or fp32."
                )
        with Together():
            if problem is not None:
                raise problem
        return found

    def _seed(self, origin: Origin, *, number: int, place: int) -> int:
        base = getattr(self.identity.codec, "seed", 0) * 2 + (origin == "eval")
        return int(((base * 1_000_003 + number) * 1_000_003 + place) % 2**63)

    def _filler(self, samples: SampleStore) -> Batch:
        return collate(
            [()], samples=samples, sequence_length=self.identity.sequence_length, packing=self.identity.packing
        )

    def _head(self) -> VocabularyHead:
        bias = self.decoder.head_bias
        return self.decoder.head_spec.with_weights(
            weight_VD=self.decoder.head_weight.detach(), bias_V=None if bias is None else bias.detach()
        )

    @property
    def _request(self) -> TapRequest:
        return TapRequest() if self.taps is None else self.taps.request

    def _write(self, rows: Mapping[int, Rows], *, samples: SampleStore, origin: Origin, number: int) -> ShardRecord:
        ordered = [rows[sample] for sample in self._ids(samples, number=number).tolist()]
        captured = () if self.taps is None else tuple(self.taps.shapes)
        offsets = _offsets(ordered, name=next(iter(self.codec.shapes)))
        position_offsets = _offsets(ordered, name=captured[0]) if captured else None
        # Taken out one tensor after another: the shard never exists twice.
        tensors = {name: torch.cat([own.pop(name) for own in ordered]) for name in (*self.codec.shapes, *captured)}
        return write_shard(
            shard_path(self.folder, origin=origin, number=number),
            tensors=tensors,
            offsets=offsets,
            rank=self.ranks.rank,
            number=number,
            position_offsets=position_offsets,
        )

    def stored_layers(self, samples: SampleStore) -> StoredLayers | None:
        """What a reader must know of the captured layers, seen in one more forward. A collective call."""
        asked = self.identity.taps
        if self.taps is None or asked is None:
            return None
        # All shards may be there from an earlier start; then nothing has run yet.
        taps = self.decoder.taps_of(self.engine(batch=self._filler(samples).to(device=device()), taps=self._request))
        return StoredLayers(
            precision=asked.precision,
            depth=depth(self.decoder.model),
            width=hidden_width(self.decoder.model),
            hidden=asked.hidden,
            attention=tuple(
                StoredAttention(
                    layer=layer,
                    heads=inputs.query_BHSd.shape[1],
                    key_heads=inputs.key_BGSd.shape[1],
                    head_width=inputs.query_BHSd.shape[3],
                    scale=inputs.scale,
                    window=inputs.window,
                    softcap=inputs.softcap,
                )
                for layer, inputs in sorted(taps.attention.items())
            ),
        )

    def write_head(self) -> HeadIdentity | None:
        """The teacher's vocabulary head beside its tokenizer, where the codec needs it. A collective call."""
        if not isinstance(self.codec, HiddenCodec):
            return None
        path, spec = self.folder / TEACHER_FOLDER / HEAD_FILE, self.decoder.head_spec
        digest = ""
        with gathered(self.decoder.head_parameters), Together():
            if self.ranks.is_main:
                head = self._head()
                tensors = {"weight": head.weight_VD} | ({} if head.bias_V is None else {"bias": head.bias_V})
                temporary = temporary_sibling(path, label=path.name)
                save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)
                fsync_path(temporary)
                temporary.replace(path)
                fsync_path(path.parent)
                digest = file_hash(path)
        return HeadIdentity(
            vocab_size=spec.vocab_size, scale=spec.scale, softcap=spec.softcap, sha256=gather_objects(digest)[0]
        )


def _on_host(rows: Rows) -> Rows:
    return {name: tensor.cpu() for name, tensor in rows.items()}


def check_memory(needed: int, *, free: int, shard_samples: int) -> None:
    """Errors: ConfigError where a rank's largest shard, `needed` bytes, would take too much of its `free` memory."""
    limit = int(free * _SHARE)
    if needed > limit:
        raise ConfigError(
            f"cache.shard_samples = {shard_samples}: the largest shard takes {needed / 1e9:.3g} GB of host memory "
            f"before it is written, and a rank may use {limit / 1e9:.3g} GB of what is free; about "
            f"{max(1, shard_samples * limit // needed)} would fit."
        )


def _offsets(ordered: list[Rows], *, name: str) -> NDArray[np.int64]:
    """Where each sample's rows of a tensor begin, and the end."""
    return np.concatenate(([0], np.cumsum([len(own[name]) for own in ordered]))).astype(np.int64)


def _take(found: dict[int, Rows], batch: Batch, *, rows: Rows, captured: Rows) -> int | None:
    """Share a micro-batch's rows, of labels and of positions, out to its samples; the first sample with something that
    is not a number."""
    finite_T, finite_P = rows.pop("finite"), captured.pop("finite", None)
    labelled_BS = batch.labels_BS != IGNORE_LABEL
    start, first, bad = 0, 0, None
    for place, row in enumerate(batch.segments):
        for segment in row:
            count = int(labelled_BS[place, segment.offset : segment.offset + segment.length].sum())
            labels, positions = slice(start, start + count), slice(first, first + segment.length)
            found[segment.sample_id] = {name: tensor[labels] for name, tensor in rows.items()} | {
                name: tensor[positions] for name, tensor in captured.items()
            }
            finite = bool(finite_T[labels].all()) and (finite_P is None or bool(finite_P[positions].all()))
            if bad is None and not finite:
                bad = segment.sample_id
            start, first = labels.stop, positions.stop
    assert start == len(finite_T) and (finite_P is None or first == len(finite_P))
    return bad
