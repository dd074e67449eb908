"""The loop around the step: progress, records, evaluations, checkpoints, and the ways to stop."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from largekd.contracts import Batch, Progress
from largekd.distillation.builder import Parts
from largekd.distillation.journal import Journal
from largekd.distillation.numerics import find_culprits
from largekd.distillation.step import StepResult, StepSetting, plan_of, step_scales, train_step
from largekd.distillation.window import Window
from largekd.errors import NumericsError
from largekd.evaluation.heldout import evaluate
from largekd.generation.texts import sample_texts
from largekd.monitoring.images import heat_image
from largekd.monitoring.memory import memory_figures
from largekd.monitoring.meters import Meters
from largekd.monitoring.monitor import Monitor
from largekd.monitoring.timers import Timers
from largekd.objectives.options import PassOptions
from largekd.optim.schedule import learning_rate
from largekd.runtime.ranks import all_agree, all_sum
from largekd.runtime.shutdown import StopSignal
from largekd.runtime.watchdog import Watchdog
from largekd.sharding.accelerator import on_cpu, peak_memory_bytes
from largekd.teachers.protocol import ReadsAhead, StoppedWaitingError, TeacherGoneError

logger = logging.getLogger(__name__)

# Micro-batches of an evaluation between two agreements on whether to go on.
_AGREE_EVERY = 4


@dataclass(frozen=True)
class Session:
    """The parts of a run and the instruments around them."""

    parts: Parts
    monitor: Monitor
    timers: Timers
    meters: Meters
    stop: StopSignal
    watchdog: Watchdog


def run_steps(
    session: Session, *, steps: Iterator[Sequence[Batch]], journal: Journal, save: Callable[[], None]
) -> bool:
    """Train until the steps run out (True), or until the ranks agree to stop (False, after saving).

    Errors: NumericsError after train.max_skipped_steps non-finite steps in a row; nothing is saved then.
    """
    parts, config, selection = session.parts, session.parts.config, session.parts.selection
    window = Window(meters=session.meters, objective=parts.objective)
    parts.engine.train()
    while True:
        started = time.perf_counter()
        session.watchdog.beat("data")
        with session.timers.section("data", host=True):
            micro_batches = next(steps, None)
        if micro_batches is None:
            return True
        before = journal.progress
        session.watchdog.beat(f"step {before.step + 1}")
        batches = [batch.to(device=parts.device) for batch in micro_batches]
        setting = _setting(session, step=before.stage_step, max_steps=before.stage_length)
        _read_ahead(session, micro_batches=micro_batches, setting=setting, progress=before)
        scales = step_scales(
            micro_batches,
            objective=parts.objective,
            factors=setting.factors,
            world_size=parts.ranks.world_size,
            device=parts.device,
            stop=session.stop.requested,
            kept_share=1.0 if selection is None else selection.expected_share,
        )
        is_health_step = session.monitor.is_health_step(before.step + 1)
        try:
            result = train_step(
                batches,
                scales=scales,
                setting=setting,
                engine=parts.engine,
                teacher=parts.teacher,
                lr=learning_rate(step=before.stage_step, max_steps=before.stage_length, config=config.optim),
                timers=session.timers,
                options=PassOptions(
                    measure=setting.request.distribution is not None and is_health_step,
                    limit=None if selection is None else selection.limit,
                    load_LX=None if parts.router_loads is None else parts.router_loads.share_LX,
                    term_gradients=config.log.term_gradients and is_health_step,
                ),
            )
        except (StoppedWaitingError, TeacherGoneError) as error:
            _take_back(parts)
            if before.step:
                save()
            if isinstance(error, TeacherGoneError):
                raise
            return False
        if selection is not None and result.outcome.applied:
            selection.learn(result.extras["histogram"], reduce=all_sum)
        if parts.router_loads is not None and result.outcome.applied:
            parts.router_loads.learn(result.extras["router"], reduce=all_sum)
        # The optimizer step has waited for the device already, so these reads cost nothing.
        tokens, stopping = round(float(scales.label_tokens)), float(scales.stop_votes) > 0
        seconds = time.perf_counter() - started
        journal.progress = _advance(before, applied=result.outcome.applied, tokens=tokens, seconds=seconds)
        window.add(result=result, scales=scales, setting=setting, tokens=tokens, seconds=seconds)
        _check_numerics(session, batches=batches, result=result, progress=journal.progress)
        try:
            _report(session, window=window, progress=journal.progress, result=result, setting=setting)
        except TeacherGoneError:
            save()
            raise
        last = journal.progress.step >= journal.progress.last
        every = config.checkpoint.every_steps
        if not last and (stopping or (every and journal.progress.step % every == 0)):
            save()
        if stopping and not last:
            return False


def evaluate_now(session: Session) -> dict[str, float] | None:
    """The held-out figures of this moment; None when the ranks agreed to stop meanwhile. A collective call."""
    parts = session.parts
    assert parts.evaluation_batches is not None
    stopped = False

    def until_stopped(batches: Iterator[Batch]) -> Iterator[Batch]:
        nonlocal stopped
        for index, batch in enumerate(batches):
            session.watchdog.beat("evaluation")
            if index % _AGREE_EVERY == 0 and not all_agree(not session.stop.requested):
                stopped = True
                return
            yield batch

    try:
        figures = evaluate(
            until_stopped(parts.evaluation_batches()),
            engine=parts.engine,
            teacher=parts.teacher,
            request=parts.objective.evaluation_request,
            n_terms=len(parts.objective.summands),
            device=parts.device,
            depths=parts.depths,
        )
    except StoppedWaitingError:
        parts.engine.train()
        return None
    return None if stopped else figures


def _setting(session: Session, *, step: int, max_steps: int) -> StepSetting:
    parts, drop, seed = session.parts, session.parts.layer_drop, session.parts.seed
    return StepSetting.at(
        parts.objective,
        step=step,
        max_steps=max_steps,
        seed=seed,
        plan=plan_of(parts.alignment, step=step, seed=seed, router=parts.router),
        left_out=drop.draw(step=step, max_steps=max_steps, micro_batches=parts.accumulation) if drop else (),
    )


def _read_ahead(session: Session, *, micro_batches: Sequence[Batch], setting: StepSetting, progress: Progress) -> None:
    """Let a teacher that can begin with this step's signals, unless it has, and with the next step's.

    Not with the next step's beside rollouts: its rows are not known before this step has changed the student.
    """
    teacher, loader = session.parts.teacher, session.parts.loader
    if not isinstance(teacher, ReadsAhead):
        return
    teacher.prepare(micro_batches, request=setting.request)
    # Neither with one that is another engine's: this teacher may not be there any more.
    is_last = progress.step + 1 >= progress.last
    following = None if is_last or session.parts.rollouts is not None else loader.upcoming()
    if following is not None:
        later = _setting(session, step=progress.stage_step + 1, max_steps=progress.stage_length)
        teacher.prepare(following, request=later.request)


def _take_back(parts: Parts) -> None:
    """Undo the asking for a step that has not begun on any rank: it is the first one of the run that goes on."""
    parts.loader.take_back()
    if parts.rollouts is not None:
        parts.rollouts.take_back()


def _advance(progress: Progress, *, applied: bool, tokens: int, seconds: float) -> Progress:
    return replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + tokens,
        train_s=progress.train_s + seconds,
        skipped_steps=progress.skipped_steps + (0 if applied else 1),
        consecutive_skips=0 if applied else progress.consecutive_skips + 1,
    )


def _check_numerics(session: Session, *, batches: Sequence[Batch], result: StepResult, progress: Progress) -> None:
    parts = session.parts
    if result.outcome.applied:
        parts.watch.forget()
        return
    culprits = find_culprits(batches, losses=result.losses, gradients_finite=parts.watch.read(), rank=parts.ranks.rank)
    who = "; ".join(str(culprit) for culprit in culprits) or "no rank before the gradients were summed"
    if parts.ranks.is_main:
        logger.warning("step %d was skipped on all ranks: not finite on %s", progress.step, who)
    limit = parts.config.train.max_skipped_steps
    if progress.consecutive_skips >= limit:
        raise NumericsError(
            f"{progress.consecutive_skips} steps in a row, up to step {progress.step}, had a non-finite gradient; the "
            f"last on {who}. Checkpoints were left as they are. Look at those samples, lower optim.lr, or raise "
            f"train.max_skipped_steps ({limit})."
        )


def _report(session: Session, *, window: Window, progress: Progress, result: StepResult, setting: StepSetting) -> None:
    """Evaluate and write the step's record, where they are due; all ranks take part in both."""
    step, config, parts = progress.step, session.parts.config, session.parts
    every = config.eval.every_steps
    if parts.evaluation_batches is not None and every and step % every == 0 and step < progress.last:
        figures = evaluate_now(session)
        if figures is not None:
            session.monitor.log_evaluation(step=step, values={f"eval/{key}": value for key, value in figures.items()})
    if parts.router_loads is not None and session.monitor.is_health_step(step):
        session.monitor.log_images(step=step, images={"router/load": heat_image(parts.router_loads.heat_map())})
    if not session.monitor.is_log_step(step) and step != progress.last:
        return
    values = window.flush(timers=session.timers)
    values |= {
        "tokens": float(progress.tokens),
        "optim/grad_norm": result.outcome.grad_norm,
        "optim/skipped_steps": float(progress.skipped_steps),
        "schedule/alpha": parts.objective.alpha(step=progress.stage_step - 1, max_steps=progress.stage_length),
        "schedule/temperature": setting.temperature,
    }
    for summand, factor in zip(parts.objective.summands, setting.factors, strict=True):
        values[f"schedule/factor/{summand.name}"] = factor
    if parts.layer_drop is not None:
        values["schedule/layer_drop"] = parts.layer_drop.rate(
            step=progress.stage_step - 1, max_steps=progress.stage_length
        )
    values |= {} if parts.router_loads is None else parts.router_loads.figures()
    if progress.phase or progress.last < progress.max_steps:
        values |= {"stage/index": float(progress.stage), "stage/phase": float(progress.phase)}
    values |= parts.teacher.metrics
    values |= {} if parts.rollouts is None else parts.rollouts.metrics
    values |= {f"optim/lr/{name}": rate for name, rate in parts.engine.learning_rates().items()}
    values |= memory_figures(accelerator_peak_bytes=None if on_cpu() else peak_memory_bytes)
    session.monitor.log(step=step, values=values)
    if parts.rollouts is not None and config.rollouts is not None and config.rollouts.log_samples:
        shown = parts.rollouts.latest[: config.rollouts.log_samples]
        session.monitor.log_texts(step=step, texts=sample_texts(shown, tokenizer=parts.sources.tokenizer))
