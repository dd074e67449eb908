"""The job in which answers are judged, over all ranks."""

from collections.abc import Callable, Collection
from contextlib import closing, nullcontext
from pathlib import Path

import torch.distributed as dist

from largekd.config.generate import GenerateConfig
from largekd.curation.answer_shards import RAW_FOLDER, read_answers
from largekd.errors import ConfigError, DataError
from largekd.factory.backends import Backend
from largekd.factory.identity import JOB_FILE, differences
from largekd.factory.job import Job
from largekd.factory.judge import JUDGE_FOLDER, JudgeStage, judge_asks
from largekd.factory.plan import Plan
from largekd.runtime.files import read_json, write_json
from largekd.runtime.ranks import Ranks, Together, broadcast_object
from largekd.runtime.shutdown import StopSignal

BuildBackend = Callable[[GenerateConfig, Path], Backend | None]
"""build(config, folder): what writes on this rank, as of `factory.run.build_backend`. A collective call."""


def judge_answers(
    config: GenerateConfig,
    *,
    folder: Path,
    find_open: Callable[[], Collection[str]],
    build: BuildBackend,
    ranks: Ranks,
    stop: StopSignal,
    group: dist.ProcessGroup | None = None,
) -> bool:
    """Whether all are judged, for `judge.stored_verdicts` to read; False when it was told to stop, and then the same
    command goes on.

    find_open: the keys of the answers that are to be judged, see `judge.open_keys`; called on rank 0 alone, for it may
    run programs. A collective call. Errors: LargeKDError, on all ranks.
    """
    assert config.judge is not None
    own, judges = folder / JUDGE_FOLDER, judges_config(config)
    keys: list[str] = []
    with Together(group=group):
        if ranks.is_main:
            own.mkdir(parents=True, exist_ok=True)
            keys = sorted(find_open())
    keys = list(broadcast_object(keys, group=group))
    with Together(group=group):
        asks = judge_asks(read_answers(folder / RAW_FOLDER), keys=keys, config=config.judge)
    backend = build(judges, own)
    with closing(backend) if backend is not None else nullcontext():
        with Together(group=group):
            if ranks.is_main:
                assert backend is not None
                _claim(own, writer=backend)
        job = Job(config=judges, folder=folder, backend=backend, ranks=ranks, stop=stop, group=group)
        return job.run(_plan(JudgeStage("judge", asks, is_last=True)))


def judges_config(config: GenerateConfig) -> GenerateConfig:
    """The configuration of the second job: the judge's backend and draws, everything else as it is."""
    assert config.judge is not None
    return config.model_copy(
        update={"backend": config.judge.backend or config.backend, "sampling": config.judge.sampling}
    )


def _plan(stage: JudgeStage) -> Plan:
    yield stage


def _claim(folder: Path, *, writer: Backend) -> None:
    """Make the folder this judge's. Errors: ConfigError naming what differs from the one whose verdicts it holds."""
    path = folder / JOB_FILE
    identity = {"writer": writer.identity}
    if path.is_file():
        try:
            found = list(differences(read_json(path)["identity"], identity))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); move {folder} aside to judge anew.") from error
        if found:
            raise ConfigError(
                f"{folder} holds verdicts of another judge (old -> new):\n  "
                + "\n  ".join(found)
                + "\nRestore judge.backend to go on with it, or move that folder aside to judge anew; answers stay."
            )
    write_json(path, value={"identity": identity})
