"""The caching job: walk both data sets with the sharded online teacher and store what the codec says per sample.

A shard is a range of sample ids. Its rows are packed of its own samples and its micro-batches are formed inside it, so
that its bytes depend on data, settings and teacher alone, not on ranks or restarts. What is missing is dealt to the
ranks in turn; a rank that runs out sends empty rows through the teacher, whose shards it helps to gather.
"""

import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import save_file

from largekd.config.cache import CacheConfig
from largekd.config.placement import read_placements
from largekd.config.render import render_config
from largekd.config.run import RunConfig
from largekd.config.teacher import OnlineTeacherConfig
from largekd.contracts import IGNORE_LABEL, Batch, Origin, VocabularyHead
from largekd.data.collate import collate
from largekd.data.packing import one_per_row, pack
from largekd.data.store import SampleStore
from largekd.distillation.cache_binding import differences, identity_of
from largekd.distillation.data import build_data
from largekd.distillation.models import find_sources
from largekd.distillation.teachers import build_teacher_model
from largekd.engine.frozen import FrozenEngine
from largekd.errors import ConfigError, LargeKDError, TeacherError
from largekd.models.build import DTYPES
from largekd.models.decoder import Decoder
from largekd.runtime.faults import fault_point
from largekd.runtime.files import TEMPORARY_PREFIX, fsync_path, read_json, remove_tree, temporary_sibling, write_json
from largekd.runtime.lock import run_lock
from largekd.runtime.logging import configure_logging, write_line
from largekd.runtime.ranks import (
    MainFirst,
    Ranks,
    Together,
    all_agree,
    current_ranks,
    forget_failure,
    gather_objects,
    main_failed_too,
    new_control_group,
    require_same,
)
from largekd.runtime.shutdown import StopSignal
from largekd.sharding.accelerator import device
from largekd.sharding.cluster import process_group
from largekd.sharding.shards import gathered
from largekd.teachers.cache_codec import AnyCodec, HiddenCodec, build_codec
from largekd.teachers.cache_format import (
    HEAD_FILE,
    JOB_FILE,
    MANIFEST_FILE,
    TEACHER_FOLDER,
    HeadIdentity,
    Identity,
    Manifest,
    ShardRecord,
    file_hash,
    shard_path,
    verified_shard,
    write_shard,
)
from largekd.teachers.readout import Readout

logger = logging.getLogger(__name__)

_DAY_S = 86_400
# What a tokenizer and a configuration are made of; weights and remote code are not copied.
_TEACHER_FILES = ("config.json", "generation_config.json", "vocab.json", "merges.txt", "added_tokens.json")
_TEACHER_PATTERNS = ("*token*.json", "*.model", "*.jinja")


def cache_teacher(config: RunConfig) -> str | None:
    """Make, or go on with, the cache at `config.cache.path`; returns its digest, None when it was told to stop.

    A collective call on every rank of the job. Errors: LargeKDError for everything that the user can mend.
    """
    with process_group(timeout_s=config.train.collective_timeout_s):
        ranks = current_ranks()
        configure_logging(level=config.log.level, rank=ranks.rank)
        forget_failure(ranks=ranks)
        try:
            cache, teacher = _what_to_cache(config)
            folder = Path(cache.path).expanduser().absolute()
            with run_lock(folder, ranks=ranks, key="cache.path"), StopSignal() as stop:
                require_same(render_config(config), what="configuration", key="--config and its overrides")
                digest = _run(config, cache=cache, teacher=teacher, folder=folder, ranks=ranks, stop=stop)
        except LargeKDError as error:
            error.only_here = not main_failed_too(ranks=ranks)
            raise
        if ranks.is_main:
            write_line(
                f"stopped; the same command goes on with {folder}."
                if digest is None
                else f"{folder} is whole, digest {digest}; train with teacher={{kind: cached, path: {cache.path}}}."
            )
        return digest


def _what_to_cache(config: RunConfig) -> tuple[CacheConfig, OnlineTeacherConfig]:
    if config.cache is None:
        raise ConfigError("cache: set cache.path, the folder of the cache; there is no such key in the configuration.")
    if not isinstance(config.teacher, OnlineTeacherConfig):
        raise ConfigError(f"teacher.kind = {config.teacher.kind!r}: only a teacher of kind 'online' can be cached.")
    if config.objective.translation is not None:
        raise ConfigError(
            "objective.translation: a cache holds the teacher's answers in its own tokens; take the key out and give "
            "student.model one with the teacher's tokenizer."
        )
    return config.cache, config.teacher


def _run(
    config: RunConfig,
    *,
    cache: CacheConfig,
    teacher: OnlineTeacherConfig,
    folder: Path,
    ranks: Ranks,
    stop: StopSignal,
) -> str | None:
    control = new_control_group(timeout_s=_DAY_S)

    def first() -> MainFirst:
        return MainFirst(ranks=ranks, group=control)

    placements = read_placements(config)
    sources = find_sources(config, first=first)
    data = build_data(config, sources=sources, ranks=ranks, folder=folder, first=first)
    identity = identity_of(
        config, cache=cache, teacher=teacher, sources=sources, samples=data.samples, ranks=ranks, group=control
    )
    with Together(group=control):
        if ranks.is_main:
            _prepare(folder, identity=identity, teacher=sources.teacher.path)
    shards = _verified(folder, identity=identity, ranks=ranks, group=control)
    model = build_teacher_model(config, sources=sources, placements=placements, ranks=ranks)
    assert model is not None
    with ExitStack() as stack:
        engine = FrozenEngine(module=model.decoder, ds_config=model.ds_config)
        stack.callback(engine.close)
        configure_logging(level=config.log.level, rank=ranks.rank)
        writer = ShardWriter(
            folder=folder,
            identity=identity,
            engine=engine,
            decoder=model.decoder,
            codec=build_codec(
                identity.codec,
                vocab_size=identity.teacher.vocab_size,
                width=identity.teacher.width,
                dtype=DTYPES[identity.teacher.precision],
            ),
            ranks=ranks,
        )
        for origin, samples in data.samples.items():
            if not writer.write_missing(samples, origin=origin, shards=shards[origin], stop=stop):
                return None
        head = writer.write_head()
    return _finish(folder, identity=identity, shards=shards, head=head, ranks=ranks)


def _prepare(folder: Path, *, identity: Identity, teacher: Path) -> None:
    """Make the folder this cache's. Errors: TeacherError when it holds another one."""
    value = identity.model_dump(mode="json")
    job = folder / JOB_FILE
    if job.is_file():
        try:
            old = read_json(job)
        except ValueError as error:
            raise TeacherError(f"{job} cannot be read ({error}); choose another cache.path.") from error
        found = list(differences(old, value))
        if found:
            raise TeacherError(
                f"cache.path = {str(folder)!r} holds another cache: {'; '.join(found)}. Restore these, or choose "
                "another cache.path."
            )
    for origin in identity.data:
        (folder / origin).mkdir(exist_ok=True)
        for left in (folder / origin).glob(f"{TEMPORARY_PREFIX}*"):
            remove_tree(left)
    _copy_teacher(teacher, target=folder / TEACHER_FOLDER)
    write_json(job, value=value)


def _copy_teacher(source: Path, *, target: Path) -> None:
    target.mkdir(exist_ok=True)
    files = {source / name for name in _TEACHER_FILES} | {
        path for pattern in _TEACHER_PATTERNS for path in source.glob(pattern)
    }
    for path in sorted(files):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
            fsync_path(target / path.name)


def _verified(
    folder: Path, *, identity: Identity, ranks: Ranks, group: dist.ProcessGroup | None
) -> dict[Origin, dict[int, ShardRecord]]:
    """What an earlier start left whole, by number; the ranks share the checksums out. A collective call."""
    whole: dict[Origin, dict[int, ShardRecord]] = {}
    for origin, data in identity.data.items():
        count = -(-data.samples // identity.shard_samples)
        own = {}
        for number in range(ranks.rank, count, ranks.world_size):
            record = verified_shard(shard_path(folder, origin=origin, number=number))
            if record is not None:
                own[number] = record.model_dump(mode="json")
        whole[origin] = {
            int(number): ShardRecord.model_validate(record)
            for part in gather_objects(own, group=group)
            for number, record in part.items()
        }
        if ranks.is_main:
            logger.info("data.%s: %d of %d shards are there already", origin, len(whole[origin]), count)
    return whole


def _finish(
    folder: Path,
    *,
    identity: Identity,
    shards: Mapping[Origin, Mapping[int, ShardRecord]],
    head: HeadIdentity | None,
    ranks: Ranks,
) -> str:
    ordered = {origin: [found[number] for number in sorted(found)] for origin, found in shards.items()}
    manifest = Manifest.of(identity, shards=ordered, head=head)
    with Together():
        if ranks.is_main:
            fault_point("cache:before_manifest", rank=ranks.rank, step=0)
            write_json(folder / MANIFEST_FILE, value=manifest.model_dump(mode="json"))
    return manifest.digest


@dataclass(frozen=True)
class ShardWriter:
    """The teacher with its codec; all ranks call the same methods in the same order."""

    folder: Path
    identity: Identity
    engine: FrozenEngine
    decoder: Decoder
    codec: AnyCodec
    ranks: Ranks

    def write_missing(
        self, samples: SampleStore, *, origin: Origin, shards: dict[int, ShardRecord], stop: StopSignal
    ) -> bool:
        """Write the shards that are not in `shards`, and add them to it. False: the ranks agreed to stop."""
        size, world = self.identity.shard_samples, self.ranks.world_size
        count = -(-len(samples) // size)
        missing = [number for number in range(count) if number not in shards]
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
    ) -> dict[int, dict[str, torch.Tensor]]:
        """Each sample's rows; as many forwards as the longest shard of the ranks needs."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        problem: TeacherError | None = None
        for place in range(max(gather_objects(len(batches)))):
            batch = batches[place] if place < len(batches) else self._filler(samples)
            batch = batch.to(device=device())
            outputs = self.engine(batch=batch)
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
            bad = _take(found, batches[place], rows={name: rows[name].cpu() for name in rows})
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

    def _write(
        self, rows: Mapping[int, Mapping[str, torch.Tensor]], *, samples: SampleStore, origin: Origin, number: int
    ) -> ShardRecord:
        ordered = [rows[sample] for sample in self._ids(samples, number=number).tolist()]
        tensors = {name: torch.cat([own[name] for own in ordered]) for name in self.codec.shapes}
        counts = [len(next(iter(own.values()))) for own in ordered]
        return write_shard(
            shard_path(self.folder, origin=origin, number=number),
            tensors=tensors,
            offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
            rank=self.ranks.rank,
            number=number,
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


def _take(found: dict[int, dict[str, torch.Tensor]], batch: Batch, *, rows: dict[str, torch.Tensor]) -> int | None:
    """Share a micro-batch's rows out to its samples; the first sample with something that is not a number."""
    finite_T = rows.pop("finite")
    labelled_BS = batch.labels_BS != IGNORE_LABEL
    start, bad = 0, None
    for place, row in enumerate(batch.segments):
        for segment in row:
            count = int(labelled_BS[place, segment.offset : segment.offset + segment.length].sum())
            span = slice(start, start + count)
            found[segment.sample_id] = {name: tensor[span] for name, tensor in rows.items()}
            if bad is None and not bool(finite_T[span].all()):
                bad = segment.sample_id
            start += count
    assert start == len(finite_T)
    return bad
