"""What the ranks do in test_layer_drop: steps in which some layers are left out."""

from typing import Any

import torch
from step_jobs import build_side, own_micro_batches, run_step, whole_weights


def gradients_after_a_whole_step(*, left_out: tuple[tuple[int, ...], ...], rows: int, **build: Any) -> dict[str, Any]:
    """Gradients of a step that leaves layers out, right after one that left out none and had other rows."""
    from deepspeed.utils import safe_get_full_grad

    batches = own_micro_batches(rows=rows, packed=True, micro_batch_size=1)
    side = build_side(micro_batch_size=1, accumulation=len(batches), **build)
    run_step(side, own_micro_batches(rows=rows, packed=True, micro_batch_size=1, seed=7), lr=0.0)
    gradients: dict[str, torch.Tensor] = {}
    step = side.engine.step

    def reading_step(*, lr: float) -> Any:
        for name, parameter in side.engine.module.named_trainables():
            gradients[name] = safe_get_full_grad(parameter).float().clone()
        return step(lr=lr)

    side.engine.step = reading_step  # type: ignore[method-assign]
    _, result = run_step(side, batches, left_out=left_out)
    side.close()
    return {"gradients": gradients, "norm": result.outcome.grad_norm}


def steps_with_drops(*, left_out: list[tuple[tuple[int, ...], ...]], rows: int, **build: Any) -> dict[str, Any]:
    """Weights after steps with these layers left out, in order."""
    share = len(own_micro_batches(rows=rows, packed=True, micro_batch_size=1))
    side = build_side(micro_batch_size=1, accumulation=share, **build)
    for step, dropped in enumerate(left_out):
        run_step(
            side,
            own_micro_batches(rows=rows, packed=True, micro_batch_size=1, seed=step),
            step=step,
            lr=1e-2,
            left_out=dropped,
        )
    weights = whole_weights(side)
    side.close()
    return weights
