"""A generation job from its configuration to its training data."""

import logging
from collections import Counter
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from largekd.config.generate import EmbeddedBackendConfig, EndpointBackendConfig, GenerateConfig, VllmBackendConfig
from largekd.config.render import render_config
from largekd.curation.answer_shards import RAW_FOLDER, read_answers
from largekd.curation.pipeline import check_settings
from largekd.distillation.folder import move_aside
from largekd.errors import LargeKDError
from largekd.factory.asks import Asker
from largekd.factory.backends import Backend
from largekd.factory.identity import claim, identity_of
from largekd.factory.job import Job
from largekd.factory.judge import try_template
from largekd.factory.judged_data import curate_job, keys_to_judge
from largekd.factory.judging import judge_answers
from largekd.factory.plan import plan
from largekd.runtime.lock import run_lock
from largekd.runtime.logging import configure_logging, write_line
from largekd.runtime.ranks import (
    MainFirst,
    Ranks,
    Together,
    broadcast_object,
    current_ranks,
    forget_failure,
    main_failed_too,
    new_control_group,
    require_same,
)
from largekd.runtime.shutdown import StopSignal
from largekd.sharding.cluster import process_group

logger = logging.getLogger(__name__)

_MONTH_S = 30 * 86_400


def generate(config: GenerateConfig, *, curate: bool = True) -> dict[str, Any] | None:
    """Write what is missing in `config.output.dir`, then make training data of it; returns a summary, None when it was
    told to stop. curate: False leaves the second part to tools/curate.py.

    A collective call on every rank of the job. Errors: LargeKDError for everything that the user can mend.
    """
    with process_group(timeout_s=config.collective_timeout_s):
        ranks = current_ranks()
        configure_logging(level=config.log.level, rank=ranks.rank)
        forget_failure(ranks=ranks)
        folder = Path(config.output.dir).expanduser().absolute()
        try:
            with run_lock(folder, ranks=ranks, key="output.dir"), StopSignal() as stop:
                require_same(render_config(config), what="configuration", key="--config and its overrides")
                summary = _run(config, folder=folder, ranks=ranks, stop=stop, curate=curate)
        except LargeKDError as error:
            error.only_here = not main_failed_too(ranks=ranks)
            raise
        if ranks.is_main:
            write_line(f"{folder}: {_told(summary)}.")
        return summary


def _run(
    config: GenerateConfig, *, folder: Path, ranks: Ranks, stop: StopSignal, curate: bool
) -> dict[str, Any] | None:
    group = new_control_group(timeout_s=_MONTH_S)
    asker = Asker(config.prompts, config.sampling)
    with Together(group=group):
        asker.digests()
        if config.judge is not None:
            try_template(config.judge)
        if ranks.is_main:
            _warn_of_repeats(config)
            if curate or config.judge is not None:
                check_settings(config.curation)
            if config.output.fresh:
                move_aside(folder, key="output.fresh")
    if not _write(config, asker=asker, folder=folder, ranks=ranks, stop=stop, group=group):
        return None
    if config.judge is not None and not _judge(config, folder=folder, ranks=ranks, stop=stop, group=group):
        return None
    summary: dict[str, Any] = {}
    with Together(group=group):
        if ranks.is_main:
            finishes = Counter(written.finish for _, written in read_answers(folder / RAW_FOLDER))
            summary = {"folder": str(folder), "answers": finishes.total(), "failed": finishes["failed"]}
            if curate:
                summary["curation"] = curate_job(folder, config=config.curation, judge=config.judge)
    return dict(broadcast_object(summary, group=group))


def _warn_of_repeats(config: GenerateConfig) -> None:
    """Several samples at temperature 0 cost as many answers and are one."""
    given = {"sampling": config.sampling, "judge": None if config.judge is None else config.judge.sampling}
    for key, sampling in given.items():
        if sampling is not None and sampling.samples > 1 and not any(sampling.temperatures or (sampling.temperature,)):
            logger.warning("%s.samples = %d at temperature 0: all will be alike", key, sampling.samples)


def _write(
    config: GenerateConfig,
    *,
    asker: Asker,
    folder: Path,
    ranks: Ranks,
    stop: StopSignal,
    group: dist.ProcessGroup | None,
) -> bool:
    """Whether all answers are there; False: told to stop."""
    backend = build_backend(config, folder=folder, ranks=ranks, group=group)
    with closing(backend) if backend is not None else nullcontext():
        with Together(group=group):
            if ranks.is_main:
                assert backend is not None
                claim(folder, config=config, identity=identity_of(config, asker=asker, writer=backend.identity))
        job = Job(config=config, folder=folder, backend=backend, ranks=ranks, stop=stop, group=group)
        return job.run(plan(config, asker=asker))


def _judge(
    config: GenerateConfig, *, folder: Path, ranks: Ranks, stop: StopSignal, group: dist.ProcessGroup | None
) -> bool:
    """Whether all answers that the judge is to see are judged; False: told to stop."""
    judge = config.judge
    assert judge is not None
    return judge_answers(
        config,
        folder=folder,
        find_open=lambda: keys_to_judge(folder, config=config.curation, judge=judge),
        build=lambda own, place: build_backend(own, folder=place, ranks=ranks, group=group),
        ranks=ranks,
        stop=stop,
        group=group,
    )


def _told(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "stopped; the same command goes on with it"
    failed = summary["failed"]
    again = f", {failed} of them failed (output.retry_failed=true asks for these again)" if failed else ""
    return f"{summary['answers']} answers{again}"


def build_backend(
    config: GenerateConfig, *, folder: Path, ranks: Ranks, group: dist.ProcessGroup | None = None
) -> Backend | None:
    """What writes; None on a rank that does not. A collective call. Errors: LargeKDError."""

    def first() -> AbstractContextManager[None]:
        return MainFirst(ranks=ranks, group=group)

    if isinstance(config.backend, EmbeddedBackendConfig):
        from largekd.factory.embedded import EmbeddedBackend

        return EmbeddedBackend(
            config.backend, sampling=config.sampling, folder=folder, ranks=ranks, first=first, group=group
        )
    backend: Backend | None = None
    with Together(group=group):
        if ranks.is_main:
            backend = _of_main(config, folder=folder)
    return backend


def _of_main(config: GenerateConfig, *, folder: Path) -> Backend:
    """A server's client, or vLLM: the job's only writer."""
    backend: Any
    if isinstance(config.backend, EndpointBackendConfig):
        from largekd.factory.endpoint import EndpointBackend

        backend = EndpointBackend(config.backend, sampling=config.sampling, folder=folder)
    else:
        from largekd.factory.vllm_backend import VllmBackend

        assert isinstance(config.backend, VllmBackendConfig)
        backend = VllmBackend(config.backend, sampling=config.sampling)
    found: Backend = backend
    return found
