"""Drawing one token per row, each row by its own rule, with how near the choice was to another one.

A row's token is a function of its logits, its rule and its uniform number alone. Two computations of the same row
differ by rounding; they choose the same token unless the margin is as small as that.
Shape letters: B rows, V vocabulary, K sorted entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Sorted at first; rows that need more, see _enough, then sort so many times as many.
_SORTED, _MORE = 256, 16


@dataclass(frozen=True)
class RowRule:
    """softmax(logits / temperature), cut to the `top_k` likeliest, to the likeliest that have the mass `top_p`, and to
    those with at least `min_p` of the likeliest's. Temperature 0: the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0

    @property
    def is_cut(self) -> bool:
        """Whether the order of the probabilities matters."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k is not None or self.min_p > 0)


@dataclass(frozen=True)
class Drawn:
    """ids_B; logp_B, their log-probabilities at temperature 1 over all ids; margin_B.

    The margin of temperature 0 is the gap between the two largest logits; else the distance, in cumulative mass, of the
    uniform number from the nearer end of the drawn token's interval; or, if nearer, how far a cut is from taking one
    entry more or less: in mass for top_p, in log-probability for top_k and min_p.
    """

    ids_B: Tensor
    logp_B: Tensor
    margin_B: Tensor


def draw_rows(logits_BV: Tensor, *, rules: Sequence[RowRule], uniform_B: Tensor, ids: int) -> Drawn:
    """One token for each row; `uniform_B` float64 in [0, 1), `ids`: how many of the columns are tokens."""
    usable_BV = logits_BV[:, :ids].float()
    drawn_B = torch.zeros(len(rules), dtype=torch.int64, device=logits_BV.device)
    margin_B = torch.zeros(len(rules), dtype=torch.float64, device=logits_BV.device)
    for name, chooser in (("greedy", _likeliest), ("plain", _plain), ("cut", _cut)):
        rows = [place for place, rule in enumerate(rules) if _kind(rule) == name]
        if rows:
            at = torch.tensor(rows, device=logits_BV.device)
            found = chooser(usable_BV[at], [rules[place] for place in rows], uniform_B[at])
            drawn_B[at], margin_B[at] = found
    picked_B = usable_BV.gather(-1, drawn_B[:, None]).squeeze(-1)
    return Drawn(drawn_B, picked_B - torch.logsumexp(usable_BV, dim=-1), margin_B)


def _kind(rule: RowRule) -> str:
    return "greedy" if rule.temperature == 0 else "cut" if rule.is_cut else "plain"


def _likeliest(logits_BV: Tensor, rules: Sequence[RowRule], uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    del rules, uniform_B
    # Of equal logits the first id, on every machine.
    best = logits_BV.topk(min(2, logits_BV.shape[1]), dim=-1).values.double()
    return logits_BV.argmax(-1), best[:, 0] - best[:, -1]


def _probabilities(logits_BV: Tensor, rules: Sequence[RowRule]) -> Tensor:
    temperature_B1 = logits_BV.new_tensor([[rule.temperature] for rule in rules], dtype=torch.float64)
    return torch.softmax(logits_BV.double() / temperature_B1, dim=-1)


def _plain(logits_BV: Tensor, rules: Sequence[RowRule], uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    return invert(_probabilities(logits_BV, rules), uniform_B=uniform_B)


def _cut(logits_BV: Tensor, rules: Sequence[RowRule], uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    return draw_cut(_probabilities(logits_BV, rules), rules, uniform_B)


def draw_cut(
    p_BV: Tensor, rules: Sequence[RowRule], uniform_B: Tensor, *, count: int = _SORTED
) -> tuple[Tensor, Tensor]:
    """Ids and margins (B,) by the rules' cuts of probabilities; how many are sorted at first, `count`, changes nothing.

    Rows that need more are told apart by one synchronisation with the device.
    """
    sorted_BK, ids_BK = _largest(p_BV, count=count)
    kept_BK, edge_B = _kept(sorted_BK, rules)
    place_B, margin_B = invert(kept_BK, uniform_B=uniform_B)
    drawn_B, margin_B = ids_BK.gather(-1, place_B[:, None]).squeeze(-1), torch.minimum(margin_B, edge_B)
    if count < p_BV.shape[1]:
        short = (~_enough(sorted_BK, rules, ids=p_BV.shape[1])).nonzero().flatten().tolist()
        if short:
            rest = draw_cut(p_BV[short], [rules[place] for place in short], uniform_B[short], count=_MORE * count)
            drawn_B[short], margin_B[short] = rest
    return drawn_B, margin_B


def _largest(p_BV: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest probabilities in falling order and their ids; of equal ones the smaller id comes first."""
    if count >= p_BV.shape[1]:
        sorted_BV, ids_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        return sorted_BV, ids_BV
    ids_BK = p_BV.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    sorted_BK, order_BK = p_BV.gather(-1, ids_BK).sort(dim=-1, descending=True, stable=True)
    return sorted_BK, ids_BK.gather(-1, order_BK)


def _enough(sorted_BK: Tensor, rules: Sequence[RowRule], *, ids: int) -> Tensor:
    """(B,) whether what a rule looks at lies above the last entry: others equal to that may be missing."""
    top_p_B = sorted_BK.new_tensor([rule.top_p for rule in rules])
    min_p_B = sorted_BK.new_tensor([rule.min_p for rule in rules])
    # 0: no cut. All k are needed, for what is left of them has the mass 1 that top_p is a part of.
    top_k = [rule.top_k if rule.top_k is not None and rule.top_k < ids else 0 for rule in rules]
    top_k_B = torch.tensor(top_k, device=sorted_BK.device)
    least_B = sorted_BK[:, -1]
    above_BK = sorted_BK > least_B[:, None]
    mass_B = sorted_BK.masked_fill(~above_BK, 0.0).sum(-1)
    few_B = (mass_B > top_p_B) | (least_B < min_p_B * sorted_BK[:, 0])
    return torch.where(top_k_B > 0, above_BK.sum(-1) >= top_k_B, few_B)


def _kept(sorted_BK: Tensor, rules: Sequence[RowRule]) -> tuple[Tensor, Tensor]:
    """What the cuts leave of each row, and how near a cut is to taking one entry more or less."""
    top_p_B1 = sorted_BK.new_tensor([[rule.top_p] for rule in rules])
    min_p_B1 = sorted_BK.new_tensor([[rule.min_p] for rule in rules])
    count = sorted_BK.shape[1]
    top_k_B1 = torch.tensor([[rule.top_k or count] for rule in rules], device=sorted_BK.device)
    edge_B = sorted_BK.new_ones(len(rules))
    place_1K = torch.arange(count, device=sorted_BK.device)[None]
    in_k_BK = place_1K < top_k_B1
    # The k-th and the next one may change places.
    last_B1 = (top_k_B1 - 1).clamp(max=count - 1)
    next_B1 = sorted_BK.gather(-1, (last_B1 + 1).clamp(max=count - 1))
    gap_B = (sorted_BK.gather(-1, last_B1).log() - next_B1.log()).squeeze(-1)
    edge_B = torch.where((top_k_B1 < count).squeeze(-1), torch.minimum(edge_B, gap_B), edge_B)
    kept_BK = sorted_BK.masked_fill(~in_k_BK, 0.0)
    # A row without a top_k keeps its own probabilities, whatever rules the other rows have.
    kept_BK = torch.where(top_k_B1 < count, kept_BK / kept_BK.sum(-1, keepdim=True), kept_BK)
    before_BK = kept_BK.cumsum(-1) - kept_BK
    near_B = (before_BK - top_p_B1).abs().min(-1).values
    edge_B = torch.where((top_p_B1 < 1).squeeze(-1), torch.minimum(edge_B, near_B), edge_B)
    least_B1 = min_p_B1 * kept_BK[:, :1]
    near_B = (kept_BK.log() - least_B1.log()).abs().min(-1).values
    edge_B = torch.where((min_p_B1 > 0).squeeze(-1), torch.minimum(edge_B, near_B), edge_B)
    outside_BK = ((before_BK >= top_p_B1) & (top_p_B1 < 1)) | (kept_BK < least_B1)
    return kept_BK.masked_fill(outside_BK, 0.0), edge_B


def invert(p_BK: Tensor, *, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first place whose cumulative mass exceeds uniform · total, and the distance of that from its two ends."""
    mass_BK = p_BK.cumsum(-1)
    total_B1 = mass_BK[:, -1:]
    wanted_B1 = uniform_B[:, None] * total_B1
    place_B1 = torch.searchsorted(mass_BK, wanted_B1, right=True).clamp(max=p_BK.shape[1] - 1)
    above_B1 = mass_BK.gather(-1, place_B1)
    below_B1 = above_B1 - p_BK.gather(-1, place_B1)
    margin_B1 = torch.minimum(wanted_B1 - below_B1, above_B1 - wanted_B1) / total_B1
    return place_B1.squeeze(-1), margin_B1.squeeze(-1)
