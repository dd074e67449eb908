"""Ways to compute one distillation loss and its gradients from hidden states; each returns the mean loss per token.

All compute the same divergence of the same two distributions, forward and backward, with gradients of the student's
hidden states and head. Third-party code is called through its public entry, with its own defaults except for the
chunk size that is named.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from vocab_cell import Cell, Inputs

from largekd.contracts import Batch, HiddenSignal, VocabularyHead
from largekd.objectives.divergences import JSD, Divergence, forward_kl, reverse_kl
from largekd.objectives.terms import VocabularyTerm
from largekd.objectives.vocabulary import VocabularyPass

Contender = Callable[[Cell, Inputs], float | None]

DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": JSD(mix=0.5)}
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
"""The convention of Liger and TRL: 0 is KL(teacher‖student), 1 is KL(student‖teacher)."""

_PASSES: dict[tuple[str, float, int, bool], VocabularyPass] = {}


def ours(cell: Cell, inputs: Inputs, /, *, chunk_tokens: int, compile: bool = False) -> float:
    """The fused pass of this project."""
    key = (cell.divergence, cell.temperature, chunk_tokens, compile)
    if key not in _PASSES:
        term = VocabularyTerm(cell.divergence, DIVERGENCES[cell.divergence])
        _PASSES[key] = VocabularyPass(terms=(term,), chunk_tokens=chunk_tokens, compile=compile)
    tokens = inputs.labels_T.numel()
    labels_BS = inputs.labels_T[None]
    batch = Batch(labels_BS, labels_BS, torch.ones(1, tokens), torch.arange(tokens))
    loss = _PASSES[key](
        inputs.hidden_TD[None],
        inputs.weight_VD,
        vocab_size=cell.vocab,
        batch=batch,
        signal=HiddenSignal(inputs.teacher_hidden_TE[None], VocabularyHead(inputs.teacher_weight_VE, cell.vocab)),
        scales=torch.full((1,), 1 / tokens),
        temperature=None if cell.temperature == 1.0 else torch.tensor(cell.temperature),
    )["loss"]
    loss.backward()
    if compile:
        assert _PASSES[key].rows.compiles, "the row function was not compiled"
    return loss.item()


def full_logits(cell: Cell, inputs: Inputs, /, *, upcast: bool) -> float:
    """Both models' whole logits and torch's own losses, in the models' dtype or after `.float()` as HF loops do."""
    student_TV = inputs.hidden_TD @ inputs.weight_VD.t()
    with torch.no_grad():
        teacher_TV = inputs.teacher_hidden_TE @ inputs.teacher_weight_VE.t()
    if upcast:
        student_TV, teacher_TV = student_TV.float(), teacher_TV.float()
    student_logp_TV = F.log_softmax(student_TV / cell.temperature, dim=-1)
    teacher_logp_TV = F.log_softmax(teacher_TV / cell.temperature, dim=-1)
    loss = _textbook(student_logp_TV, teacher_logp_TV, beta=BETA[cell.divergence])
    loss.backward()
    return loss.item()


def _textbook(student_logp_TV: Tensor, teacher_logp_TV: Tensor, /, *, beta: float) -> Tensor:
    def kl(target: Tensor, log_input: Tensor) -> Tensor:
        return F.kl_div(log_input, target, reduction="batchmean", log_target=True)

    if beta == 0.0:
        return kl(teacher_logp_TV, student_logp_TV)
    if beta == 1.0:
        return kl(student_logp_TV, teacher_logp_TV)
    parts = torch.stack([student_logp_TV + math.log(1 - beta), teacher_logp_TV + math.log(beta)])
    mixture = torch.logsumexp(parts, dim=0)  # in log space as published code has it: exp() of bf16 would lose the tail
    return beta * kl(teacher_logp_TV, mixture) + (1 - beta) * kl(student_logp_TV, mixture)


def liger(cell: Cell, inputs: Inputs, /, *, chunk_tokens: int) -> float:
    """Liger's chunked distillation loss; pure torch, runs without Triton kernels."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETA[cell.divergence],
        temperature=cell.temperature,
        compiled=False,
        chunk_size=chunk_tokens,
    )
    loss = module(
        inputs.hidden_TD, inputs.weight_VD, inputs.teacher_hidden_TE, inputs.teacher_weight_VE, inputs.labels_T
    )
    loss.backward()
    return loss.item()


def trl(cell: Cell, inputs: Inputs, /) -> float:
    """TRL's chunked divergence of its DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss, _, _ = _chunked_divergence_loss(
        student_hidden_states=inputs.hidden_TD[None],
        teacher_hidden_states=inputs.teacher_hidden_TE[None],
        student_lm_head_weight=inputs.weight_VD,
        teacher_lm_head_weight=inputs.teacher_weight_VE,
        completion_mask=torch.ones(1, inputs.labels_T.numel(), dtype=torch.long),
        beta=BETA[cell.divergence],
        temperature=cell.temperature,
    )
    loss.backward()
    return loss.item()


def matmul_floor(cell: Cell, inputs: Inputs, /, *, chunk_tokens: int) -> None:
    """The four matrix products alone, in place and in chunks: nothing that is exact can be faster."""
    with torch.no_grad():
        weight_gradient_VD = torch.zeros_like(inputs.weight_VD)
        hidden_gradient_TD = torch.empty_like(inputs.hidden_TD)
        logits_CV = inputs.weight_VD.new_empty(chunk_tokens, cell.vocab)
        teacher_CV = torch.empty_like(logits_CV)
        for start in range(0, inputs.labels_T.numel(), chunk_tokens):
            hidden_CD = inputs.hidden_TD[start : start + chunk_tokens]
            rows = slice(0, hidden_CD.shape[0])
            torch.mm(hidden_CD, inputs.weight_VD.t(), out=logits_CV[rows])
            teacher_hidden_CE = inputs.teacher_hidden_TE[start : start + chunk_tokens]
            torch.mm(teacher_hidden_CE, inputs.teacher_weight_VE.t(), out=teacher_CV[rows])
            torch.mm(logits_CV[rows], inputs.weight_VD, out=hidden_gradient_TD[start : start + chunk_tokens])
            weight_gradient_VD.addmm_(logits_CV[rows].t(), hidden_CD)


CONTENDERS: dict[str, Contender] = {
    "ours": lambda cell, inputs: ours(cell, inputs, chunk_tokens=512),
    "ours_low_memory": lambda cell, inputs: ours(cell, inputs, chunk_tokens=96),
    "ours_compiled": lambda cell, inputs: ours(cell, inputs, chunk_tokens=512, compile=True),
    "hf_fp32": lambda cell, inputs: full_logits(cell, inputs, upcast=True),
    "full_bf16": lambda cell, inputs: full_logits(cell, inputs, upcast=False),
    "liger_256": lambda cell, inputs: liger(cell, inputs, chunk_tokens=256),
    "trl_chunked": trl,
    "matmul_floor": lambda cell, inputs: matmul_floor(cell, inputs, chunk_tokens=512),
}

LABELS = {
    "ours": "largekd, chunks of 512",
    "ours_low_memory": "largekd, chunks of 96",
    "ours_compiled": "largekd, chunks of 512, compiled rows",
    "hf_fp32": "full logits, .float() (HF loop)",
    "full_bf16": "full logits, models' dtype",
    "liger_256": "Liger, chunks of 256",
    "trl_chunked": "TRL, chunked divergence",
    "matmul_floor": "four matmuls alone (floor)",
}
