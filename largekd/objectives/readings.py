"""What a block of rows knows of the teacher: pairs of distributions, and the way back from outcomes to logits.

Shape letters: R rows, V student ids that take part, W teacher ids, K kept entries, O outcomes of a pair.

A reading offers a `pair` over some outcomes and `gradient(slope_RO)`: with slope s = ∂D/∂(log q) over the outcomes and
m = Σ s, the gradient with respect to the student's logits (after the temperature) of any D of that pair.

Dense: the outcomes are the ids, the gradient is s − q·m.
Tail: K ids and "all others". With w the student's distribution among the others, ∂D/∂z = w·(s_tail − q_tail·m) there,
and s − q·m at the ids. A coarser set of outcomes cannot increase an f-divergence (data processing inequality).
Renormalised: the K ids as if they were all; nothing is learnt about the others, and mass moves to the kept ids.
Dropped: the sum of D over the K ids alone, with probabilities that do not sum to one; not a divergence, may be
negative, and pulls the student's kept mass beyond the teacher's.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from largekd.objectives.divergences import LOG_FLOOR, DistributionPair, log_probabilities, logit_gradient

SparseKind = Literal["tail", "renormalise", "drop", "sampled"]


class Reading(Protocol):
    """A pair of distributions and the gradient of a function of it."""

    @property
    def pair(self) -> DistributionPair: ...

    def gradient(self, slope_RO: Tensor, /) -> Tensor:
        """(rows, student ids)."""
        ...


@dataclass(frozen=True)
class DenseReading:
    """Both distributions over the same ids (or, for sorted probabilities, over the ids of each)."""

    pair: DistributionPair

    def gradient(self, slope_RO: Tensor, /) -> Tensor:
        """s − q·Σs."""
        return logit_gradient(self.pair.student_q_RV, slope_RO, slope_RO.sum(-1))


@dataclass(frozen=True)
class SparseEntries:
    """Kept ids with log-probabilities at temperature 1; `tail_R` as in TopKSignal, for the temperature of use."""

    ids_RK: Tensor
    logp_RK: Tensor
    tail_R: Tensor

    @property
    def empty(self) -> Tensor:
        """(rows, K) true for entries that hold nothing."""
        return torch.isneginf(self.logp_RK)

    def log_masses(self, *, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalised log-probabilities of the entries and of the tail, at the temperature."""
        logp_RK = self.logp_RK if temperature is None else self.logp_RK / temperature
        total_R = torch.logaddexp(torch.logsumexp(logp_RK, dim=-1), self.tail_R)
        return (logp_RK - total_R[:, None]).clamp_min(LOG_FLOOR), (self.tail_R - total_R).clamp_min(LOG_FLOOR)


@dataclass(frozen=True)
class TailReading:
    """K ids and the tail as one outcome, which comes last."""

    pair: DistributionPair
    ids_RK: Tensor
    among_tail_RV: Tensor

    @classmethod
    def of(cls, entries: SparseEntries, *, student_RV: Tensor, temperature: Tensor | None) -> "TailReading":
        """From the student's logits after the temperature."""
        logp_RK, tail_logp_R = entries.log_masses(temperature=temperature)
        # An empty entry stands in for the first one: it is masked twice, and has no probability on either side.
        ids_RK = torch.where(entries.empty, entries.ids_RK[:, :1], entries.ids_RK)
        logq_RK, total_R = _student_entries(student_RV, ids_RK=ids_RK, empty_RK=entries.empty)
        rest_RV = student_RV.scatter(-1, ids_RK, float("-inf"))
        # Where nothing is left the floor keeps −inf − (−inf) away.
        tail_R = torch.logsumexp(rest_RV, dim=-1).clamp_min(LOG_FLOOR)
        logq_RO = torch.cat([logq_RK, (tail_R - total_R).clamp_min(LOG_FLOOR)[:, None]], dim=-1)
        logp_RO = torch.cat([logp_RK, tail_logp_R[:, None]], dim=-1)
        pair = DistributionPair.of_logs(teacher_logp_RV=logp_RO, student_logq_RV=logq_RO)
        return cls(pair, ids_RK, (rest_RV - tail_R[:, None]).exp())

    def gradient(self, slope_RO: Tensor, /) -> Tensor:
        """See the module."""
        outcome_RO = logit_gradient(self.pair.student_q_RV, slope_RO, slope_RO.sum(-1))
        gradient_RV = self.among_tail_RV * outcome_RO[:, -1:]
        return gradient_RV.scatter_add_(-1, self.ids_RK, outcome_RO[:, :-1])


@dataclass(frozen=True)
class RenormalisedReading:
    """The K ids as if there were no others."""

    pair: DistributionPair
    ids_RK: Tensor
    width: int

    @classmethod
    def of(cls, entries: SparseEntries, *, student_RV: Tensor, temperature: Tensor | None) -> "RenormalisedReading":
        """From the student's logits after the temperature."""
        teacher_RK = entries.logp_RK if temperature is None else entries.logp_RK / temperature
        student_RK = student_RV.gather(-1, entries.ids_RK).masked_fill(entries.empty, float("-inf"))
        pair = DistributionPair.of_logits(teacher_RV=teacher_RK, student_RV=student_RK)
        return cls(pair, entries.ids_RK, student_RV.shape[-1])

    def gradient(self, slope_RO: Tensor, /) -> Tensor:
        """Zero beyond the kept ids."""
        outcome_RK = logit_gradient(self.pair.student_q_RV, slope_RO, slope_RO.sum(-1))
        gradient_RV = outcome_RK.new_zeros(outcome_RK.shape[0], self.width)
        return gradient_RV.scatter_add_(-1, self.ids_RK, outcome_RK)


@dataclass(frozen=True)
class DroppedReading:
    """The K ids with their own probabilities; the sum over all others is left out."""

    pair: DistributionPair
    ids_RK: Tensor
    q_RV: Tensor

    @classmethod
    def of(cls, entries: SparseEntries, *, student_RV: Tensor, temperature: Tensor | None) -> "DroppedReading":
        """From the student's logits after the temperature."""
        logp_RK, _ = entries.log_masses(temperature=temperature)
        logq_RV = log_probabilities(student_RV)
        logq_RK = logq_RV.gather(-1, entries.ids_RK).masked_fill(entries.empty, LOG_FLOOR)
        pair = DistributionPair.of_logs(teacher_logp_RV=logp_RK, student_logq_RV=logq_RK)
        return cls(pair, entries.ids_RK, logq_RV.exp())

    def gradient(self, slope_RO: Tensor, /) -> Tensor:
        """s at the ids, and −q·Σs everywhere."""
        return (-self.q_RV * slope_RO.sum(-1, keepdim=True)).scatter_add_(-1, self.ids_RK, slope_RO)


def sparse_reading(
    entries: SparseEntries, *, kind: SparseKind, student_RV: Tensor, temperature: Tensor | None
) -> Reading:
    """The reading of that kind; the student's logits have been divided by the temperature."""
    match kind:
        case "tail":
            return TailReading.of(entries, student_RV=student_RV, temperature=temperature)
        case "renormalise":
            return RenormalisedReading.of(entries, student_RV=student_RV, temperature=temperature)
        case "drop":
            return DroppedReading.of(entries, student_RV=student_RV, temperature=temperature)
        case "sampled":
            raise AssertionError("drawn ids are no reading of a pair")


def sampled_forward_kl(*, ids_RK: Tensor, weight_RK: Tensor, logp_RK: Tensor, logq_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_k w_k·(log p − log q) at drawn ids and its logit gradient q·Σw − Σ_k w_k·onehot(id_k).

    With E[Σ_k w_k·onehot(id_k)] = p both have the mean of KL(p‖q) and of its gradient q − p, whatever the number of
    draws. Source: Anshumann et al. 2025 (random sampling knowledge distillation), arXiv 2503.16870, section 3.
    """
    value_R = (weight_RK * (logp_RK - logq_RV.gather(-1, ids_RK))).sum(-1)
    gradient_RV = logq_RV.exp() * weight_RK.sum(-1, keepdim=True)
    return value_R, gradient_RV.scatter_add_(-1, ids_RK, -weight_RK)


def _student_entries(student_RV: Tensor, *, ids_RK: Tensor, empty_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the entries over all ids, and the normaliser."""
    total_R = torch.logsumexp(student_RV, dim=-1)
    logq_RK = student_RV.gather(-1, ids_RK) - total_R[:, None]
    return logq_RK.masked_fill(empty_RK, LOG_FLOOR).clamp_min(LOG_FLOOR), total_R
