"""The builder: the only file that knows every room."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import disable_progress_bars

from largekd.config.checks import check_world
from largekd.config.data import SourceConfig
from largekd.config.placement import offload_device, read_placements
from largekd.config.run import RunConfig
from largekd.contracts import Batch, SignalRequest
from largekd.data.loader import RowLoader, RowSettings, evaluation_batches
from largekd.data.samples import LoadedSamples, load_samples
from largekd.distillation.model import DistillModel
from largekd.distillation.models import First, Sources, build_student, build_teacher, find_sources
from largekd.distillation.numerics import GradientWatch
from largekd.engine.ds_config import frozen_ds_config, train_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.engine.train import TrainEngine
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder
from largekd.objectives.terms import VocabularyTerm, build_terms, request_of
from largekd.objectives.vocabulary import VocabularyPass
from largekd.optim.groups import build_groups, describe_groups
from largekd.runtime.files import write_json
from largekd.runtime.ranks import MainFirst, Ranks, Together, require_same
from largekd.sharding.accelerator import device
from largekd.teachers.online import OnlineTeacher
from largekd.teachers.protocol import Teacher

logger = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.json"


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of, ready for its first step."""

    config: RunConfig
    ranks: Ranks
    device: torch.device
    sources: Sources
    student: Decoder
    engine: TrainEngine
    teacher: Teacher
    terms: tuple[VocabularyTerm, ...]
    request: SignalRequest
    watch: GradientWatch
    loader: RowLoader
    evaluation_batches: Callable[[], Iterator[Batch]] | None
    resumable: bool

    def close(self) -> None:
        """Take both engines down."""
        self.teacher.close()
        self.engine.close()


def build(config: RunConfig, *, ranks: Ranks, folder: Path, control: dist.ProcessGroup | None = None) -> Parts:
    """Build a run's parts, cheapest checks first. A collective call; `control` is for agreements that may take long.

    Errors: any LargeKDError; the message names the key to change.
    """
    accumulation = check_world(config, world_size=ranks.world_size)
    placements = read_placements(config)
    terms = build_terms(config.objective)

    def first() -> MainFirst:
        return MainFirst(ranks=ranks, group=control)

    sources = find_sources(config, first=first)
    loader, batches = _build_data(config, sources=sources, ranks=ranks, folder=folder, first=first)

    frozen = frozen_ds_config(placements.teacher, train=config.train, world_size=ranks.world_size)
    teacher_decoder = build_teacher(config, sources=sources, ds_config=frozen, ranks=ranks)
    teacher = OnlineTeacher(
        engine=FrozenEngine(module=teacher_decoder, ds_config=frozen),
        decoder=teacher_decoder,
        gather_head_once=config.teacher.gather_head == "step",
    )
    request = request_of(terms)
    teacher.check(request)

    trained = train_ds_config(
        placements.student,
        train=config.train,
        optim=config.optim,
        accumulation=accumulation,
        world_size=ranks.world_size,
    )
    student = build_student(config, sources=sources, ds_config=trained, ranks=ranks)
    with Together():
        if ranks.is_main:
            write_json(folder / "deepspeed.json", value={"teacher": frozen, "student": trained})
    return Parts(
        config=config,
        ranks=ranks,
        device=device(),
        sources=sources,
        student=student,
        engine=_build_engine(config, student=student, terms=terms, ds_config=trained, ranks=ranks),
        teacher=teacher,
        terms=terms,
        request=request,
        watch=GradientWatch(student=student, embedding=student.model.get_input_embeddings()),
        loader=loader,
        evaluation_batches=batches,
        # Restored by DeepSpeed without learning rate and moments, and without an error.
        resumable=offload_device(placements.student, "offload_optimizer") != "nvme",
    )


def _build_engine(
    config: RunConfig, *, student: Decoder, terms: tuple[VocabularyTerm, ...], ds_config: dict, ranks: Ranks
) -> TrainEngine:
    vocabulary = VocabularyPass(
        terms=terms,
        temperature=config.objective.temperature,
        chunk_tokens=config.objective.chunk_tokens,
        compile=config.objective.compile,
    )
    module = DistillModel(student=student, vocabulary=vocabulary)
    groups = build_groups(module.named_trainables(), config=config.optim)
    if ranks.is_main:
        logger.info("learning-rate groups:\n%s", describe_groups(groups))
    return TrainEngine(module=module, groups=groups, ds_config=ds_config)


def _build_data(
    config: RunConfig, *, sources: Sources, ranks: Ranks, folder: Path, first: First
) -> tuple[RowLoader, Callable[[], Iterator[Batch]] | None]:
    train, data = config.train, config.data

    def load(source: SourceConfig, key: str) -> LoadedSamples:
        return load_samples(
            source,
            tokenizer=sources.tokenizer,
            sequence_length=train.sequence_length,
            vocab_size=sources.shared_vocab_size,
            num_proc=data.num_proc,
            first=first,
            key=key,
        )

    if not ranks.is_main:
        disable_progress_bars()
    training = load(data.train, "data.train")
    held_out = load(data.eval, "data.eval") if data.eval is not None else None
    with Together():
        if ranks.is_main:
            _report_data(folder, training=training, held_out=held_out)
    for key, loaded in (("data.train", training), ("data.eval", held_out)):
        require_same(loaded.samples.fingerprint if loaded else "", what="data set", key=key)
    loader = RowLoader(
        training.samples,
        settings=RowSettings(
            sequence_length=train.sequence_length,
            packing=data.packing,
            global_batch_size=train.global_batch_size,
            seed=train.seed,
            shuffle=data.shuffle,
        ),
        micro_batch_size=train.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        max_steps=train.max_steps,
        max_epochs=train.max_epochs,
    )
    if loader.total_steps() <= config.optim.warmup_steps:
        raise ConfigError(
            f"optim.warmup_steps = {config.optim.warmup_steps}: the run has only {loader.total_steps()} steps; "
            "lower it or raise train.max_steps / train.max_epochs."
        )
    if held_out is None:
        return loader, None

    def batches() -> Iterator[Batch]:
        return evaluation_batches(
            held_out.samples,
            sequence_length=train.sequence_length,
            packing=data.packing,
            micro_batch_size=config.eval.micro_batch_size or train.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            max_rows=config.eval.max_rows,
        )

    return loader, batches


def _report_data(folder: Path, *, training: LoadedSamples, held_out: LoadedSamples | None) -> None:
    """Say what was read, and keep a list of the records that were set aside."""
    rows = []
    for name, loaded in (("data.train", training), ("data.eval", held_out)):
        if loaded is None:
            continue
        bad = loaded.quarantine.as_rows()
        rows += bad
        logger.info(
            "%s: %s samples, %s tokens, %d records set aside, %d conversations cut",
            name,
            f"{len(loaded.samples):,}",
            f"{loaded.samples.tokens:,}",
            len(bad),
            loaded.truncated,
        )
    if rows:
        write_json(folder / QUARANTINE_FILE, value=rows)
        logger.warning("%d unusable records were set aside, see %s", len(rows), folder / QUARANTINE_FILE)
