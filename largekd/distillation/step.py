"""One optimizer step, on one screen: count, divide once, signal, forward, backward, step."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from largekd.contracts import Batch, Counts, SignalRequest
from largekd.engine.train import StepOutcome, TrainEngine
from largekd.monitoring.timers import Timers
from largekd.objectives.terms import VocabularyTerm
from largekd.runtime.ranks import all_sum
from largekd.teachers.protocol import Teacher


@dataclass(frozen=True)
class StepScales:
    """What each term's sum is multiplied by, and what was learnt while finding it out.

    `per_term` is weight / count * ranks; `label_tokens` the count over all ranks and micro-batches of the step;
    `stop_votes` the number of ranks that want to stop. All stay on the device: nothing here waits for it.
    """

    per_term: Tensor
    label_tokens: Tensor
    stop_votes: Tensor


@dataclass(frozen=True)
class StepResult:
    """One step's outcome on this rank: `losses` per micro-batch, `sums` over them; `health` None if not measured."""

    outcome: StepOutcome
    losses: tuple[Tensor, ...]
    sums: Tensor
    health: Tensor | None


def step_scales(
    micro_batches: Sequence[Batch],
    *,
    terms: Sequence[VocabularyTerm],
    world_size: int,
    device: torch.device,
    stop: bool = False,
) -> StepScales:
    """The only division of the package: every term's weight by its count over the whole optimizer step.

    One all-reduce carries the counts and the wish to stop. A count of zero gives scale 0. DeepSpeed averages
    gradients over ranks, so the number of ranks is a factor here and nowhere else.
    """
    local = torch.tensor([Counts.of(micro_batches).label_tokens, float(stop)], dtype=torch.float64)
    total = all_sum(local.to(device, non_blocking=True))
    count, votes = total[0], total[1]
    weights = torch.tensor([term.weight for term in terms], dtype=torch.float64, device=device)
    per_term = torch.where(count > 0, weights / count.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return StepScales(per_term=(per_term * world_size).float(), label_tokens=count, stop_votes=votes)


def train_step(
    batches: Sequence[Batch],
    *,
    scales: StepScales,
    engine: TrainEngine,
    teacher: Teacher,
    request: SignalRequest,
    lr: float,
    timers: Timers,
    measure: bool,
) -> StepResult:
    """Run the step's micro-batches through teacher and student and update once."""
    losses, sums, health = [], [], []
    with ExitStack() as stack:
        with timers.section("teacher"):
            signals = stack.enter_context(teacher.signals(batches, request=request))
        with timers.section("student"):
            for index, batch in enumerate(batches):
                outputs = engine(batch=batch, signal=next(signals), scales=scales.per_term, measure=measure)
                engine.backward(outputs["loss"], last=index == len(batches) - 1)
                losses.append(outputs["loss"].detach())
                sums.append(outputs["sums"])
                health += [outputs["health"]] if measure else []
    with timers.section("optimizer"):
        outcome = engine.step(lr=lr)
    if outcome.applied:
        teacher.after_step()
    return StepResult(
        outcome=outcome,
        losses=tuple(losses),
        sums=torch.stack(sums).sum(dim=0),
        health=torch.stack(health).sum(dim=0) if health else None,
    )
