"""One optimizer step, on one screen: count, divide once, signal, forward, backward, step."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from largekd.contracts import COUNT_NAMES, Batch, SignalRequest, counts_of
from largekd.engine.train import StepOutcome, TrainEngine
from largekd.monitoring.timers import Timers
from largekd.objectives.alignment import Alignment, AlignmentPlan
from largekd.objectives.options import PLAIN, PassOptions
from largekd.objectives.router import RouterTerms
from largekd.objectives.terms import Objective
from largekd.runtime.ranks import all_sum
from largekd.teachers.protocol import CountsSkips, Teacher


@dataclass(frozen=True)
class StepSetting:
    """What a step is asked to do: the summands' factors, the temperature, the layers that take part, the signal; and
    the student's layers that each micro-batch leaves out (empty: none of any)."""

    factors: tuple[float, ...]
    temperature: float
    tempered: bool
    plan: AlignmentPlan
    request: SignalRequest
    left_out: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def at(
        cls,
        objective: Objective,
        *,
        step: int,
        max_steps: int,
        seed: int,
        plan: AlignmentPlan = PLAIN.plan,
        left_out: tuple[tuple[int, ...], ...] = (),
    ) -> "StepSetting":
        """The setting of step `step` (0 is the first): a function of its arguments alone, the same on all ranks."""
        return cls(
            factors=objective.factors(step=step, max_steps=max_steps),
            temperature=objective.temperature(step=step, max_steps=max_steps),
            tempered=objective.config.temperature != 1.0,
            plan=plan,
            request=objective.request(step=step, max_steps=max_steps, taps=plan.teacher, seed=seed),
            left_out=left_out,
        )


def plan_of(alignment: Alignment | None, *, step: int, seed: int, router: RouterTerms | None = None) -> AlignmentPlan:
    """The layers and pairs that take part in a step: a function of (seed, step)."""
    plan = AlignmentPlan() if alignment is None else alignment.plan(seed=seed, step=step)
    return plan if router is None else router.extend(plan)


@dataclass(frozen=True)
class StepScales:
    """What each term's sum is multiplied by, and what was learnt while finding it out.

    `per_term` is factor / count * ranks and `counts` what each sum is divided by, over all ranks and micro-batches of
    the step; `label_tokens` the weight of all tokens that carry the loss, `signal_tokens` of those with a teacher's
    signal; `stop_votes` the number of ranks that want to stop. The tensors stay on the device: nothing waits for it.
    """

    per_term: Tensor
    counts: Tensor
    label_tokens: Tensor
    signal_tokens: Tensor
    stop_votes: Tensor
    world_size: int


@dataclass(frozen=True)
class StepResult:
    """One step's outcome on this rank: `losses` per micro-batch; `sums`, and where they were asked for `health`,
    `kept`, `histogram`, `router` and `squares`, over them."""

    outcome: StepOutcome
    losses: tuple[Tensor, ...]
    sums: Tensor
    extras: dict[str, Tensor]


def step_scales(
    micro_batches: Sequence[Batch],
    *,
    objective: Objective,
    factors: Sequence[float],
    world_size: int,
    device: torch.device,
    stop: bool = False,
    kept_share: float = 1.0,
) -> StepScales:
    """The only division of the package: every term's factor by its count over the whole optimizer step.

    One all-reduce carries the counts and the wish to stop. A count of zero gives scale 0. `kept_share` is the share of
    tokens that a selection is expected to keep. DeepSpeed averages gradients over ranks, so the number of ranks is a
    factor here and nowhere else.
    """
    local = torch.cat([counts_of(micro_batches), torch.tensor([float(stop)], dtype=torch.float64)])
    total = all_sum(local.to(device, non_blocking=True))
    named = dict(zip(COUNT_NAMES, total[:-1].unbind(), strict=True))
    counts = torch.stack(
        [named[summand.count] * (kept_share if summand.selective else 1.0) for summand in objective.summands]
    )
    factor_N = torch.tensor(factors, dtype=torch.float64, device=device)
    per_term = torch.where(counts > 0, factor_N / counts.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return StepScales(
        per_term=(per_term * world_size).float(),
        counts=counts,
        label_tokens=named["label_tokens"],
        signal_tokens=named["signal_tokens"],
        stop_votes=total[-1],
        world_size=world_size,
    )


def train_step(
    batches: Sequence[Batch],
    *,
    scales: StepScales,
    setting: StepSetting,
    engine: TrainEngine,
    teacher: Teacher,
    lr: float,
    timers: Timers,
    options: PassOptions = PLAIN,
) -> StepResult:
    """Run the step's micro-batches through teacher and student and update once.

    options: of every micro-batch; plan, temperature and the layers that are left out come from `setting`.
    """
    losses, figures = [], []
    temperature = torch.tensor(setting.temperature, device=scales.per_term.device) if setting.tempered else None
    options = replace(options, plan=setting.plan, temperature=temperature)
    with ExitStack() as stack:
        with timers.section("teacher"):
            signals = stack.enter_context(teacher.signals(batches, request=setting.request))
        with timers.section("student"):
            for index, batch in enumerate(batches):
                left_out = setting.left_out[index] if setting.left_out else ()
                outputs = engine(
                    batch=batch,
                    signal=next(signals),
                    scales=scales.per_term,
                    options=replace(options, left_out=left_out),
                )
                loss = outputs.pop("loss")
                engine.backward(loss, last=index == len(batches) - 1)
                losses.append(loss.detach())
                figures.append(outputs)
    with timers.section("optimizer"):
        outcome = engine.step(lr=lr)
    totals = {name: torch.stack([output[name] for output in figures]).sum(dim=0) for name in figures[0]}
    with timers.section("teacher"):
        if outcome.applied:
            teacher.after_step(totals)
        elif isinstance(teacher, CountsSkips):
            teacher.after_skipped_step()
    # The alignment's part was filled by the backward passes.
    parts = ("squares", "alignment_squares", "teacher_squares", "router_squares", "deep_squares")
    squares = [totals.pop(name) for name in parts if name in totals]
    if squares:
        totals["squares"] = torch.cat(squares)
    return StepResult(outcome=outcome, losses=tuple(losses), sums=totals.pop("sums"), extras=totals)
