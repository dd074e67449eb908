"""Attention heads of two models brought to one number, and how much each of them counts.

Shape letters: B sequences, Q queries, K columns of a map, H heads, P pairs of layers.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from largekd.config.alignment import AttentionConfig
from largekd.errors import ConfigError
from largekd.models.taps import AttentionShape
from largekd.objectives.blockwise import precise

Importance = Literal["uniform", "learned", "entropy", "variance"]

_FLATNESS = 1e-4
"""Added to every head's squared coefficient of variation: a row whose maps are all flat then has equal weights."""


def matched_heads(config: AttentionConfig, /, *, student: AttentionShape, teacher: AttentionShape) -> int:
    """The number of heads on which both models' maps are compared.

    group and pool: the smaller count; repeat: the larger one. Loss `relation`: its relation heads.
    Raises ConfigError where the counts (or, for relations, the widths) cannot be brought together.
    """
    if config.loss == "relation":
        _check_relations(config, shapes={"student": student, "teacher": teacher})
        return config.relation_heads
    low, high = sorted((student.heads, teacher.heads))
    if config.match_heads != "pool" and high % low:
        raise ConfigError(
            f"objective.attention.{config.name}.match_heads is {config.match_heads!r}, but the student has "
            f"{student.heads} heads and the teacher {teacher.heads}: the larger count must be a multiple of the "
            "smaller. Set match_heads to 'pool', which takes any two counts"
        )
    return high if config.match_heads == "repeat" else low


def _check_relations(config: AttentionConfig, /, *, shapes: dict[str, AttentionShape]) -> None:
    letters = dict.fromkeys("".join(config.relations))
    for model, shape in shapes.items():
        for letter in letters:
            width = shape.total_width(letter)
            if width % config.relation_heads:
                raise ConfigError(
                    f"objective.attention.{config.name}.relation_heads is {config.relation_heads}, which does not "
                    f"divide the {model}'s width {width} of all its {shape.heads} heads: choose a common divisor of "
                    "both models' widths"
                )


def matching_weights(count: int, into: int, /, *, like: Tensor) -> Tensor | None:
    """(into, count): adaptive average pooling of `count` heads to `into`; None: they are equal.

    Output o averages the heads [⌊o·count/into⌋, ⌈(o+1)·count/into⌉). That is the mean of equal groups where `into`
    divides `count`, and repetition where `count` divides `into`. It is made on the device, without a copy from the
    host.
    """
    if count == into:
        return None
    out = torch.arange(into, device=like.device)
    start, end = out * count // into, -(-(out + 1) * count // into)
    head = torch.arange(count, device=like.device)
    inside = (head >= start[:, None]) & (head < end[:, None])
    return inside.to(like.dtype) / (end - start)[:, None]


def match_maps(maps_BHQK: Tensor, weights: Tensor | None, /) -> Tensor:
    """The maps with their heads averaged by `weights`; rows remain distributions."""
    if weights is None:
        return maps_BHQK
    return torch.matmul(weights, maps_BHQK.flatten(2)).unflatten(2, maps_BHQK.shape[2:])


class LearnedHeadWeights(nn.Module):
    """softmax of a parameter that starts at zero: one row per pair, one column per matched head.

    One parameter for all pairs, so that a pair that is not drawn gets the gradient 0 and not a stale one. Trained on
    the loss alone, the weights move to the heads that are easiest to match; its learning rate bounds how far.
    """

    def __init__(self, *, pairs: int, heads: int) -> None:
        super().__init__()
        self.logits_PH = nn.Parameter(torch.zeros(pairs, heads))

    def forward(self) -> Tensor:
        """(pairs, heads) in at least float32; every row sums to 1."""
        return torch.softmax(self.logits_PH.to(precise(self.logits_PH.dtype)), dim=-1)


@torch.no_grad()
def teacher_importance(kind: Importance, teacher_BHQK: Tensor, /, *, columns_BQ: Tensor) -> Tensor:
    """(B, H, Q) weights of the heads of each query row, from the teacher's row alone; they sum to 1 over heads.

    entropy: ∝ exp(−Σ −p log p), the inverse of the number of keys that a head effectively looks at.
    variance: ∝ the variance of p over its visible columns, as n·Σp² − 1 (n: `columns_BQ`), the squared coefficient of
    variation. Both give a focused head more than a diffuse one; both are our choice of formula. A row's weights depend
    on nothing but the row, so that blocks, padding and other samples cannot change them.
    """
    if kind == "entropy":
        return torch.softmax(torch.special.xlogy(teacher_BHQK, teacher_BHQK).sum(-1), dim=1)
    assert kind == "variance"
    spread = columns_BQ[:, None] * teacher_BHQK.square().sum(-1) - 1
    spread = spread.clamp_min(0) + _FLATNESS
    return spread / spread.sum(1, keepdim=True)
