"""Drawing tokens so that a sample depends on its own seed alone, not on the batch or the rank that it is written in.

Shape letters: B sequences, V vocabulary, L tokens of an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from largekd.generation.row_draws import RowRule, draw_cut, invert

Seed = tuple[int, ...]


@dataclass(frozen=True)
class DrawRule:
    """What is drawn from: softmax(logits / temperature) over the first `ids` ids, cut to the `top_k` likeliest and to
    the likeliest that have the mass `top_p`. Temperature 0 takes the likeliest id."""

    ids: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None


class SeededDraws(LogitsProcessor):
    """Draws by inverting the cumulative distribution at one uniform number per token, and leaves nothing but the drawn
    id for the arg-max of a greedy search.
    """

    def __init__(self, rule: DrawRule, *, seeds: Sequence[Seed], max_new_tokens: int, device: torch.device) -> None:
        self._rule = rule
        uniforms = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
        self._uniforms_BL = torch.from_numpy(uniforms).to(device)
        self._logq: list[Tensor] = []

    @property
    def log_probabilities(self) -> Tensor:
        """log q of each drawn id at temperature 1, over all ids: (B, tokens so far) float32."""
        return torch.stack(self._logq, dim=1)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V) that are 0 at the drawn id and −inf elsewhere."""
        logits_BV = scores.float()
        chosen_B = draw(logits_BV, rule=self._rule, uniform_B=self._uniforms_BL[:, len(self._logq)])
        picked_B = logits_BV.gather(-1, chosen_B[:, None]).squeeze(-1)
        self._logq.append(picked_B - torch.logsumexp(logits_BV, dim=-1))
        drawn_BV = torch.full_like(scores, float("-inf"))
        drawn_BV.scatter_(-1, chosen_B[:, None], 0.0)
        return cast(torch.FloatTensor, drawn_BV)


def draw(logits_BV: Tensor, *, rule: DrawRule, uniform_B: Tensor) -> Tensor:
    """(B,) ids; `uniform_B` in [0, 1). The cumulative sums are in float64."""
    usable_BV = logits_BV[:, : rule.ids]
    if rule.temperature == 0:
        return usable_BV.argmax(-1)
    p_BV = torch.softmax(usable_BV.double() / rule.temperature, dim=-1)
    if rule.top_k is not None and rule.top_k < p_BV.shape[1]:
        least_B1 = p_BV.topk(rule.top_k, dim=-1).values[:, -1:]
        p_BV = p_BV.masked_fill(p_BV < least_B1, 0.0)
        p_BV = p_BV / p_BV.sum(-1, keepdim=True)
    if rule.top_p == 1.0:
        return invert(p_BV, uniform_B=uniform_B)[0]
    return draw_cut(p_BV, [RowRule(top_p=rule.top_p)] * len(p_BV), uniform_B)[0]
