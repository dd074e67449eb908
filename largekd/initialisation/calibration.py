"""Activation statistics of a sharded teacher, from hooks around forwards over a few rows of text."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from largekd.contracts import Batch
from largekd.errors import ConfigError
from largekd.initialisation.anatomy import LayerParts, layer_parts
from largekd.initialisation.forwards import PositionSums, forward_all
from largekd.initialisation.statistics import Statistics
from largekd.models.decoder import Decoder

_TINY = 1e-30


def measure(
    decoder: Decoder,
    *,
    batches: Iterable[Batch],
    engine: Callable[..., Any] | None = None,
    moment: bool = False,
) -> Statistics:
    """The statistics of `decoder` over the real positions of `batches`, summed over ranks. A collective call.

    Every rank brings the same number of batches; fill and weightless rows count for nothing, so the result depends on
    the rows alone. With a translation the teacher's own rows are read. engine: the frozen engine that holds the
    decoder; None: there is none yet, and modules are gathered one by one. moment: also the D × D second moment.
    Between batches only running sums are kept, and the host waits for the device once, at the end.

    Errors: ConfigError for a family whose layers are not found, and when no position is real.
    """
    parts = layer_parts(decoder.model)
    if decoder.final_norm is None:
        raise ConfigError(
            f"student.initialise: the final norm of a {decoder.model.config.model_type!r} model was not found, so its "
            "activations cannot be measured; choose rules that need none, such as student.initialise.width = "
            "'truncate' and student.initialise.layers = 'uniform'."
        )
    sums = _Sums(moment=moment)
    hooks = _hooked(parts, final=decoder.final_norm, sums=sums)
    forward_all(decoder, batches=batches, hooks=hooks, sums=sums, engine=engine)
    return _means(sums, parts=parts)


class _Sums(PositionSums):
    def __init__(self, *, moment: bool) -> None:
        super().__init__()
        self.moment = moment

    def take_norm_output(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.add("units", self.rows(output).abs().sum(0))

    def take_stream(self, _module: nn.Module, inputs: Any, keywords: Mapping[str, Any]) -> None:
        """The stream where a norm reads it, divided by its root mean square."""
        stream_TD = self.rows(_first(inputs, keywords))
        scaled_TD = stream_TD * stream_TD.square().mean(1, keepdim=True).clamp_min(_TINY).rsqrt()
        self.add("energy", scaled_TD.square().sum(0))
        if self.moment:
            self.add("moment", scaled_TD.T @ scaled_TD)

    def take_neurons(self, _module: nn.Module, inputs: Any, *, layer: int) -> None:
        self.add(f"neurons.{layer}", self.rows(inputs[0]).abs().sum(0))

    def take_heads(self, _module: nn.Module, inputs: Any, *, layer: int, heads: int) -> None:
        self.add(f"heads.{layer}", self.rows(inputs[0]).unflatten(1, (heads, -1)).norm(dim=2).sum(0))

    def take_influence(
        self, _module: nn.Module, inputs: Any, keywords: Mapping[str, Any], output: Any, *, layer: int
    ) -> None:
        before_TD = self.rows(_first(inputs, keywords))
        after_TD = self.rows(output if isinstance(output, Tensor) else output[0])
        scale_T = (before_TD.square().sum(1) * after_TD.square().sum(1)).clamp_min(_TINY).rsqrt()
        self.add(f"cosine.{layer}", ((before_TD * after_TD).sum(1) * scale_T).sum()[None])


def _first(inputs: Any, keywords: Mapping[str, Any]) -> Tensor:
    found: Tensor = inputs[0] if inputs else keywords["hidden_states"]
    return found


@contextmanager
def _hooked(parts: Iterable[LayerParts], *, final: nn.Module, sums: _Sums) -> Iterator[None]:
    """Let the hooks of all layers and the final norm add to `sums` inside the block."""
    handles = [
        final.register_forward_pre_hook(sums.take_stream, with_kwargs=True),
        final.register_forward_hook(sums.take_norm_output),
    ]
    try:
        for index, part in enumerate(parts):
            for module in (part.layer, *part.inner_norms):
                handles.append(module.register_forward_pre_hook(sums.take_stream, with_kwargs=True))
            handles += [norm.register_forward_hook(sums.take_norm_output) for norm in part.norms]
            if part.mlp_end is not None:
                handles.append(part.mlp_end.register_forward_pre_hook(partial(sums.take_neurons, layer=index)))
            if part.attention_end is not None:
                take = partial(sums.take_heads, layer=index, heads=part.heads)
                handles.append(part.attention_end.register_forward_pre_hook(take))
            take = partial(sums.take_influence, layer=index)
            handles.append(part.layer.register_forward_hook(take, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _means(sums: _Sums, *, parts: tuple[LayerParts, ...]) -> Statistics:
    """Sums over ranks, divided. Errors: ConfigError on every rank when there was no position."""
    positions, total = sums.totals()
    norms = 1 + sum(len(part.norms) for part in parts)
    places = 1 + sum(1 + len(part.inner_norms) for part in parts)
    layers = range(len(parts))

    def mean(name: str, *, over: int = 1) -> Tensor | None:
        return total[name] / (positions * over) if name in total else None

    units_D, energy_D = mean("units", over=norms), mean("energy", over=places)
    assert units_D is not None
    assert energy_D is not None
    return Statistics(
        positions=positions,
        units_D=units_D,
        energy_D=energy_D,
        neurons_NF=tuple(mean(f"neurons.{layer}") for layer in layers),
        heads_NH=tuple(mean(f"heads.{layer}") for layer in layers),
        influence_N=1 - torch.cat([total[f"cosine.{layer}"] for layer in layers]) / positions,
        moment_DD=mean("moment", over=places),
    )
