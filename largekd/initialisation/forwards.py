"""Forwards of a sharded teacher over rows of text, and sums over their real positions."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from largekd.contracts import Batch
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder
from largekd.runtime.ranks import all_sum
from largekd.sharding.accelerator import device
from largekd.sharding.shards import gathering_forward

_POSITIONS = "positions"


class PositionSums:
    """Running sums in float64 on the device, by name, over the real positions of the batch that is open."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._mask_T1: Tensor | None = None

    def open(self, batch: Batch) -> None:
        """Count the positions of a batch whose forward comes next."""
        mask_T = real_positions(batch).flatten()
        self._mask_T1 = mask_T[:, None].to(device(), non_blocking=True)
        self.add(_POSITIONS, self._mask_T1.double().sum()[None])

    def rows(self, value: Tensor) -> Tensor:
        """(T, …) float32 positions, zeros where there is no text: what stands there may even be no number."""
        assert self._mask_T1 is not None
        rows_TX = value.detach().reshape(self._mask_T1.shape[0], -1)
        return torch.where(self._mask_T1, rows_TX.float(), 0.0)

    def add(self, name: str, value: Tensor) -> None:
        """Add to the sum of this name."""
        wide = value.double()
        self._values[name] = self._values[name] + wide if name in self._values else wide

    def totals(self) -> tuple[float, dict[str, Tensor]]:
        """The number of positions, and the sums, over all ranks. A collective call.

        Errors: ConfigError on every rank when there was no position.
        """
        # A rank without a batch would have nothing to add; the rule of equal numbers of batches keeps names the same.
        total = {name: all_sum(value).cpu() for name, value in self._values.items()}
        positions = float(total.pop(_POSITIONS, 0.0))
        if not positions:
            raise ConfigError("student.initialise.calibration_rows: no row of data.train has a token to measure.")
        return positions, total


def forward_all(
    decoder: Decoder,
    *,
    batches: Iterable[Batch],
    hooks: AbstractContextManager[None],
    sums: PositionSums,
    engine: Callable[..., Any] | None = None,
) -> None:
    """Run `decoder` over `batches` in evaluation mode, inside `hooks`, which add to `sums`. A collective call.

    Every rank brings the same number of batches. With a translation the teacher's own rows are read. engine: the
    frozen engine that holds the decoder; None: there is none yet, and modules are gathered one by one.
    """
    with torch.no_grad(), _evaluating(decoder), ExitStack() as stack:
        if engine is None:
            stack.enter_context(gathering_forward(decoder))
        stack.enter_context(hooks)
        for batch in batches:
            view = batch if batch.translation is None else batch.translation.teacher
            sums.open(view)
            (engine or decoder)(batch=view.to(device=device()))


def real_positions(batch: Batch) -> Tensor:
    """(B, S) bool: positions of samples. Fill, a packed row's tail and filler rows are left out."""
    if batch.segment_BS is not None:
        return batch.segment_BS > 0
    mask_BS = torch.zeros(batch.input_ids_BS.shape, dtype=torch.bool)
    for row, segments in enumerate(batch.segments):
        for segment in segments:
            mask_BS[row, segment.offset : segment.offset + segment.length] = True
    return mask_BS


@contextmanager
def _evaluating(decoder: Decoder) -> Iterator[None]:
    mode = decoder.training
    decoder.eval()
    try:
        yield
    finally:
        decoder.train(mode)
