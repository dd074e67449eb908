"""The data of a run: read, tokenized, checked on all ranks, and given out."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import disable_progress_bars

from largekd.config.data import SourceConfig
from largekd.config.run import RunConfig
from largekd.config.teacher import MixtureTeacherConfig, RoutedWeightsConfig
from largekd.contracts import Batch, Origin
from largekd.data.loader import RowLoader, RowSettings, evaluation_batches
from largekd.data.mixture import Mixture, make_mixture
from largekd.data.samples import LoadedSamples, Routing, load_samples
from largekd.data.spans import alignment_report
from largekd.data.store import SampleStore, joined
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
    `samples`: training and held-out data by the origin of their batches."""

    loader: RowLoader
    evaluation_batches: Callable[[], Iterator[Batch]] | None
    first_rows: Callable[[int], Iterator[Batch]]
    samples: Mapping[Origin, SampleStore]


def build_data(
    config: RunConfig, *, sources: Sources, ranks: Ranks, folder: Path, first: First, row_seed: int | None = None
) -> RunData:
    """Read, tokenize and check all data sets. A collective call. Errors: DataError, ConfigError.

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
    loaded_of_key = {key: load(source, key) for key, source in data.training_sources}
    training = joined([loaded.samples for loaded in loaded_of_key.values()])
    _check_routed(config, training=training)
    held_out = None
    if data.eval is not None:
        loaded_of_key["data.eval"] = load(data.eval, "data.eval")
        held_out = loaded_of_key["data.eval"].samples
    mixture = _mixture(config, sizes=[len(loaded_of_key[key].samples) for key, _ in data.training_sources])
    with Together():
        if ranks.is_main:
            _report_data(folder, loaded_of_key=loaded_of_key, mixture=mixture)
    for key, samples in (("data.train", training), ("data.eval", held_out)):
        require_same(samples.fingerprint if samples else "", what="data set", key=key)
    if sources.student_of_teacher is not None:
        _check_translation(sources, training=training, held_out=held_out, is_main=ranks.is_main)
    loader = _row_loader(config, samples=training, mixture=mixture, ranks=ranks, row_seed=row_seed)
    walk = partial(
        evaluation_batches,
        sequence_length=train.sequence_length,
        packing=data.packing,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )

    def first_rows(count: int) -> Iterator[Batch]:
        return walk(training, micro_batch_size=train.micro_batch_size, max_rows=count, origin="train")

    if held_out is None:
        return RunData(loader, None, first_rows, {"train": training})
    size = config.eval.micro_batch_size or train.micro_batch_size
    held_out_batches = partial(walk, held_out, micro_batch_size=size, max_rows=config.eval.max_rows, origin="eval")
    return RunData(loader, held_out_batches, first_rows, {"train": training, "eval": held_out})


def _row_loader(
    config: RunConfig, *, samples: SampleStore, mixture: Mixture | None, ranks: Ranks, row_seed: int | None
) -> RowLoader:
    """The training steps. Errors: ConfigError for a warm-up that is longer than the run."""
    train = config.train
    loader = RowLoader(
        samples,
        settings=RowSettings(
            sequence_length=train.sequence_length,
            packing=config.data.packing,
            global_batch_size=train.global_batch_size,
            seed=train.seed if row_seed is None else row_seed,
            shuffle=config.data.shuffle,
        ),
        micro_batch_size=train.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        max_steps=train.max_steps,
        max_epochs=train.max_epochs,
        mixture=mixture,
    )
    if loader.total_steps() <= config.optim.warmup_steps:
        raise ConfigError(
            f"optim.warmup_steps = {config.optim.warmup_steps}: the run has only {loader.total_steps()} steps; "
            "lower it or raise train.max_steps / train.max_epochs."
        )
    return loader


def _routing(config: RunConfig) -> Routing | None:
    """How records name their teacher; None where they do not."""
    teacher = config.teacher
    if not isinstance(teacher, MixtureTeacherConfig) or not isinstance(teacher.weighting, RoutedWeightsConfig):
        return None
    return Routing(teacher.weighting.field, tuple(member.name for member in teacher.members))


def _mixture(config: RunConfig, *, sizes: Sequence[int]) -> Mixture | None:
    """How training sets are mixed; None where there is one. Errors: ConfigError."""
    mixture = config.data.mixture
    if mixture is None:
        return None
    return make_mixture(sizes, shares=mixture.shares, temperature=mixture.temperature)


def _check_routed(config: RunConfig, *, training: SampleStore) -> None:
    """Errors: DataError where no record names a teacher, which a misspelt column looks like."""
    routing, teachers = _routing(config), training.teachers
    if routing is not None and (teachers is None or not (teachers >= 0).any()):
        raise DataError(
            f"teacher.weighting.field = {routing.field!r}: no record of data.train ({config.data.train.path}) names a "
            f"teacher in that column; the names are {', '.join(map(repr, routing.names))}."
        )


def _check_translation(sources: Sources, *, training: SampleStore, held_out: SampleStore | None, is_main: bool) -> None:
    """Say how much of the text both tokenizers share. Errors: DataError for a sample that the teacher cannot hold."""
    mapping = sources.student_of_teacher
    assert mapping is not None
    limit = getattr(sources.teacher.config, "max_position_embeddings", None)
    for key, samples in (("data.train", training), ("data.eval", held_out)):
        longest = int(samples.teacher_lengths.max()) if samples is not None else 0
        if limit is not None and longest > limit:
            raise DataError(
                f"{key}: a sample has {longest} tokens for the teacher, which has {limit} positions "
                "(max_position_embeddings); lower train.sequence_length or choose another teacher.model."
            )
    if is_main:
        logger.info("%s", describe_mapping(mapping.numpy(), student_vocab_size=sources.student_config.vocab_size))
        logger.info("data.train: %s", alignment_report(training, tokenizer=sources.tokenizer))


def _report_data(folder: Path, *, loaded_of_key: Mapping[str, LoadedSamples], mixture: Mixture | None) -> None:
    """Say what was read, and keep a list of the records that were set aside."""
    rows = []
    for place, (key, loaded) in enumerate(loaded_of_key.items()):
        bad = loaded.quarantine.as_rows()
        rows += bad
        logger.info(
            "%s: %s samples, %s tokens, %d records set aside, %d conversations cut",
            key,
            f"{len(loaded.samples):,}",
            f"{loaded.samples.tokens:,}",
            len(bad),
            loaded.truncated,
        )
        if mixture is not None and place < len(mixture.counts):
            logger.info("%s: %s samples in every epoch", key, f"{mixture.counts[place]:,}")
    if rows:
        write_json(folder / QUARANTINE_FILE, value=rows)
        logger.warning("%d unusable records were set aside, see %s", len(rows), folder / QUARANTINE_FILE)
