"""The caching job: walk both data sets with the sharded online teacher and store what the codec says per sample.

A shard is a range of sample ids. Its rows are packed of its own samples and its micro-batches are formed inside it, so
that its bytes depend on data, settings and teacher alone, not on ranks or restarts. What is missing is dealt to the
ranks in turn; a rank that runs out sends empty rows through the teacher, whose shards it helps to gather.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from largekd.config.cache import CacheConfig
from largekd.config.placement import read_placements
from largekd.config.render import render_config
from largekd.config.run import RunConfig
from largekd.config.staging import stages_to_cache
from largekd.config.teacher import OnlineTeacherConfig
from largekd.contracts import Origin, TapRequest
from largekd.distillation.cache_binding import codec_of, differences, identity_of
from largekd.distillation.cache_writer import ShardWriter
from largekd.distillation.data import build_data
from largekd.distillation.models import find_sources
from largekd.distillation.teachers import build_teacher_model
from largekd.engine.frozen import FrozenEngine
from largekd.errors import ConfigError, LargeKDError, TeacherError
from largekd.models.decoder import Decoder
from largekd.models.taps import attention_shape, check_layers, hidden_width
from largekd.runtime.faults import fault_point
from largekd.runtime.files import TEMPORARY_PREFIX, fsync_path, read_json, remove_tree, write_json
from largekd.runtime.lock import run_lock
from largekd.runtime.logging import configure_logging, write_line
from largekd.runtime.ranks import (
    MainFirst,
    Ranks,
    Together,
    current_ranks,
    forget_failure,
    gather_objects,
    main_failed_too,
    new_control_group,
    require_same,
)
from largekd.runtime.shutdown import StopSignal
from largekd.sharding.cluster import process_group
from largekd.teachers.cache_format import (
    JOB_FILE,
    MANIFEST_FILE,
    TEACHER_FOLDER,
    HeadIdentity,
    Identity,
    Manifest,
    ShardRecord,
    shard_path,
    verified_shard,
)
from largekd.teachers.cache_taps import StoredLayers, TapCodec, TapIdentity

logger = logging.getLogger(__name__)

_DAY_S = 86_400
# What a tokenizer and a configuration are made of; weights and remote code are not copied.
_TEACHER_FILES = ("config.json", "generation_config.json", "vocab.json", "merges.txt", "added_tokens.json")
_TEACHER_PATTERNS = ("*token*.json", "*.model", "*.jinja")


def cache_teacher(config: RunConfig, *, stage: str | None = None) -> str | None:
    """Make, or go on with, the cache at `config.cache.path`; returns its digest, None when it was told to stop.

    stage: of a run in stages, whose teacher and rows (None: the first's). The cache holds the layers that any stage
    with these rows compares.
    A collective call on every rank of the job. Errors: LargeKDError for everything that the user can mend.
    """
    with process_group(timeout_s=config.train.collective_timeout_s):
        ranks = current_ranks()
        configure_logging(level=config.log.level, rank=ranks.rank)
        forget_failure(ranks=ranks)
        try:
            config, *others = (served.config for served in stages_to_cache(config, name=stage))
            cache, teacher = _what_to_cache(config)
            folder = Path(cache.path).expanduser().absolute()
            with run_lock(folder, ranks=ranks, key="cache.path"), StopSignal() as stop:
                require_same(render_config(config), what="configuration", key="--config and its overrides")
                digest = _run(
                    config, others=others, cache=cache, teacher=teacher, folder=folder, ranks=ranks, stop=stop
                )
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
    others: Sequence[RunConfig],
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
        config,
        others=others,
        cache=cache,
        teacher=teacher,
        sources=sources,
        samples=data.samples,
        ranks=ranks,
        group=control,
    )
    with Together(group=control):
        if ranks.is_main:
            _prepare(folder, identity=identity, teacher=sources.teacher.path)
    shards = _verified(folder, identity=identity, ranks=ranks, group=control)
    model = build_teacher_model(config, sources=sources, placements=placements, ranks=ranks)
    assert model is not None and model.decoder is not None
    taps = _tap_codec(identity.taps, decoder=model.decoder)
    if taps is not None and ranks.is_main:
        logger.info("captured layers take %s bytes a position", f"{taps.position_bytes:,}")
    with ExitStack() as stack:
        engine = FrozenEngine(module=model.decoder, ds_config=model.ds_config)
        stack.callback(engine.close)
        configure_logging(level=config.log.level, rank=ranks.rank)
        writer = ShardWriter(
            folder=folder,
            identity=identity,
            engine=engine,
            decoder=model.decoder,
            codec=codec_of(identity),
            taps=taps,
            ranks=ranks,
        )
        for origin, samples in data.samples.items():
            if not writer.write_missing(samples, origin=origin, shards=shards[origin], stop=stop):
                return None
        head, layers = writer.write_head(), writer.stored_layers(data.samples["train"])
    return _finish(folder, identity=identity, shards=shards, head=head, layers=layers, ranks=ranks)


def _tap_codec(identity: TapIdentity | None, *, decoder: Decoder) -> TapCodec | None:
    """The codec of the layers that the objective compares. Errors: ConfigError for those that cannot be captured."""
    if identity is None:
        return None
    request = TapRequest(hidden=identity.hidden, attention=identity.attention)
    check_layers(request, model=decoder.model, key="objective, layers of the teacher")
    return TapCodec(
        identity.precision,
        width=hidden_width(decoder.model),
        hidden=identity.hidden,
        attention={layer: attention_shape(decoder.model, layer=layer) for layer in identity.attention},
    )


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
    layers: StoredLayers | None,
    ranks: Ranks,
) -> str:
    ordered = {origin: [found[number] for number in sorted(found)] for origin, found in shards.items()}
    manifest = Manifest.of(identity, shards=ordered, head=head, layers=layers)
    with Together():
        if ranks.is_main:
            fault_point("cache:before_manifest", rank=ranks.rank, step=0)
            write_json(folder / MANIFEST_FILE, value=manifest.model_dump(mode="json"))
    return manifest.digest
