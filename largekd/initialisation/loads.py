"""How much a teacher's routers use each expert, from hooks around forwards over some rows of text.

Shape letters: X experts, K chosen ones.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from largekd.contracts import Batch
from largekd.errors import ConfigError
from largekd.initialisation.expert_maps import LayerLoads
from largekd.initialisation.forwards import PositionSums, forward_all
from largekd.initialisation.roles import split_layer
from largekd.models.build import layers_path
from largekd.models.decoder import Decoder

_ROUTER = "mlp.gate"
_TINY = 1e-30


def measure_loads(
    decoder: Decoder, *, batches: Iterable[Batch], engine: Callable[..., Any] | None = None
) -> Mapping[int, LayerLoads]:
    """The loads of every layer with a router over the real positions of `batches`, summed over ranks. Collective.

    batches, engine: see `forward_all`.
    Errors: ConfigError when no position is real, or no layer has a router that is known.
    """
    routers = dict(_routers(decoder))
    if not routers:
        raise ConfigError(
            f"student.initialise: no router was found in the {decoder.model.config.model_type!r} teacher, so its "
            "experts cannot be compared; name them in student.initialise.experts.fewer."
        )
    sums = _Sums()
    forward_all(decoder, batches=batches, hooks=_watched(routers, sums=sums), sums=sums, engine=engine)
    positions, total = sums.totals()
    return {layer: _mean(total, layer=layer, positions=positions) for layer in sorted(routers)}


def _routers(decoder: Decoder) -> Iterator[tuple[int, nn.Module]]:
    path = layers_path(decoder.model)
    for name, module in decoder.model.named_modules():
        inside = split_layer(name, layers_path=path) if name.count(".") > path.count(".") + 1 else None
        if inside is not None and inside[1] == _ROUTER and hasattr(module, "top_k"):
            yield inside[0], module


@contextmanager
def _watched(routers: Mapping[int, nn.Module], *, sums: "_Sums") -> Iterator[None]:
    handles = [router.register_forward_hook(partial(sums.take, layer=layer)) for layer, router in routers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sums(PositionSums):
    def take(self, _router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor], *, layer: int) -> None:
        """Add a router's (T, X) logits and the weights and indices (T, K) of the experts it chose."""
        logits_TX, weights_TK, chosen_TK = output
        weight_TX = torch.zeros_like(logits_TX, dtype=torch.float64)
        weight_TX.scatter_(1, chosen_TK, self.rows(weights_TK).double())
        logits_TX = self.rows(logits_TX).double()
        # A router knows logits up to a number for each token.
        logits_TX = logits_TX - logits_TX.mean(dim=1, keepdim=True)
        self.add(f"weight.{layer}", weight_TX.sum(0))
        self.add(f"logit.{layer}", logits_TX.sum(0))
        self.add(f"product.{layer}", logits_TX.T @ logits_TX)


def _mean(total: Mapping[str, Tensor], *, layer: int, positions: float) -> LayerLoads:
    weight_X, logit_X, product_XX = (total[f"{name}.{layer}"] / positions for name in ("weight", "logit", "product"))
    covariance_XX = product_XX - torch.outer(logit_X, logit_X)
    scale_X = covariance_XX.diagonal().clamp_min(_TINY).rsqrt()
    similarity_XX = covariance_XX * torch.outer(scale_X, scale_X)
    return LayerLoads(weight_X=weight_X.float(), similarity_XX=similarity_XX.float())
