"""What the ranks do in test_alignment: optimizer steps whose whole gradients, weights and figures are kept."""

from typing import Any

import torch.distributed as dist
from alignment_reference import aligned_rows, join
from step_jobs import SEED, Side, build_side, mean_loss, run_step
from torch import Tensor

from largekd.contracts import Batch, SignalRequest
from largekd.evaluation.heldout import evaluate
from largekd.sharding.accelerator import device
from largekd.sharding.shards import gathered, resident_bytes


def steps_with_alignment(
    *,
    steps: int = 1,
    rows: int = 8,
    packed: bool = False,
    micro_batch_size: int = 2,
    lr: float = 0.0,
    term_gradients: bool = False,
    evaluation_between: bool = False,
    **build: Any,
) -> dict[str, Any]:
    """What each step gave: `losses`, `gradients`, `pairs`, `norms`, `squares`, `figures`; and `weights` before the
    first and after each.

    Step n has the rows of seed n. `losses` are over all ranks, `own_losses` this rank's per micro-batch.
    """
    share = rows // dist.get_world_size()
    side = build_side(micro_batch_size=micro_batch_size, accumulation=share // micro_batch_size, **build)
    found: dict[str, Any] = {
        name: [] for name in ("losses", "own_losses", "gradients", "pairs", "norms", "squares", "figures", "resident")
    }
    alignment = side.alignment
    assert alignment is not None
    found["weights"] = [_weights(side)]
    found["all_pairs"] = {
        config.name: list(pairs) for config, pairs in zip(alignment.configs, alignment.pairs, strict=True)
    }
    _keep_gradients(side, into=found["gradients"])
    for step in range(steps):
        batches = _own(rows=rows, packed=packed, micro_batch_size=micro_batch_size, seed=step)
        scales, result = run_step(side, batches, step=step, lr=lr, term_gradients=term_gradients)
        found["losses"].append(mean_loss(side, scales=scales, result=result, step=step))
        found["own_losses"].append([float(loss) for loss in result.losses])
        found["norms"].append(result.outcome.grad_norm)
        found["squares"].append(_over_ranks(result.extras.get("squares")))
        active = alignment.plan(seed=SEED, step=step).pairs
        found["pairs"].append(
            {config.name: list(pairs) for config, pairs in zip(alignment.configs, active, strict=True)}
        )
        found["resident"].append(resident_bytes(side.engine.module))
        found["weights"].append(_weights(side))
        if evaluation_between:
            found["figures"].append(_evaluated(side, batches))
    found["rates"] = side.engine.learning_rates()
    side.close()
    return found


def _own(*, rows: int, packed: bool, micro_batch_size: int, seed: int) -> list[Batch]:
    share = rows // dist.get_world_size()
    first = dist.get_rank() * share
    own = aligned_rows(count=rows, packed=packed, seed=seed)[first : first + share]
    return [join(own[start : start + micro_batch_size]) for start in range(0, share, micro_batch_size)]


def _keep_gradients(side: Side, *, into: list[dict[str, Tensor]]) -> None:
    from deepspeed.utils import safe_get_full_grad

    step = side.engine.step

    def reading_step(*, lr: float) -> Any:
        named = [(name, p) for name, p in side.engine.module.named_trainables() if p.requires_grad]
        into.append({name: safe_get_full_grad(parameter).float().clone() for name, parameter in named})
        return step(lr=lr)

    side.engine.step = reading_step  # type: ignore[method-assign]


def _weights(side: Side) -> dict[str, Tensor]:
    weights = {}
    for name, parameter in side.engine.module.named_trainables():
        with gathered([parameter]):
            weights[name] = parameter.detach().float().clone()
    return weights


def _over_ranks(squares: Tensor | None) -> list[float] | None:
    if squares is None:
        return None
    total = squares.double() / dist.get_world_size() ** 2
    dist.all_reduce(total)
    return [float(square) for square in total]


def _evaluated(side: Side, batches: list[Batch]) -> dict[str, float]:
    return evaluate(
        iter(batches),
        engine=side.engine,
        teacher=side.teacher,
        request=SignalRequest("full"),
        n_terms=len(side.objective.summands),
        device=device(),
    )
