"""The fused vocabulary pass: all vocabulary terms and their gradients without the full logits of either model.

Shape letters: B sequences, S positions, T counted tokens, C tokens of one chunk, R rows of one block, V student
vocabulary, W shared ids, D student width, E teacher width, K terms, H health figures.

Counted tokens are walked in chunks. Two buffers of (chunk, vocabulary) in the models' dtype hold the projections of
student and teacher; blocks of a few rows are evaluated in float32 (`rows.py`) and the gradient is written over the
student's projection, which then is multiplied into the gradients of hidden states and head. All gradients are
complete when the forward pass ends; the backward pass multiplies them by the incoming scalar.

The unit of the accumulated gradients is the largest scale rounded up to a power of two: gradients of 1/count times a
probability would underflow in float16, and a power of two costs no rounding when it is multiplied in afterwards.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from largekd.contracts import Batch, HiddenSignal
from largekd.objectives.compiled import RowFunction
from largekd.objectives.rows import HeadShape, RowPlan
from largekd.objectives.sweep import StudentSide, Sweep
from largekd.objectives.terms import VocabularyTerm


class VocabularyPass(nn.Module):
    """Σ_k scales_k · Σ_t weight_t · D_k(t) over the counted tokens of a batch, and its gradients.

    Under ZeRO-3 the caller registers the head's weight (and bias) as external parameters of this module.
    """

    def __init__(
        self,
        *,
        terms: Sequence[VocabularyTerm],
        temperature: float,
        chunk_tokens: int,
        compile: bool = False,
    ) -> None:
        super().__init__()
        assert terms, "a vocabulary pass needs a term"
        assert temperature > 0 and chunk_tokens > 0
        self.terms = tuple(terms)
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens
        self.rows = RowFunction(compiles=compile)

    def forward(
        self,
        hidden_BSD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None = None,
        *,
        vocab_size: int,
        batch: Batch,
        signal: HiddenSignal | None,
        scales: Tensor,
        measure: bool = False,
        head_scale: float = 1.0,
        softcap: float | None = None,
    ) -> dict[str, Tensor]:
        """`loss`: the differentiable scalar; `sums`: (terms,) Σ_t weight_t · D_k(t), neither scaled nor divided.

        With `measure` also `health`: (len(HEALTH_NAMES),) weighted sums. `scales` (terms,) float32 holds what each
        sum is multiplied by (weight / global count × ranks). Rows of `weight_VD` beyond `vocab_size` are padding:
        no probability, zero gradient. No call waits for the device; no gradient is held while gradients are off.
        """
        inputs = (hidden_BSD, weight_VD, *(() if bias_V is None else (bias_V,)))
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        plan = RowPlan(
            terms=self.terms,
            temperature=self.temperature,
            student=HeadShape(vocab_size, head_scale, softcap, bias_V is not None),
            teacher=_teacher_shape(signal),
            gradient=wanted,
            measure=measure,
        )
        assert signal is not None or all(term.divergence is None for term in self.terms), "no teacher signal"
        assert scales.shape == (len(self.terms),), "one scale per term"
        sweep = Sweep(plan=plan, rows=self.rows, chunk_tokens=self.chunk_tokens, batch=batch, signal=signal)
        loss, sums, health = _FusedVocabulary.apply(hidden_BSD, weight_VD, bias_V, scales, sweep)
        return {"loss": loss, "sums": sums, "health": health} if measure else {"loss": loss, "sums": sums}


class _FusedVocabulary(torch.autograd.Function):
    """Accumulates gradients in `forward`; `backward` runs once at most, for it hands over its buffers."""

    @staticmethod
    def forward(
        ctx: Any, hidden_BSD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scales: Tensor, sweep: Sweep
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = StudentSide(hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), weight_VD, bias_V)
        wants_hidden, wants_weight, wants_bias = (sweep.plan.gradient and need for need in ctx.needs_input_grad[:3])
        gradients = sweep.empty_gradients(student, wants=(wants_hidden, wants_weight, wants_bias))
        unit = _power_of_two_above(scales.abs().max())
        with torch.autocast(hidden_BSD.device.type, enabled=False):
            sums, health = sweep.run(student, factors=scales / unit, gradients=gradients)
        ctx.gradients, ctx.unit, ctx.hidden_shape = gradients, unit, hidden_BSD.shape
        ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(sums, health)
        return (scales * sums).sum(), sums, health

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the vocabulary pass hands its gradients over once; run the pass again"
        factor = loss_gradient * ctx.unit
        for tensor in (gradients.hidden_ND, gradients.weight_VD, gradients.bias_V):
            if tensor is not None:
                tensor.mul_(factor)
        hidden = None if gradients.hidden_ND is None else gradients.hidden_ND.view(ctx.hidden_shape)
        bias = None if gradients.bias_V is None else gradients.bias_V.to(ctx.bias_dtype)
        return hidden, gradients.weight_VD, bias, None, None


def _power_of_two_above(value: Tensor, /) -> Tensor:
    """The smallest power of two above a non-negative scalar; 1 for 0."""
    _, exponent = torch.frexp(value)
    return torch.ldexp(torch.ones_like(value), exponent)


def _teacher_shape(signal: HiddenSignal | None, /) -> HeadShape | None:
    if signal is None:
        return None
    head = signal.head
    return HeadShape(head.vocab_size, head.scale, head.softcap, head.bias_V is not None)
