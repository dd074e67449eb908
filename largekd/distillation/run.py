"""One run from its configuration to its exported student: the whole pipeline, in order."""

import functools
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from largekd.checkpoint.commit import CheckpointStore
from largekd.checkpoint.manifest import read_manifest
from largekd.checkpoint.state import JsonOwner, RandomOwner, StateOwner, load_state, save_state
from largekd.config.render import render_config
from largekd.config.run import RunConfig
from largekd.contracts import Batch
from largekd.distillation.builder import Parts, build
from largekd.distillation.folder import CHECKPOINT_FOLDER, mark_done, open_folder
from largekd.distillation.journal import Journal
from largekd.distillation.loop import Session, evaluate_now, run_steps
from largekd.distillation.output import export_student, write_summary
from largekd.distillation.phases import Phase
from largekd.distillation.prepared import Beginning, Inherited, Prepared
from largekd.distillation.remote import Surroundings
from largekd.distillation.stages import hand_over, phase_of, prepare_stages, stage_folder
from largekd.engine.carried import frozen_digest
from largekd.errors import CheckpointError, LargeKDError
from largekd.monitoring.meters import Meters
from largekd.monitoring.monitor import Monitor
from largekd.monitoring.summary import render_summary
from largekd.monitoring.timers import Timers, event_factory
from largekd.runtime.faults import fault_point
from largekd.runtime.files import read_json
from largekd.runtime.lock import run_lock
from largekd.runtime.logging import configure_logging, write_line
from largekd.runtime.ranks import (
    Ranks,
    all_agree,
    current_ranks,
    forget_failure,
    main_failed_too,
    new_control_group,
    require_same,
)
from largekd.runtime.seeds import seed_everything
from largekd.runtime.shutdown import StopSignal
from largekd.runtime.watchdog import Watchdog
from largekd.sharding.cluster import process_group
from largekd.teachers.remote import Patience

logger = logging.getLogger(__name__)

# The watchdog must speak before the process group gives up, or the stacks of the others are lost.
_GRACE_S = 30
_DAY_S = 86_400
# How many times the time-out a save or an export may take.
_SLOW = 10


def distill(config: RunConfig) -> dict[str, Any] | None:
    """Run, or go on with, the run in `config.run.dir`; returns its summary, or None when it was stopped and saved.

    A finished run is not repeated: its summary is returned. A collective call on every rank of the job.
    Errors: LargeKDError for everything that the user can mend.
    """
    with process_group(timeout_s=config.train.collective_timeout_s + _GRACE_S):
        ranks = current_ranks()
        configure_logging(level=config.log.level, rank=ranks.rank)
        folder = Path(config.run.dir).expanduser().absolute()
        forget_failure(ranks=ranks)
        try:
            with run_lock(folder, ranks=ranks):
                require_same(render_config(config), what="configuration", key="--config and its overrides")
                summary = open_folder(folder, config=config, ranks=ranks)
                if summary is None:
                    summary = _run(config, folder=folder, ranks=ranks)
                elif ranks.is_main:
                    write_line(f"{folder} holds a finished run; run.fresh=true starts it anew.")
        except LargeKDError as error:
            error.only_here = not main_failed_too(ranks=ranks)
            raise
        if summary is not None and ranks.is_main:
            write_line(render_summary(summary))
        return summary


def _run(config: RunConfig, *, folder: Path, ranks: Ranks) -> dict[str, Any] | None:
    timeout_s = config.train.collective_timeout_s
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        seed_everything(config.train.seed)
        # Agreements that wait for slow things (a download, a disk) must not run into the time-out of training.
        control = new_control_group(timeout_s=_DAY_S)
        store = CheckpointStore(folder / CHECKPOINT_FOLDER, ranks=ranks, keep=config.checkpoint.keep, group=control)
        store.prepare()
        checkpoint = store.newest()
        if checkpoint is not None:
            _check_world(checkpoint, ranks=ranks)
        watchdog = stack.enter_context(Watchdog(timeout_s=timeout_s, folder=folder, ranks=ranks))
        stack.enter_context(_reporting_failure(watchdog))
        watchdog.beat("build", allowed_s=_DAY_S)
        around = Surroundings(
            folder=folder,
            patience=Patience(wait_s=0.0, beat=watchdog.beat, stopping=lambda: stop.requested, group=control),
        )
        phases, prepared = prepare_stages(config, ranks=ranks, folder=folder, control=control)
        journal = Journal()
        if checkpoint is not None:
            journal.restore(read_json(checkpoint / "progress" / "state.json"))
        here = _Here(
            config,
            phase=phase_of(phases, index=journal.progress.phase, checkpoint=checkpoint),
            prepared=prepared,
            folder=folder,
            ranks=ranks,
            journal=journal,
            watchdog=watchdog,
            around=around,
        )
        stack.callback(here.close)
        here.enter(here.phase, resumed=checkpoint is not None)
        if checkpoint is not None:
            _check_resumable(here.parts, checkpoint=checkpoint)
            load_state(checkpoint, owners=_owners(here.parts, journal=journal, ranks=ranks))
            if ranks.is_main:
                logger.info("resumed at step %d from %s", journal.progress.step, checkpoint)
        journal.progress = here.phase.enter(journal.progress, total=phases[-1].end)
        monitor = stack.enter_context(_monitor(config, folder=folder, journal=journal, ranks=ranks))
        timers, meters = Timers(events=event_factory(device=here.parts.device)), Meters(device=here.parts.device)

        def session() -> Session:
            """Made anew for each use: one that is kept would keep an engine that was replaced."""
            return Session(
                parts=here.parts, monitor=monitor, timers=timers, meters=meters, stop=stop, watchdog=watchdog
            )

        def save() -> None:
            watchdog.beat(f"checkpoint at step {journal.progress.step}", allowed_s=_SLOW * timeout_s)
            if here.parts.resumable:
                owners = _owners(here.parts, journal=journal, ranks=ranks)
                save_state(store, step=journal.progress.step, owners=owners)
            elif ranks.is_main:
                logger.warning("no checkpoint: DeepSpeed could not restore this run's optimizer from NVMe")

        if not _train(here, phases=phases, journal=journal, session=session, save=save):
            _stopped(session(), journal=journal)
            return None
        watchdog.beat("export", allowed_s=_SLOW * timeout_s)
        export_dir = export_student(here.parts, folder=folder)
        summary = write_summary(folder, journal=journal, export_dir=export_dir, config=config, ranks=ranks)
        mark_done(folder, step=journal.progress.step, config=config, ranks=ranks)
        return summary


def _train(
    here: "_Here",
    *,
    phases: Sequence[Phase],
    journal: Journal,
    session: Callable[[], Session],
    save: Callable[[], None],
) -> bool:
    """All phases from here on, with the evaluations before, between stages and after; False: the ranks stopped."""
    if not _assess(session(), journal=journal, name="before"):
        return False
    while _run_phase(session(), journal=journal, save=save, watched=len(phases) > 1):
        if here.phase.index + 1 == len(phases):
            return _assess(session(), journal=journal, name="after")
        if here.phase.ends_stage and not _assess(session(), journal=journal, name=f"stage.{here.phase.stage.name}"):
            return False
        following = phases[here.phase.index + 1]
        # Under no name here: what was handed over, as large as the optimizer, is not to outlive the switch.
        here.enter(following, inherited=here.hand_over(to=following))
        journal.updates = dict(here.parts.updates)
        journal.progress = following.enter(journal.progress, total=phases[-1].end)
    return False


class _Here:
    """The phase that a run is in, and its parts once they are built."""

    def __init__(
        self,
        config: RunConfig,
        *,
        phase: Phase,
        prepared: Sequence[Prepared],
        folder: Path,
        ranks: Ranks,
        journal: Journal,
        watchdog: Watchdog,
        around: Surroundings,
    ) -> None:
        self.phase = phase
        self._config, self._prepared, self._folder, self._ranks = config, prepared, folder, ranks
        self._journal, self._watchdog, self._around = journal, watchdog, around
        self._parts: Parts | None = None

    def enter(self, phase: Phase, *, resumed: bool = False, inherited: Inherited | None = None) -> None:
        """Build the parts of a phase. resumed: a checkpoint will be loaded into them. A collective call."""
        self._watchdog.beat(f"build {phase.name}", allowed_s=_DAY_S)
        if inherited is not None:
            fault_point("stage:switch", rank=self._ranks.rank, step=self._journal.progress.step)
        self.phase = phase
        self._parts = build(
            self._prepared[phase.stage.index],
            folder=stage_folder(self._folder, stage=phase.stage, config=self._config),
            beginning=Beginning(
                phase=phase.index,
                frozen=phase.frozen,
                resumed=resumed or not phase.begins_stage,
                inherited=inherited,
                updates=self._journal.updates,
            ),
            around=self._around,
        )
        # Transformers and DeepSpeed have set up their own loggers by now.
        configure_logging(level=self._config.log.level, rank=self._ranks.rank)

    @property
    def parts(self) -> Parts:
        """The parts of this moment."""
        assert self._parts is not None
        return self._parts

    def hand_over(self, *, to: Phase) -> Inherited:
        """End the phase; from here to the next parts there are none to close."""
        parts, self._parts = self.parts, None
        inherited = hand_over(parts, to=to)
        del parts
        # An engine and its optimizer refer to each other; without this both would stay until some later collection.
        gc.collect()
        return inherited

    def close(self) -> None:
        """Take down what there is."""
        if self._parts is not None:
            self._parts.close()


def _run_phase(session: Session, *, journal: Journal, save: Callable[[], None], watched: bool) -> bool:
    """Train to the phase's end and save; False where the ranks agreed to stop.

    watched: whether what is frozen is compared before and after. Only what was thawed once could move, so that a run of
    one phase need not read its frozen weights, which may be on NVMe.
    """
    parts = session.parts
    before = frozen_digest(parts.named_trainables()) if watched else None
    if not run_steps(session, steps=_steps(session, journal=journal), journal=journal, save=save):
        return False
    same = before is None or frozen_digest(parts.named_trainables()) == before
    # A rank that raised alone would leave the others waiting.
    assert all_agree(same), "a frozen parameter has changed"
    save()
    done = journal.progress.step >= journal.progress.max_steps
    return done or all_agree(not session.stop.requested)


def _check_resumable(parts: Parts, *, checkpoint: Path) -> None:
    if not parts.resumable:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed with student.deepspeed = {parts.config.student.deepspeed!r}: DeepSpeed "
            "does not restore an optimizer on NVMe. Keep it in host memory (offload_optimizer.device cpu)."
        )


def _steps(session: Session, *, journal: Journal) -> Iterator[Sequence[Batch]]:
    """The loader's steps from here on, with rows replaced by rollouts where the run writes some."""
    parts, allowed_s = session.parts, _SLOW * session.parts.config.train.collective_timeout_s
    steps: Iterator[Sequence[Batch]] = islice(parts.loader, max(0, journal.progress.last - journal.progress.step))
    if parts.rollouts is None:
        return steps
    beat = functools.partial(session.watchdog.beat, "rollout", allowed_s=allowed_s)
    return parts.rollouts.steps(steps, first=journal.progress.step, beat=beat)


def _check_world(checkpoint: Path, *, ranks: Ranks) -> None:
    saved = read_manifest(checkpoint).world_size
    if saved != ranks.world_size:
        raise CheckpointError(
            f"{checkpoint} was saved by {saved} ranks and this job has {ranks.world_size}: ZeRO-3 shards fit only the "
            "number they were made for. Start as many ranks, or choose another run.dir."
        )


def _owners(parts: Parts, *, journal: Journal, ranks: Ranks) -> dict[str, StateOwner]:
    """Everything that a checkpoint holds. The loader comes first: it refuses other data before weights are loaded."""
    owners: dict[str, StateOwner] = {
        "loader": JsonOwner(get=parts.loader.state, put=parts.loader.restore, ranks=ranks),
        "engine": parts.engine,
        "progress": JsonOwner(get=journal.state, put=journal.restore, ranks=ranks),
        "rng": RandomOwner(ranks=ranks),
    }
    if parts.teacher.state is not None:
        owners["teacher"] = parts.teacher.state
    for name, owner in parts.stateful.items():
        owners[name] = JsonOwner(get=owner.state, put=owner.restore, ranks=ranks)
    return owners


def _monitor(config: RunConfig, *, folder: Path, journal: Journal, ranks: Ranks) -> Monitor:
    return Monitor(
        config=config.log,
        folder=folder,
        resume_step=journal.progress.step,
        is_main=ranks.is_main,
        total_steps=journal.progress.max_steps,
    )


def _stopped(session: Session, *, journal: Journal) -> None:
    """Say how far the run came, and how to go on."""
    parts, step = session.parts, journal.progress.step
    if not parts.ranks.is_main:
        return
    if not parts.resumable:
        write_line(f"stopped at step {step}; nothing was saved, because an optimizer on NVMe cannot be resumed.")
        return
    how = "the same command without run.fresh=true" if parts.config.run.fresh else "the same command"
    write_line(f"stopped {f'and saved at step {step}' if step else 'before the first step'}; {how} goes on from there.")


@contextmanager
def _reporting_failure(watchdog: Watchdog) -> Iterator[None]:
    """Write the stacks of all ranks when a collective gave up, before the error ends this one."""
    try:
        yield
    except RuntimeError as error:
        watchdog.report_failure(error)
        raise


def _assess(session: Session, *, journal: Journal, name: str) -> bool:
    """Evaluate and note the figures, `before` only once, whatever the number of starts; False: stopped meanwhile."""
    parts = session.parts
    done = name == "before" and (name in journal.evaluations or not parts.config.eval.before)
    if parts.evaluation_batches is None or done:
        return True
    figures = evaluate_now(session)
    if figures is None:
        return False
    journal.evaluations[name] = figures
    session.monitor.log_evaluation(
        step=journal.progress.step, values={f"eval/{key}": value for key, value in figures.items()}
    )
    return True
