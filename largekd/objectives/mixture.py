"""The mixture of several teachers' distributions in a block of rows.

Shape letters: R rows, V shared ids, M members, F figures of MIXTURE_NAMES.

p(v) = Σ_m w_m · p_m(v). At a temperature T it is the mixture of the tempered distributions, p_m ∝ exp(z_m / T): each
member is softened by itself, and the weights mean the same at every temperature. Weights by confidence and
responsibilities are always taken at temperature 1.

Everything is a sum of logarithms: a weight of 0 leaves the other members bit for bit as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from largekd.objectives.divergences import LOG_FLOOR, entropy, log_probabilities


@dataclass(frozen=True)
class MixtureRule:
    """How weights come about, as far as a row function must know; hashable.

    confidence_scale: nats of entropy that divide a member's weight by e; None: entropy does not matter.
    learned: responsibilities for the labels are wanted.
    """

    confidence_scale: float | None = None
    learned: bool = False


AS_THEY_ARE = MixtureRule()
"""Weights that no row changes."""


@dataclass(frozen=True)
class MixtureRows:
    """The members' projections hidden · weightᵀ of one block, their biases, log-weights, and each row's own member.

    route_R: a member's place, −1 where the weights decide; None: nowhere.
    """

    members_RV: tuple[Tensor, ...]
    biases_V: tuple[Tensor | None, ...]
    log_weight_M: Tensor
    route_R: Tensor | None = None


@dataclass(frozen=True)
class Mixture:
    """The members' logits over the shared ids, and the weights of each row.

    plain_RV: log-probabilities at temperature 1; empty where nothing needs them.
    """

    logits_RV: tuple[Tensor, ...]
    plain_RV: tuple[Tensor, ...]
    log_weight_RM: Tensor

    @classmethod
    def of(cls, logits_RV: Sequence[Tensor], *, rows: MixtureRows, rule: MixtureRule, reads_one: bool) -> "Mixture":
        """`reads_one`: the mixture at temperature 1 will be asked for."""
        plain_RV: tuple[Tensor, ...] = ()
        if reads_one or rule.learned or rule.confidence_scale is not None:
            plain_RV = tuple(log_probabilities(member_RV) for member_RV in logits_RV)
        log_weight_RM = rows.log_weight_M.expand(logits_RV[0].shape[0], -1)
        if rule.confidence_scale is not None:
            entropy_RM = torch.stack([entropy(logp_RV, logp_RV.exp()) for logp_RV in plain_RV], dim=-1)
            log_weight_RM = torch.log_softmax(log_weight_RM - entropy_RM / rule.confidence_scale, dim=-1)
        if rows.route_R is not None:
            member_M = torch.arange(log_weight_RM.shape[-1], device=log_weight_RM.device)
            chosen_RM = torch.where(member_M == rows.route_R[:, None], 0.0, float("-inf")).to(log_weight_RM.dtype)
            log_weight_RM = torch.where(rows.route_R[:, None] >= 0, chosen_RM, log_weight_RM)
        return cls(tuple(logits_RV), plain_RV, log_weight_RM)

    def log_probabilities(self, *, inverse_temperature: Tensor | None) -> Tensor:
        """log Σ_m w_m · p_m, floored at LOG_FLOOR; None stands for temperature 1."""
        if inverse_temperature is None:
            members_RV = self.plain_RV
        else:
            members_RV = tuple(log_probabilities(member_RV * inverse_temperature) for member_RV in self.logits_RV)
        assert len(members_RV) == len(self.logits_RV), "the mixture at temperature 1 was not announced"
        total_RV = members_RV[0] + self.log_weight_RM[:, :1]
        for place, member_RV in enumerate(members_RV[1:], start=1):
            total_RV = torch.logaddexp(total_RV, member_RV + self.log_weight_RM[:, place, None])
        return total_RV.clamp_min(LOG_FLOOR)

    def figures(self, labels_R: Tensor, *, rule: MixtureRule, student_logq_RV: Tensor | None) -> Tensor:
        """(rows, len(MIXTURE_NAMES), members): weight, and 0 for what was not asked for.

        responsibility: w_m · p_m[label] / Σ, the posterior of the member; 0 for a label that is no shared id.
        student_logq_RV: at temperature 1, for kl_t1 = KL(p_m‖q) and teacher_ce = −log p_m[label] (infinite for a label
        that is no shared id); None: they are not wanted.
        """
        weight_RM = self.log_weight_RM.exp()
        parts = [weight_RM, *[torch.zeros_like(weight_RM)] * 3]
        if rule.learned or student_logq_RV is not None:
            known_R1 = labels_R[:, None] < self.plain_RV[0].shape[-1]
            place_R1 = torch.where(known_R1, labels_R[:, None], 0)
            label_logp_RM = torch.cat([logp_RV.gather(-1, place_R1) for logp_RV in self.plain_RV], dim=-1)
            posterior_RM = torch.softmax(self.log_weight_RM + label_logp_RM, dim=-1)
            parts[1] = torch.where(known_R1, posterior_RM, 0.0)
            if student_logq_RV is not None:
                distances = [(logp_RV.exp() * (logp_RV - student_logq_RV)).sum(-1) for logp_RV in self.plain_RV]
                parts[2] = torch.stack(distances, dim=-1)
                parts[3] = torch.where(known_R1, -label_logp_RM, float("inf"))
        return torch.stack(parts, dim=1)
