"""Policy gradient of sequence-level reverse KL: rewards, what a token could expect, and the clipped surrogate.

A sample y of the student has the reward r_t = log p(y_t) − log q_old(y_t) at each token, p the teacher's and q_old the
student's probability when y was drawn, at temperature 1. With the return R_t = Σ_{s≥t} γ^(s−t) r_s,
    ∇ KL(q‖p) = −E_y Σ_t R_t · ∇ log q(y_t)   for γ = 1 and y drawn from q itself,
and any baseline that does not depend on y_t or what follows may be taken from R_t. Drawing at another temperature, or
from a part of the vocabulary, is no longer drawing from q: the mean then is of another divergence.
Sources: Gu et al. 2024 (MiniLLM), arXiv 2306.08543, section 2.2; the clipped ratio is of Schulman et al. 2017, arXiv
1707.06347, equation 7; leave-one-out baselines of Kool et al. 2019.

Shape letters: T counted tokens, L tokens of one sample.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from largekd.config.rollouts import PolicyGradientConfig

Floats = NDArray[np.float64]


def clipped_terms(
    logq_T: Tensor, *, sampled_logq_T: Tensor, advantage_T: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """−min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A) with ρ = q / q_old, and its slope in log q: −ρ·A, or 0 where clipped."""
    # Where nothing was sampled the advantage is 0; a ratio that overflows would make it not a number.
    ratio_T = (logq_T - sampled_logq_T).clamp(max=80.0).exp()
    plain_T = ratio_T * advantage_T
    if clip is None:
        return -plain_T, -plain_T
    limited_T = ratio_T.clamp(1.0 - clip, 1.0 + clip) * advantage_T
    return -torch.minimum(plain_T, limited_T), torch.where(plain_T <= limited_T, -plain_T, 0.0)


def returns_to_go(reward_L: Floats, *, discount: float, length_normalise: bool) -> Floats:
    """R_t = Σ_{s≥t} γ^(s−t) r_s; normalised: divided by Σ_{s≥t} γ^(s−t), the mean reward that is still to come."""
    total_L, weight_L = np.empty_like(reward_L), np.empty_like(reward_L)
    total, weight = 0.0, 0.0
    for place in range(len(reward_L) - 1, -1, -1):
        total, weight = reward_L[place] + discount * total, 1.0 + discount * weight
        total_L[place], weight_L[place] = total, weight
    return total_L / weight_L if length_normalise else total_L


def advantages(rewards: Sequence[Floats], *, groups: Sequence[int], config: PolicyGradientConfig) -> list[Floats]:
    """Per sample the returns less the baseline.

    groups: samples with the same number are answers to the same prompt; leave_one_out needs two or more of each.
    batch_mean is the mean of all returns, the token's own included, which shrinks the gradient a little; leave_one_out
    is the mean over the prompt's other samples of the return at the same position, 0 beyond their ends, and leaves the
    mean gradient as it is.
    """
    returns = [
        returns_to_go(reward_L, discount=config.discount, length_normalise=config.length_normalise)
        for reward_L in rewards
    ]
    match config.baseline:
        case "none":
            return returns
        case "batch_mean":
            tokens = sum(len(return_L) for return_L in returns)
            mean = sum(float(return_L.sum()) for return_L in returns) / max(tokens, 1)
            return [return_L - mean for return_L in returns]
    return [_without_others(place, returns=returns, groups=groups) for place in range(len(returns))]


def _without_others(place: int, *, returns: Sequence[Floats], groups: Sequence[int]) -> Floats:
    own_L = returns[place]
    others = [index for index, group in enumerate(groups) if group == groups[place] and index != place]
    assert others, "a sample with no other sample of its prompt has no baseline"
    total_L = np.zeros_like(own_L)
    for index in others:
        shared = min(len(own_L), len(returns[index]))
        total_L[:shared] += returns[index][:shared]
    return own_L - total_L / len(others)
