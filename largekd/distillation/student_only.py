"""The student of a run before its first step, as a plain Hugging Face folder."""

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from largekd.checkpoint.export import write_export
from largekd.config.checks import check_world
from largekd.config.placement import read_placements
from largekd.config.render import render_config
from largekd.config.run import RunConfig
from largekd.config.staging import stages_of
from largekd.distillation.calibrate import Calibration
from largekd.distillation.data import RunData, build_data
from largekd.distillation.models import Sources, build_student, find_sources
from largekd.engine.ds_config import train_ds_config
from largekd.errors import ConfigError
from largekd.initialisation.report import REPORT_FILE, InitialisationReport
from largekd.models.build import DTYPES
from largekd.models.decoder import Decoder
from largekd.models.export import save_extras, stream_tensors
from largekd.runtime.logging import configure_logging, write_line
from largekd.runtime.ranks import MainFirst, Ranks, Together, current_ranks, require_same
from largekd.sharding.cluster import process_group


def write_student(config: RunConfig, *, output: str) -> Path:
    """Initialise the student that `config` describes and write it, without training, to the folder `output`.

    Beside weights, configuration and tokenizer stands initialisation.json: where every tensor came from. A collective
    call on every rank of the job. Errors: LargeKDError.
    """
    if config.student.initialise is None:
        raise ConfigError(
            "student.initialise is null: it says how the student's first weights are made of the teacher's; set it, "
            "for example student.initialise={}, with which the shapes choose the rules."
        )
    target = Path(output).expanduser().absolute()
    with process_group(timeout_s=config.train.collective_timeout_s):
        ranks = current_ranks()
        configure_logging(level=config.log.level, rank=ranks.rank)
        require_same(f"{render_config(config)}\n{target}", what="configuration", key="--config, --output and overrides")
        # Made before the first stage.
        _write(stages_of(config)[0].config, target=target, ranks=ranks)
        if ranks.is_main:
            write_line(f"{target}: the student before training, and {REPORT_FILE}")
    return target


def check_output(target: Path, *, sources: Sources) -> None:
    """Whether the student's folder may be written: a new one, an empty one, or one that holds an earlier student.

    Errors: ConfigError for a folder with anything else in it, one that is or holds a model that this job reads, and a
    place where no folder can be made.
    """
    for source in (sources.teacher, *([] if sources.student is None else [sources.student]), *sources.members):
        if source.path.resolve().is_relative_to(target.resolve()):
            raise ConfigError(
                f"--output = {target}: the model in {source.path} is read from there and would be deleted; name "
                "another folder."
            )
    filled = os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir()))
    if filled and not all((target / name).is_file() for name in (REPORT_FILE, "config.json")):
        raise ConfigError(
            f"--output = {target}: exists and is no student that was made here (it has no {REPORT_FILE} beside a "
            "config.json); nothing else is replaced. Name a new folder, or remove this one."
        )
    parent = next(folder for folder in target.parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ConfigError(f"--output = {target}: nothing can be written in {parent}; name another folder.")


def _write(config: RunConfig, *, target: Path, ranks: Ranks) -> None:
    placements = read_placements(config)
    ds_config = train_ds_config(
        placements.student,
        train=config.train,
        optim=config.optim,
        accumulation=check_world(config, world_size=ranks.world_size),
        world_size=ranks.world_size,
    )

    def first() -> MainFirst:
        return MainFirst(ranks=ranks)

    sources = find_sources(config, first=first)
    with Together():
        check_output(target, sources=sources)

    reports: list[InitialisationReport] = []
    with TemporaryDirectory() as scratch:

        @cache
        def data() -> RunData:
            return build_data(config, sources=sources, ranks=ranks, folder=Path(scratch), first=first)

        measures = Calibration(
            config,
            sources=sources,
            rows=lambda count: data().first_rows(count),
            placements=placements,
            decoder=None,
            ranks=ranks,
        )
        student = build_student(
            config, sources=sources, ds_config=ds_config, ranks=ranks, measures=measures, report_to=reports.append
        )
    _write_folder(config, student=student, sources=sources, report=reports[0], target=target, ranks=ranks)


def _write_folder(
    config: RunConfig,
    *,
    student: Decoder,
    sources: Sources,
    report: InitialisationReport,
    target: Path,
    ranks: Ranks,
) -> None:
    dtype = DTYPES[config.export.dtype or config.train.precision]

    def extras(pending: Path) -> None:
        save_extras(
            pending,
            model=student.model,
            dtype=dtype,
            tokenizer=sources.tokenizer,
            source=sources.tokenizer_folder,
        )
        report.write(pending)

    write_export(
        target,
        tensors=stream_tensors(student.model),
        max_shard_bytes=config.export.max_shard_bytes,
        save_extras=extras,
        ranks=ranks,
        dtype=dtype,
    )
