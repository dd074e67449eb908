"""The data of a run: read, tokenized, checked on all ranks, and given out."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets import disable_progress_bars

from largekd.config.data import SourceConfig
from largekd.config.run import RunConfig
from largekd.config.teacher import MixtureTeacherConfig, RoutedWeightsConfig
from largekd.contracts import Batch, Origin
from largekd.data.loader import RowLoader, RowSettings, evaluation_batches
from largekd.data.samples import LoadedSamples, Routing, load_samples
from largekd.data.spans import alignment_report
from largekd.data.store import SampleStore
from largekd.data.vocabulary import describe_mapping
from largekd.distillation.models import First, Sources
from largekd.errors import ConfigError, DataError
from largekd.runtime.files import write_json
from largekd.runtime.ranks import Ranks, Together, require_same

logger = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.json"


@dataclass(frozen=True)
class RunData:
    """The training steps, the held-out batches (None: there are no held-out data), and a look at the first rows.
    `samples`: both data sets by the origin of their batches."""

    loader: RowLoader
    evaluation_batches: Callable[[], Iterator[Batch]] | None
    first_rows: Callable[[int], Iterator[Batch]]
    samples: Mapping[Origin, SampleStore]


def build_data(
    config: RunConfig, *, sources: Sources, ranks: Ranks, folder: Path, first: First, row_seed: int | None = None
) -> RunData:
    """Read, tokenize and check both data sets. A collective call. Errors: DataError, ConfigError.

    row_seed: decides the order of the rows; None: train.seed.
    """
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
            teacher_tokenizer=sources.teacher_tokenizer if sources.student_of_teacher is not None else None,
            teacher_vocab_size=sources.teacher.config.vocab_size if sources.student_of_teacher is not None else None,
            routing=_routing(config),
        )

    if not ranks.is_main:
        disable_progress_bars()
    training = load(data.train, "data.train")
    _check_routed(config, training=training)
    held_out = load(data.eval, "data.eval") if data.eval is not None else None
    with Together():
        if ranks.is_main:
            _report_data(folder, training=training, held_out=held_out)
    for key, loaded in (("data.train", training), ("data.eval", held_out)):
        require_same(loaded.samples.fingerprint if loaded else "", what="data set", key=key)
    if sources.student_of_teacher is not None:
        _check_translation(sources, training=training, held_out=held_out, is_main=ranks.is_main)
    loader = RowLoader(
        training.samples,
        settings=RowSettings(
            sequence_length=train.sequence_length,
            packing=data.packing,
            global_batch_size=train.global_batch_size,
            seed=train.seed if row_seed is None else row_seed,
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

    def walk(loaded: LoadedSamples, *, micro_batch_size: int, max_rows: int | None, origin: Origin) -> Iterator[Batch]:
        return evaluation_batches(
            loaded.samples,
            sequence_length=train.sequence_length,
            packing=data.packing,
            micro_batch_size=micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            max_rows=max_rows,
            origin=origin,
        )

    def first_rows(count: int) -> Iterator[Batch]:
        return walk(training, micro_batch_size=train.micro_batch_size, max_rows=count, origin="train")

    if held_out is None:
        return RunData(loader, None, first_rows, {"train": training.samples})

    def held_out_batches() -> Iterator[Batch]:
        size = config.eval.micro_batch_size or train.micro_batch_size
        return walk(held_out, micro_batch_size=size, max_rows=config.eval.max_rows, origin="eval")

    return RunData(loader, held_out_batches, first_rows, {"train": training.samples, "eval": held_out.samples})


def _routing(config: RunConfig) -> Routing | None:
    """How records name their teacher; None where they do not."""
    teacher = config.teacher
    if not isinstance(teacher, MixtureTeacherConfig) or not isinstance(teacher.weighting, RoutedWeightsConfig):
        return None
    return Routing(teacher.weighting.field, tuple(member.name for member in teacher.members))


def _check_routed(config: RunConfig, *, training: LoadedSamples) -> None:
    """Errors: DataError where no record names a teacher, which a misspelt column looks like."""
    routing, teachers = _routing(config), training.samples.teachers
    if routing is not None and (teachers is None or not (teachers >= 0).any()):
        raise DataError(
            f"teacher.weighting.field = {routing.field!r}: no record of data.train ({config.data.train.path}) names a "
            f"teacher in that column; the names are {', '.join(map(repr, routing.names))}."
        )


def _check_translation(
    sources: Sources, *, training: LoadedSamples, held_out: LoadedSamples | None, is_main: bool
) -> None:
    """Say how much of the text both tokenizers share. Errors: DataError for a sample that the teacher cannot hold."""
    samples, mapping = training.samples, sources.student_of_teacher
    assert mapping is not None
    limit = getattr(sources.teacher.config, "max_position_embeddings", None)
    for key, loaded in (("data.train", training), ("data.eval", held_out)):
        longest = int(loaded.samples.teacher_lengths.max()) if loaded is not None else 0
        if limit is not None and longest > limit:
            raise DataError(
                f"{key}: a sample has {longest} tokens for the teacher, which has {limit} positions "
                "(max_position_embeddings); lower train.sequence_length or choose another teacher.model."
            )
    if is_main:
        logger.info("%s", describe_mapping(mapping.numpy(), student_vocab_size=sources.student_config.vocab_size))
        logger.info("data.train: %s", alignment_report(samples, tokenizer=sources.tokenizer))


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
