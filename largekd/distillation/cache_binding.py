"""What a cache is bound to: a run's teacher, data and rules, and opening a cache that was made of the same."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from largekd.config.cache import CacheConfig
from largekd.config.divergence import FullSignalConfig, TopKSignalConfig
from largekd.config.run import RunConfig
from largekd.config.schedule import CurveConfig
from largekd.config.teacher import CachedTeacherConfig, MixtureTeacherConfig, OnlineTeacherConfig
from largekd.contracts import Origin, TapRequest, VocabularyHead
from largekd.data.store import SampleStore
from largekd.data.templates import load_template
from largekd.data.vocabulary import load_tokenizer, tokenizer_fingerprint
from largekd.distillation.layers import compared_layers
from largekd.distillation.models import Sources, member_key
from largekd.distillation.origin import planned_layers
from largekd.errors import DataError, TeacherError
from largekd.models.build import DTYPES
from largekd.models.source import ModelFolder
from largekd.runtime.ranks import Ranks, Together, current_ranks, gather_objects
from largekd.sharding.accelerator import device, on_cpu
from largekd.sharding.stream import tensor_files
from largekd.teachers.cache_codec import AnyCodec, HiddenCodec, TopKCodec, build_codec
from largekd.teachers.cache_format import (
    FORMAT,
    HEAD_FILE,
    TEACHER_FOLDER,
    CacheReader,
    DataIdentity,
    Identity,
    Manifest,
    TeacherIdentity,
    check_shards,
    file_hash,
    read_manifest,
)
from largekd.teachers.cache_taps import StoredLayers, TapIdentity, check_taps
from largekd.teachers.cached import CachedTeacher

logger = logging.getLogger(__name__)


def identity_of(
    config: RunConfig,
    *,
    cache: CacheConfig,
    teacher: OnlineTeacherConfig,
    sources: Sources,
    samples: Mapping[Origin, SampleStore],
    ranks: Ranks,
    group: dist.ProcessGroup | None = None,
    others: Sequence[RunConfig] = (),
) -> Identity:
    """Everything that decides the bytes of the cache that this configuration asks for. A collective call.

    others: stages that read the same rows; their layers are stored too.
    """
    compared = (config, *others)
    folder = sources.teacher
    return Identity(
        format=FORMAT,
        codec=cache.codec,
        taps=None if cache.taps is None else _tap_identity(compared, precision=cache.taps.precision, sources=sources),
        teacher=TeacherIdentity(
            model=teacher.model,
            weights=weights_hash(folder, ranks=ranks, group=group),
            config=file_hash(folder.path / "config.json"),
            tokenizer=tokenizer_fingerprint(sources.teacher_tokenizer),
            vocab_size=folder.config.vocab_size,
            width=folder.config.hidden_size,
            precision=config.train.precision,
            attention=teacher.attention,
        ),
        data={
            origin: DataIdentity(
                fingerprint=store.text_fingerprint,
                chat_template=_template_hash(config, origin=origin, tokenizer=sources.tokenizer),
                samples=len(store),
            )
            for origin, store in samples.items()
        },
        sequence_length=config.train.sequence_length,
        packing=config.data.packing,
        micro_batch_size=config.train.micro_batch_size,
        shard_samples=cache.shard_samples,
    )


def _tap_identity(
    configs: Sequence[RunConfig], *, precision: Literal["bf16", "fp32"], sources: Sources
) -> TapIdentity | None:
    """What the objectives compare of the teacher. None: nothing. Errors: ConfigError for maps that are measured."""
    found = [request for config in configs for request in _compared(config, sources=sources).values()]
    hidden, attention = ({layer for r in found for layer in getattr(r, kind)} for kind in ("hidden", "attention"))
    if not hidden and not attention:
        return None
    return TapIdentity(precision=precision, hidden=tuple(sorted(hidden)), attention=tuple(sorted(attention)))


def _compared(config: RunConfig, *, sources: Sources) -> dict[str, TapRequest]:
    shapes = {"teacher": sources.teacher.config, "student": sources.student_config}
    return compared_layers(
        config,
        kept=planned_layers(config, **shapes),
        student_depth=sources.student_config.num_hidden_layers,
        teacher_depth=sources.teacher.config.num_hidden_layers,
    )


def stored_layers(config: RunConfig) -> StoredLayers | None:
    """The teacher's layers in the cache of a run that `check_teacher_data` has passed; None: there are none."""
    teacher, key = config.teacher, "teacher"
    if isinstance(teacher, MixtureTeacherConfig):
        teacher, key = teacher.members[0].teacher, member_key(0)
    if not isinstance(teacher, CachedTeacherConfig):
        return None
    return read_manifest(Path(teacher.path).expanduser(), key=f"{key}.path").layers


def weights_hash(folder: ModelFolder, *, ranks: Ranks, group: dist.ProcessGroup | None = None) -> str:
    """SHA-256 over names and hashes of a model's safetensors files, which the ranks share out. A collective call."""
    own: dict[str, str] = {}
    with Together(group=group):
        files = sorted(set(tensor_files(folder.path).values()))
        logger.info("hashing %d weight files of %s", len(files), folder.path)
        own = {path.name: file_hash(path) for path in files[ranks.rank :: ranks.world_size]}
    found = {name: digest for part in gather_objects(own, group=group) for name, digest in part.items()}
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def check_teacher_data(config: RunConfig, *, sources: Sources, samples: Mapping[Origin, SampleStore]) -> None:
    """Refuse a cache that was made of something else, lacks shards, or holds less of tokens and layers than the
    objective reads; a collective call.

    It comes before any weight is loaded; what it lets pass is only opened later.
    Errors: TeacherError or DataError naming what differs.
    """
    caches = list(_caches(config, sources=sources))
    if not caches:
        return
    ranks = current_ranks()
    with Together():
        for cache in caches:
            manifest = read_manifest(cache.folder, key=f"{cache.key}.path")
            check_binding(manifest, cache=cache, config=config, sources=sources, samples=samples)
            codec = codec_of(manifest.identity)
            if cache.is_member:
                _check_member(codec, key=cache.key)
            check_objective_fits(config, codec=codec)
            # Of several teachers the first one's layers are compared.
            for key, request in _compared(config, sources=sources).items() if cache.is_first else ():
                check_taps(request, layers=manifest.layers, key=f"{key}.layers")
            # A rank that found this out in the middle of a step would leave the others waiting.
            check_shards(cache.folder, manifest=manifest, origins=samples, token_bytes=codec.token_bytes, ranks=ranks)


@dataclass(frozen=True)
class _Cache:
    """A cache of a run: where the configuration names it, and the model with the tokenizer of its teacher."""

    key: str
    folder: Path
    model: ModelFolder
    is_member: bool = False
    is_first: bool = True


def _caches(config: RunConfig, *, sources: Sources) -> Iterator[_Cache]:
    """All caches that a run reads."""
    match config.teacher:
        case CachedTeacherConfig(path=path):
            yield _Cache("teacher", Path(path).expanduser(), sources.teacher)
        case MixtureTeacherConfig(members=members):
            for index, (member, model) in enumerate(zip(members, sources.members, strict=True)):
                if isinstance(member.teacher, CachedTeacherConfig):
                    folder = Path(member.teacher.path).expanduser()
                    yield _Cache(member_key(index), folder, model, is_member=True, is_first=index == 0)


def _check_member(codec: AnyCodec, *, key: str) -> None:
    if not isinstance(codec, HiddenCodec):
        raise TeacherError(
            f"{key}.path: a mixture needs its teachers' whole distributions, and this cache holds a few ids of each "
            "token; make it with cache.codec.kind=hidden."
        )


def open_cached_teacher(
    teacher: CachedTeacherConfig,
    *,
    model: ModelFolder,
    config: RunConfig,
    shared_ids: int,
    ranks: Ranks,
    key: str = "teacher",
) -> CachedTeacher:
    """The cached teacher of a run that `check_teacher_data` has passed. A collective call.

    model: the folder that `teacher.model` names. shared_ids: ids that student and teachers have. key: of `teacher` in
    the configuration.
    Errors: TeacherError when `teacher.model` is not the model that was cached, or the cache's head is damaged.
    """
    folder = Path(teacher.path).expanduser()
    with Together():
        manifest = read_manifest(folder, key=f"{key}.path")
    if teacher.model is not None:
        found = weights_hash(model, ranks=ranks)
        if found != manifest.identity.teacher.weights:
            raise TeacherError(
                f"{key}.model = {teacher.model!r} has other weights (SHA-256 {found[:12]}…) than the teacher of "
                f"{folder}, {manifest.identity.teacher.model!r} ({manifest.identity.teacher.weights[:12]}…); choose "
                f"that model, or another {key}.path."
            )
    with Together():
        head = _read_head(folder, manifest=manifest)
    signal = config.objective.signal
    return CachedTeacher(
        reader=CacheReader(folder, manifest=manifest, pin=not on_cpu()),
        codec=codec_of(manifest.identity),
        head=head,
        shared_ids=shared_ids,
        reads_tail=not (isinstance(signal, TopKSignalConfig) and signal.tail == "renormalise"),
        rank=ranks.rank,
        layers=manifest.layers,
    )


def codec_of(identity: Identity) -> AnyCodec:
    """How this cache's tokens become bytes."""
    teacher = identity.teacher
    return build_codec(
        identity.codec, vocab_size=teacher.vocab_size, width=teacher.width, dtype=DTYPES[teacher.precision]
    )


def check_binding(
    manifest: Manifest,
    *,
    cache: _Cache,
    config: RunConfig,
    sources: Sources,
    samples: Mapping[Origin, SampleStore],
) -> None:
    """Errors: TeacherError for another tokenizer or translation; DataError for other data, template or length."""
    identity, folder, model = manifest.identity, cache.folder, cache.model
    if sources.student_of_teacher is not None:
        raise TeacherError(
            "objective.translation: a cache holds the teacher's answers in its own tokens alone; use teacher.kind "
            "online."
        )
    tokenizer = sources.teacher_tokenizer
    if not cache.is_first:
        tokenizer = load_tokenizer(str(model.path), trust_remote_code=model.trust_remote_code, key=cache.key)
    if tokenizer_fingerprint(tokenizer) != identity.teacher.tokenizer:
        raise TeacherError(
            f"the tokenizer of {model.path} is not the one that the cache {folder} was made with; restore "
            "it, or make the cache again."
        )
    if config.train.sequence_length != identity.sequence_length:
        raise DataError(
            f"train.sequence_length = {config.train.sequence_length}: the cache {folder} was made with "
            f"{identity.sequence_length}, and texts are cut accordingly; set it so, or make another cache."
        )
    for origin, store in samples.items():
        cached = identity.data.get(origin)
        if cached is None:
            raise DataError(
                f"data.{origin}: the cache {folder} holds nothing of it; take data.{origin} out, or make a cache "
                "with it."
            )
        if cached.fingerprint == store.text_fingerprint:
            continue
        # Text that a template does not change is the same text.
        if cached.chat_template != _template_hash(config, origin=origin, tokenizer=sources.tokenizer):
            raise DataError(
                f"data.{origin}: the chat template is not the one that the cache {folder} was made with, and gives "
                f"other samples; restore data.{origin}.chat_template or the tokenizer's own, or make another cache."
            )
        raise DataError(
            f"data.{origin}: these are not the samples of the cache {folder}: it has {cached.samples} with fingerprint "
            f"{cached.fingerprint[:12]}…, these are {len(store)} with {store.text_fingerprint[:12]}…; restore the data "
            "and loss_on, or make another cache."
        )


def check_objective_fits(config: RunConfig, *, codec: AnyCodec) -> None:
    """Errors: TeacherError for an objective that reads more of the teacher than is stored at any step."""
    objective = config.objective
    if isinstance(codec, HiddenCodec) or not _distils(config):
        return
    stored = "top_k" if isinstance(codec, TopKCodec) else "sampled"
    if isinstance(objective.signal, FullSignalConfig):
        raise TeacherError(
            f"objective.signal.kind = 'full': the cache holds {stored!r}; set objective.signal.kind to {stored!r}, or "
            "make the cache with cache.codec.kind=hidden."
        )
    renormalised = isinstance(objective.signal, TopKSignalConfig) and objective.signal.tail == "renormalise"
    if isinstance(objective.temperature, CurveConfig) and not renormalised:
        raise TeacherError(
            "objective.temperature is a curve: a cache knows the mass of the other ids at a few temperatures only; "
            "give a number, objective.signal.tail=renormalise, or make the cache with cache.codec.kind=hidden."
        )


def _distils(config: RunConfig) -> bool:
    alpha = config.objective.alpha
    return isinstance(alpha, CurveConfig) or alpha > 0


def differences(old: object, new: object, *, key: str = "") -> Iterator[str]:
    """Keys at which two nested mappings differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            yield from differences(old.get(name), new.get(name), key=f"{key}.{name}" if key else name)
    elif old != new:
        yield f"{key} was {old!r}, is {new!r}"


def _template_hash(config: RunConfig, *, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> str | None:
    data = config.data
    sources = data.training_sources if origin == "train" else (("data.eval", data.eval),)
    templates = []
    for key, source in sources:
        assert source is not None
        templates.append(load_template(tokenizer, path=source.chat_template, key=key))
    if all(template == templates[0] for template in templates):
        return None if templates[0] is None else hashlib.sha256(templates[0].encode()).hexdigest()
    return hashlib.sha256(json.dumps(templates).encode()).hexdigest()


def _read_head(folder: Path, *, manifest: Manifest) -> VocabularyHead | None:
    """The stored vocabulary head on this rank's device. Errors: TeacherError when it is not whole."""
    spec = manifest.head
    if spec is None:
        return None
    path = folder / TEACHER_FOLDER / HEAD_FILE
    try:
        if file_hash(path) != spec.sha256:
            raise TeacherError(f"{path}: its checksum is not that of manifest.json; make the cache again.")
        tensors = {name: tensor.to(device()) for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"{path}: the teacher's head cannot be read ({error}); make the cache again.") from error
    return VocabularyHead(
        weight_VD=tensors["weight"],
        vocab_size=spec.vocab_size,
        bias_V=tensors.get("bias"),
        scale=spec.scale,
        softcap=spec.softcap,
    )
