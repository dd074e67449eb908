"""Loads of the experts over a whole step: what the next step is balanced by, and what the records show.

The load that balances a step is that of the step before, over all its positions, micro-batches and ranks: it is known
before a token is routed, so that the term does not depend on how a step is split. A load known only in part would.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from largekd.objectives.router import RouterTerms


class RouterLoads:
    """Loads and figures of `RouterTerms`; nothing waits for the device before `figures` or `heat_map`."""

    def __init__(self, terms: RouterTerms, *, device: torch.device) -> None:
        self._terms = terms
        self._device = device
        self._shape = (len(terms.layers), terms.experts)
        # Equal loads give the balance no gradient: the first step has seen no token yet.
        self.share_LX = torch.full(self._shape, 1.0 / terms.experts, device=device)
        self._window: Tensor | None = None

    def learn(self, figures_F: Tensor, *, reduce: Callable[[Tensor], Tensor]) -> None:
        """Take the figures of a finished step, this rank's sums (`reduce` adds the ranks')."""
        total_F = reduce(figures_F.double())
        load_LX = self._load(total_F)
        count_L1 = load_LX.sum(1, keepdim=True)
        # A step without a position says nothing.
        share_LX = (load_LX / count_L1.clamp_min(1.0)).float()
        self.share_LX = torch.where(count_L1 > 0, share_LX, self.share_LX)
        self._window = total_F if self._window is None else self._window + total_F

    def figures(self) -> dict[str, float]:
        """Metrics `router/…` over the steps since they were last asked for; none without a step. Starts anew.

        max_load: largest load / mean load, 1 where all are equal. dead_frac: share of experts without a token.
        entropy: of the routing distribution, nats per token. overlap: share of the teacher's chosen experts that the
        student chose too. Means over layers, and per layer where they can differ.
        """
        if self._window is None:
            return {}
        window_F, self._window = self._window.cpu(), None
        layers = len(self._terms.layers)
        rest = window_F[layers * self._terms.experts :].tolist()
        routed, compared = rest[-2], rest[-1]
        load_LX = self._load(window_F)
        highest = (load_LX.max(1).values / load_LX.mean(1)).tolist() if routed else [math.nan] * layers
        dead = (load_LX == 0).double().mean(1).tolist() if routed else [math.nan] * layers
        entropy = [value / routed if routed else math.nan for value in rest[:layers]]
        values: dict[str, float] = {}
        for name, found in (("max_load", highest), ("dead_frac", dead), ("entropy", entropy)):
            values[f"router/{name}"] = math.fsum(found) / layers
            values |= {
                f"router/{name}/layer_{layer}": value for layer, value in zip(self._terms.layers, found, strict=True)
            }
        overlap = [value / compared if compared else math.nan for value in rest[layers:-2]]
        if overlap:
            values["router/overlap"] = math.fsum(overlap) / len(overlap)
            for pair, value in zip(self._terms.pairs, overlap, strict=True):
                values[f"router/overlap/layers_{pair.layers.student}_{pair.layers.teacher}"] = value
        return values

    def heat_map(self) -> Tensor:
        """(L, X) load of each expert over the mean of its layer in the latest step, on the host."""
        return (self.share_LX * self._terms.experts).cpu()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; figures start anew after a resume, like all others."""
        return {"share": self.share_LX.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.share_LX = torch.tensor(state["share"], device=self._device)

    def _load(self, total_F: Tensor) -> Tensor:
        layers, experts = self._shape
        return total_F[: layers * experts].view(layers, experts)
