"""Which tokens the divergences use: a score per token, a limit, and for a wanted share the quantile of the last step.

The limit of a share comes from the histogram of the step before, over all its tokens and ranks. It is then known
before a token is looked at, so that the choice does not depend on chunks, micro-batches or ranks. The first step
keeps every token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from largekd.config.divergence import SelectionConfig

SCORE_BINS = 4096
LEAST_SCORE, LARGEST_SCORE = 1e-10, 1e3

ScoreName = Literal["teacher_entropy", "student_entropy", "gap"]


@dataclass(frozen=True)
class SelectionRule:
    """The part of a selection that a row function needs; hashable."""

    by: ScoreName
    above: bool

    def keeps(self, score_R: Tensor, *, limit: Tensor) -> Tensor:
        """1 where a token is kept, 0 elsewhere; scores and limit as `bounded` gives them."""
        return (score_R > limit if self.above else score_R < limit).to(score_R.dtype)


def bounded(score: Tensor) -> Tensor:
    """The logarithm of a score in nats, from LEAST_SCORE to LARGEST_SCORE, on [0, 1].

    A teacher is certain of most tokens: only a logarithmic scale tells entropies of 1e-3 from those of 1e-6.
    """
    low, high = math.log(LEAST_SCORE), math.log(LARGEST_SCORE)
    return (score.clamp(LEAST_SCORE, LARGEST_SCORE).log() - low) / (high - low)


def histogram(score_T: Tensor, *, weight_T: Tensor) -> Tensor:
    """(SCORE_BINS,) token weights by bounded score, in float64."""
    bins_T = (score_T * SCORE_BINS).long().clamp_(0, SCORE_BINS - 1)
    counts = torch.zeros(SCORE_BINS, dtype=torch.float64, device=weight_T.device)
    return counts.index_add_(0, bins_T, weight_T.double())


def quantile(histogram_N: Tensor, *, share_below: float) -> Tensor:
    """The bounded score below which `share_below` of the weight lies, linear inside a bin; a scalar on the device."""
    total_N = histogram_N.cumsum(0)
    wanted = total_N[-1] * share_below
    place = torch.searchsorted(total_N, wanted[None]).clamp_(max=histogram_N.numel() - 1)
    before = total_N[place] - histogram_N[place]
    inside = (wanted - before) / histogram_N[place].clamp_min(torch.finfo(histogram_N.dtype).tiny)
    return ((place + inside.clamp(0.0, 1.0)) / histogram_N.numel())[0]


class TokenSelection:
    """The limit of the next step and the share of tokens that it is expected to keep; nothing waits for the device."""

    def __init__(self, config: SelectionConfig, *, device: torch.device) -> None:
        self._config = config
        self.rule = SelectionRule(by=config.by, above=config.keep == "above")
        self._device = device
        if config.threshold is not None:
            self.limit = bounded(torch.tensor(config.threshold, device=device))
        else:
            self.limit = torch.tensor(-1.0 if self.rule.above else 2.0, device=device)
        self.expected_share = 1.0

    def learn(self, histogram_N: Tensor, *, reduce: Callable[[Tensor], Tensor]) -> None:
        """Take the scores of a finished step over all ranks (`reduce` sums); a fixed threshold stays."""
        share = self._config.share
        if share is None:
            return
        total_N = reduce(histogram_N.double())
        limit = quantile(total_N, share_below=1.0 - share if self.rule.above else share).float()
        # A step without a counted token says nothing.
        self.limit = torch.where(total_N.sum() > 0, limit, self.limit)
        self.expected_share = share

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"limit": float(self.limit), "expected_share": self.expected_share}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.limit = torch.tensor(state["limit"], device=self._device)
        self.expected_share = float(state["expected_share"])
