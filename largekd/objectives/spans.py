"""Likelihood of spans of text: what both models give to bytes that the student spells in several tokens.

With P and Q the teacher's and the student's probability of a span, each the product over its own tokens, the term is
the binary KL(P‖Q) = P·log(P/Q) + (1−P)·log((1−P)/(1−Q)). Its slope in S = log Q is (Q − P)/(1 − Q), and S is a sum of
log-probabilities of labels, so that the gradient is that of the tokens' cross-entropies, each times minus the slope.
Source: Minixhofer et al. 2025 (approximate likelihood matching), arXiv 2503.20083, section 3, for f = KL.

Shape letters: T counted tokens, U tokens of spans, X spans, C tokens of one chunk, V student vocabulary.
"""

import torch
from torch import Tensor

from largekd.contracts import Translation
from largekd.objectives.divergences import LOG_FLOOR
from largekd.objectives.rows import HeadShape

_LEAST = 1e-6
"""The least 1 − Q: beyond it a span is certain and has nothing to learn."""


def binary_kl(teacher_logp_X: Tensor, student_logq_X: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope ∂/∂(log Q) per span."""
    logp_X = teacher_logp_X.clamp(LOG_FLOOR, 0.0)
    logq_X = student_logq_X.clamp(LOG_FLOOR, 0.0)
    p_X, q_X = logp_X.exp(), logq_X.exp()
    not_p_X, not_q_X = (-torch.expm1(side).clamp_max(-_LEAST) for side in (logp_X, logq_X))
    value_X = p_X * (logp_X - logq_X) + not_p_X * (not_p_X.log() - not_q_X.log())
    return value_X, (q_X - p_X) / not_q_X


def label_log_probabilities(
    hidden_UD: Tensor,
    labels_U: Tensor,
    *,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    head: HeadShape,
    chunk_tokens: int,
) -> Tensor:
    """log q[label] at temperature 1 for each row, without the logits of more than one chunk."""
    vocab = head.vocab_size
    parts = []
    for start in range(0, labels_U.numel(), chunk_tokens):
        span = slice(start, start + chunk_tokens)
        projected_CV = torch.mm(hidden_UD[span].to(weight_VD.dtype), weight_VD[:vocab].t())
        logits_CV = head.logits(projected_RV=projected_CV, bias_V=None if bias_V is None else bias_V[:vocab])
        chosen_C = logits_CV.gather(-1, labels_U[span, None]).squeeze(-1)
        parts.append(chosen_C - torch.logsumexp(logits_CV, dim=-1))
    return torch.cat(parts) if parts else hidden_UD.new_zeros(0, dtype=torch.float32)


def span_terms(
    logq_U: Tensor, *, translation: Translation, scored_logp_L: Tensor, weight_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ_x weight · D_x, and per counted token the negated slope times the weight (0 outside of spans).

    A span's weight is its first token's.
    """
    spans = translation.span_G.numel()
    weight_X = weight_T[translation.span_first_T]
    span_U, token_U = translation.span_of_U, translation.span_token_U
    logq_X = logq_U.new_zeros(spans).index_add_(0, span_U, logq_U)
    value_X, slope_X = binary_kl(scored_logp_L[translation.span_G].to(logq_U.dtype), logq_X)
    hard_T = weight_T.new_zeros(weight_T.shape).index_add_(0, token_U, (-slope_X * weight_X)[span_U].to(weight_T.dtype))
    return (value_X * weight_X).sum(), hard_T
