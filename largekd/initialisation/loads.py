"""How much a teacher's routers use each expert, from hooks around forwards over some rows of text.

Shape letters: X experts, K chosen ones.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from largekd.contracts import Batch
from largekd.errors import ConfigError
from largekd.initialisation.expert_maps import LayerLoads
from largekd.initialisation.roles import split_layer
from largekd.models.build import layers_path
from largekd.models.decoder import Decoder
from largekd.runtime.ranks import all_sum
from largekd.sharding.accelerator import device
from largekd.sharding.shards import gathering_forward

_ROUTER = "mlp.gate"
_TINY = 1e-30


def measure_loads(
    decoder: Decoder, *, batches: Iterable[Batch], engine: Callable[..., Any] | None = None
) -> Mapping[int, LayerLoads]:
    """The loads of every layer with a router over the real positions of `batches`, summed over ranks. Collective.

    Every rank brings the same number of batches. engine: the frozen engine that holds the decoder; None: there is none
    yet, and modules are gathered one by one.
    Errors: ConfigError when no position is real, or no layer has a router that is known.
    """
    sums = _Sums()
    routers = dict(_routers(decoder))
    if not routers:
        raise ConfigError(
            f"student.initialise: no router was found in the {decoder.model.config.model_type!r} teacher, so its "
            "experts cannot be compared; name them in student.initialise.experts.fewer."
        )
    training = decoder.training
    decoder.eval()
    try:
        with torch.no_grad(), ExitStack() as stack:
            if engine is None:
                stack.enter_context(gathering_forward(decoder))
            stack.enter_context(_watched(routers, sums=sums))
            for batch in batches:
                view = batch if batch.translation is None else batch.translation.teacher
                sums.open(view)
                (engine or decoder)(batch=view.to(device=device()))
    finally:
        decoder.train(training)
    return sums.means(layers=sorted(routers))


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


class _Sums:
    """Running sums in float64 on the device, by layer."""

    def __init__(self) -> None:
        self._mask_T: Tensor | None = None
        self._positions = torch.zeros(1, dtype=torch.float64, device=device())
        self._weight: dict[int, Tensor] = {}
        self._product: dict[int, Tensor] = {}
        self._logit: dict[int, Tensor] = {}

    def open(self, batch: Batch) -> None:
        """Count the positions of a batch whose forward comes next."""
        mask_BS = torch.zeros(batch.input_ids_BS.shape, dtype=torch.bool)
        for row, segments in enumerate(batch.segments):
            for segment in segments:
                mask_BS[row, segment.offset : segment.offset + segment.length] = True
        self._mask_T = mask_BS.flatten().to(device(), non_blocking=True)
        self._positions += self._mask_T.sum()

    def take(self, _router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor], *, layer: int) -> None:
        """Add a router's (T, X) logits and the weights and indices (T, K) of the experts it chose."""
        logits_TX, weights_TK, chosen_TK = output
        assert self._mask_T is not None
        real_T1 = self._mask_T[:, None]
        weight_TX = torch.zeros_like(logits_TX, dtype=torch.float64)
        weight_TX.scatter_(1, chosen_TK, weights_TK.double())
        # A router knows logits up to a number for each token; what stands at no token may be no number.
        logits_TX = logits_TX.double() - logits_TX.double().mean(dim=1, keepdim=True)
        logits_TX = torch.where(real_T1, logits_TX, 0.0)
        for sums, value in (
            (self._weight, torch.where(real_T1, weight_TX, 0.0).sum(0)),
            (self._logit, logits_TX.sum(0)),
            (self._product, logits_TX.T @ logits_TX),
        ):
            sums[layer] = sums[layer] + value if layer in sums else value

    def means(self, *, layers: Iterable[int]) -> dict[int, LayerLoads]:
        """Sums over ranks, divided."""
        positions = all_sum(self._positions)
        if not float(positions):
            raise ConfigError(
                "student.initialise.calibration_rows: no row of data.train has a token; nothing was measured."
            )
        return {layer: self._mean(layer, positions=positions) for layer in layers}

    def _mean(self, layer: int, *, positions: Tensor) -> LayerLoads:
        weight_X, logit_X, product_XX = (
            all_sum(sums[layer]) / positions for sums in (self._weight, self._logit, self._product)
        )
        covariance_XX = product_XX - torch.outer(logit_X, logit_X)
        scale_X = covariance_XX.diagonal().clamp_min(_TINY).rsqrt()
        similarity_XX = covariance_XX * torch.outer(scale_X, scale_X)
        return LayerLoads(weight_X=weight_X.float().cpu(), similarity_XX=similarity_XX.float().cpu())
