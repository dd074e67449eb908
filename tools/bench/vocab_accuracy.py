"""The correctness gate: losses and gradients against float64 computed from the same inputs."""

from dataclasses import replace

import torch
from torch import Tensor
from vocab_cell import Cell, Inputs, make_inputs
from vocab_contenders import BETA, CONTENDERS, DIVERGENCES

ROUNDED = "rounded_logits"
"""The record of what rounding the logits alone costs."""


def accuracy(cell: Cell, /, *, names: tuple[str, ...], chunk_tokens: int = 64) -> list[dict[str, object]]:
    """Relative error of the loss, and of each gradient as ‖g − g64‖ / ‖g64‖, per contender, divergence, temperature."""
    records: list[dict[str, object]] = []
    for temperature in (1.0, 2.0):
        for divergence in DIVERGENCES:
            case = replace(cell, divergence=divergence, temperature=temperature)
            inputs = make_inputs(case)
            loss, gradients = reference(case, inputs, chunk_tokens=chunk_tokens)
            rounded_loss, rounded = reference(case, inputs, chunk_tokens=chunk_tokens, rounds_logits=True)
            records.append(
                {
                    "contender": ROUNDED,
                    "divergence": divergence,
                    "temperature": temperature,
                    "loss_error": abs(rounded_loss - loss) / abs(loss),
                    "gradient_error": max(_relative(a, b) for a, b in zip(rounded, gradients, strict=True)),
                }
            )
            for name in names:
                inputs.hidden_TD.grad = inputs.weight_VD.grad = None
                value = CONTENDERS[name](case, inputs)
                assert value is not None and inputs.hidden_TD.grad is not None and inputs.weight_VD.grad is not None
                found = (inputs.hidden_TD.grad, inputs.weight_VD.grad)
                records.append(
                    {
                        "contender": name,
                        "divergence": divergence,
                        "temperature": temperature,
                        "loss_error": abs(value - loss) / abs(loss),
                        "gradient_error": max(_relative(a, b) for a, b in zip(found, gradients, strict=True)),
                    }
                )
    return records


def reference(
    cell: Cell, inputs: Inputs, /, *, chunk_tokens: int, rounds_logits: bool = False
) -> tuple[float, tuple[Tensor, Tensor]]:
    """Mean loss per token and the gradients of hidden states and head in float64, a few tokens at a time.

    With `rounds_logits` both models' logits are rounded once to the inputs' dtype, as every method does that projects
    in it; everything else stays in float64. This is the least error that such a method can have.
    """

    def project(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
        logits_CV = hidden_CD @ weight_VD.t()
        return logits_CV.to(inputs.hidden_TD.dtype).double() if rounds_logits else logits_CV

    hidden_TD, weight_VD = (t.detach().double() for t in (inputs.hidden_TD, inputs.weight_VD))
    teacher_TE, teacher_VE = inputs.teacher_hidden_TE.double(), inputs.teacher_weight_VE.double()
    hidden_gradient_TD, weight_gradient_VD = torch.zeros_like(hidden_TD), torch.zeros_like(weight_VD)
    total = 0.0
    for start in range(0, cell.tokens, chunk_tokens):
        span = slice(start, start + chunk_tokens)
        student_CV = project(hidden_TD[span], weight_VD).requires_grad_()
        q_CV = (student_CV / cell.temperature).softmax(-1)
        p_CV = (project(teacher_TE[span], teacher_VE) / cell.temperature).softmax(-1)
        loss = _divergence(p_CV, q_CV, beta=BETA[cell.divergence]) / cell.tokens
        (gradient_CV,) = torch.autograd.grad(loss, student_CV)
        hidden_gradient_TD[span] = gradient_CV @ weight_VD
        weight_gradient_VD.addmm_(gradient_CV.t(), hidden_TD[span])
        total += loss.item()
    return total, (hidden_gradient_TD, weight_gradient_VD)


def _divergence(p_CV: Tensor, q_CV: Tensor, /, *, beta: float) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    if beta == 0.0:
        return kl(p_CV, q_CV)
    if beta == 1.0:
        return kl(q_CV, p_CV)
    mixture_CV = torch.lerp(q_CV, p_CV, beta)
    return beta * kl(p_CV, mixture_CV) + (1 - beta) * kl(q_CV, mixture_CV)


def _relative(found: Tensor, expected: Tensor, /) -> float:
    return float((found.double() - expected).norm() / expected.norm())
