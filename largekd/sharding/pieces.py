"""A tensor that a checkpoint keeps in pieces, read as one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """A tensor of `shape` that is made of others: their entries in row-major order, one after the other, are its own.

    `reads` fetch the parts, which have `numels` entries each.
    """

    shape: torch.Size
    reads: tuple[Callable[[], Tensor], ...]
    numels: tuple[int, ...]

    def whole(self) -> Tensor:
        """The tensor in memory of its own; the stored one itself when there is only one part."""
        if len(self.reads) == 1:
            return self.reads[0]().view(self.shape)
        first = self.reads[0]()
        value = torch.empty(self.shape, dtype=first.dtype)
        for offset, part in self.span(0, value.numel()):
            value.view(-1)[offset : offset + part.numel()] = part
        return value

    def span(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(offset from `start`, entries) of every part that lies in [start, stop); other parts are not touched."""
        begin = 0
        for read, numel in zip(self.reads, self.numels, strict=True):
            low, high = max(start, begin), min(stop, begin + numel)
            if low < high:
                yield low - start, read().reshape(-1)[low - begin : high - begin]
            begin += numel
