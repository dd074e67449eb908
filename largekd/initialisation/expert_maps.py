"""Which of the teacher's experts each expert of the student is made of.

Shape letters: X the teacher's experts, G groups of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from largekd.initialisation.axes import AxisMap, Mix, Select


@dataclass(frozen=True)
class LayerLoads:
    """What a router did on some text.

    weight_X: mean over tokens of the weight with which each expert's output is added, 0 where it is not chosen.
    similarity_XX: correlation of the experts' router logits over tokens, −1 to 1.
    """

    weight_X: Tensor
    similarity_XX: Tensor


def correspondence(map_: AxisMap, *, of: int) -> list[int]:
    """As objective.router.distil.expert_map says it: for each expert of the model with more of them, that of the other,
    −1 for none. `of`: the teacher's experts; where both have as many, for each of the student's."""
    if isinstance(map_, Select):
        chosen = map_.index_N.tolist()
        if len(chosen) >= of:
            return chosen
        return [chosen.index(expert) if expert in chosen else -1 for expert in range(of)]
    assert isinstance(map_, Mix)
    return map_.matrix_NM.abs().argmax(dim=0).tolist()


def most_used(loads: LayerLoads, *, count: int) -> Tensor:
    """Indices of the `count` experts with the largest load, in their own order; ties go to the first."""
    order_X = loads.weight_X.argsort(descending=True, stable=True)
    return order_X[:count].sort().values


def merged(loads: LayerLoads, *, count: int) -> Mix:
    """(count, X): averages of groups of experts whose router logits go together.

    The two groups with the largest mean similarity become one until `count` are left. An expert counts by its load in
    the average; a group without any load is averaged evenly. Neurons are not permuted: those of
    experts that were trained apart stand in unrelated orders.
    Source: Chen et al. 2024, arXiv 2410.08589 (clustering with average linkage, there of the experts' outputs).
    """
    members_GX = torch.eye(len(loads.weight_X), dtype=torch.float64)
    similarity_XX = loads.similarity_XX.double()
    while len(members_GX) > count:
        size_G = members_GX.sum(dim=1)
        mean_GG = members_GX @ similarity_XX @ members_GX.T / torch.outer(size_G, size_G)
        pairs_GG = torch.ones_like(mean_GG).triu(diagonal=1).bool()
        best = int(mean_GG.masked_fill(~pairs_GG, -torch.inf).argmax())
        kept, joined = divmod(best, len(members_GX))
        members_GX[kept] += members_GX[joined]
        members_GX = torch.cat((members_GX[:joined], members_GX[joined + 1 :]))
    weighted_GX = members_GX * loads.weight_X.double()
    empty_G = weighted_GX.sum(dim=1) == 0
    weighted_GX[empty_G] = members_GX[empty_G]
    return Mix((weighted_GX / weighted_GX.sum(dim=1, keepdim=True)).float())


def expert_map(rule: str | tuple[int, ...], *, count: int, of: int, loads: LayerLoads | None) -> AxisMap:
    """The student's `count` experts out of the teacher's `of`; more of them are repeated side by side."""
    if count >= of:
        return Select(torch.arange(of).repeat_interleave(count // of))
    if not isinstance(rule, str):
        return Select(torch.tensor(rule))
    assert loads is not None
    if rule == "most_used":
        return Select(most_used(loads, count=count))
    return merged(loads, count=count)
