"""Activation statistics of a sharded teacher, from hooks around forwards over a few rows of text."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from largekd.contracts import Batch
from largekd.errors import ConfigError
from largekd.initialisation.anatomy import LayerParts, layer_parts
from largekd.initialisation.statistics import Statistics
from largekd.models.decoder import Decoder
from largekd.models.taps import hidden_width
from largekd.runtime.ranks import all_sum
from largekd.sharding.accelerator import device
from largekd.sharding.shards import gathering_forward

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
            "activations cannot be measured; choose another student.initialise.width and student.initialise.layers."
        )
    sums = _Sums(width=hidden_width(decoder.model), moment=moment)
    with torch.no_grad(), _evaluating(decoder), ExitStack() as stack:
        if engine is None:
            stack.enter_context(gathering_forward(decoder))
        stack.enter_context(_hooked(parts, final=decoder.final_norm, sums=sums))
        for batch in batches:
            view = batch if batch.translation is None else batch.translation.teacher
            sums.open(view)
            (engine or decoder)(batch=view.to(device=device()))
    return _means(sums, parts=parts)


def real_positions(batch: Batch) -> Tensor:
    """(B, S) bool: positions of samples. Fill, a packed row's tail and filler rows are left out."""
    if batch.segment_BS is not None:
        return batch.segment_BS > 0
    mask_BS = torch.zeros(batch.input_ids_BS.shape, dtype=torch.bool)
    for row, segments in enumerate(batch.segments):
        for segment in segments:
            mask_BS[row, segment.offset : segment.offset + segment.length] = True
    return mask_BS


class _Sums:
    """Running sums in float64 on the device, by name, over the positions of the batch that is open."""

    def __init__(self, *, width: int, moment: bool) -> None:
        self.width = width
        self.moment = moment
        self.values: dict[str, Tensor] = {}
        self._mask_T1: Tensor | None = None

    def open(self, batch: Batch) -> None:
        """Count the positions of a batch whose forward comes next."""
        mask_T = real_positions(batch).flatten()
        self._mask_T1 = mask_T[:, None].to(device(), non_blocking=True)
        self._add("positions", self._mask_T1.double().sum()[None])

    def take_norm_output(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._add("units", self._rows(output).abs().sum(0))

    def take_stream(self, _module: nn.Module, inputs: Any, keywords: Mapping[str, Any]) -> None:
        """The stream where a norm reads it, divided by its root mean square."""
        stream_TD = self._rows(_first(inputs, keywords))
        scaled_TD = stream_TD * stream_TD.square().mean(1, keepdim=True).clamp_min(_TINY).rsqrt()
        self._add("energy", scaled_TD.square().sum(0))
        if self.moment:
            self._add("moment", scaled_TD.T @ scaled_TD)

    def take_neurons(self, _module: nn.Module, inputs: Any, *, layer: int) -> None:
        self._add(f"neurons.{layer}", self._rows(inputs[0]).abs().sum(0))

    def take_heads(self, _module: nn.Module, inputs: Any, *, layer: int, heads: int) -> None:
        self._add(f"heads.{layer}", self._rows(inputs[0]).unflatten(1, (heads, -1)).norm(dim=2).sum(0))

    def take_influence(
        self, _module: nn.Module, inputs: Any, keywords: Mapping[str, Any], output: Any, *, layer: int
    ) -> None:
        before_TD = self._rows(_first(inputs, keywords))
        after_TD = self._rows(output if isinstance(output, Tensor) else output[0])
        scale_T = (before_TD.square().sum(1) * after_TD.square().sum(1)).clamp_min(_TINY).rsqrt()
        self._add(f"cosine.{layer}", ((before_TD * after_TD).sum(1) * scale_T).sum()[None])

    def _rows(self, value: Tensor) -> Tensor:
        """(T, …) float32 positions, zeros where there is no text: what stands there may even be no number."""
        assert self._mask_T1 is not None
        rows_TX = value.detach().reshape(self._mask_T1.shape[0], -1)
        return torch.where(self._mask_T1, rows_TX.float(), 0.0)

    def _add(self, name: str, value: Tensor) -> None:
        wide = value.double()
        self.values[name] = self.values[name] + wide if name in self.values else wide


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


@contextmanager
def _evaluating(decoder: Decoder) -> Iterator[None]:
    mode = decoder.training
    decoder.eval()
    try:
        yield
    finally:
        decoder.train(mode)


def _means(sums: _Sums, *, parts: tuple[LayerParts, ...]) -> Statistics:
    """Sums over ranks, divided. Errors: ConfigError on every rank when there was no position."""
    # A rank without a batch would have nothing to add; the rule of equal numbers of batches keeps names the same.
    total = {name: all_sum(value).cpu() for name, value in sums.values.items()}
    positions = float(total["positions"]) if "positions" in total else 0.0
    if not positions:
        raise ConfigError("student.initialise.calibration_rows: no row of data.train has a token to measure.")
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
