"""Where each axis of the student comes from: chosen entries of the teacher's axis, or mixtures of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from largekd.sharding.accelerator import device

# Entries of a tensor that are mixed at a time, which bounds their copies in float32.
_PART = 1 << 26

Role = Literal["width", "ffn", "heads", "kv_heads", "vocabulary"]
"""What an axis counts: hidden units of the residual stream, neurons of an MLP, query heads, key heads, tokens."""


@dataclass(frozen=True)
class Select:
    """new[n] = old[index_N[n]]."""

    index_N: Tensor

    def apply(self, value: Tensor, *, dim: int) -> Tensor:
        """`value` with the chosen entries along `dim`."""
        return value.index_select(dim, self.index_N)


@dataclass(frozen=True)
class Mix:
    """new = matrix_NM @ old, in float32 on the accelerator, a part of `old` at a time."""

    matrix_NM: Tensor

    def apply(self, value: Tensor, *, dim: int) -> Tensor:
        """`value` with mixtures along `dim`."""
        place = device()
        matrix_MN = self.matrix_NM.float().T.to(place)
        last = value.movedim(dim, -1)
        rows_RM = last.reshape(-1, last.shape[-1])
        mixed = [
            (part.to(place, torch.float32) @ matrix_MN).to(value.device, value.dtype)
            for part in rows_RM.split(max(_PART // last.shape[-1], 1))
        ]
        return torch.cat(mixed).reshape(*last.shape[:-1], -1).movedim(-1, dim)


@dataclass(frozen=True)
class Blend:
    """new[n] = (1 − share_N[n]) old[below_N[n]] + share_N[n] old[above_N[n]], in float32."""

    below_N: Tensor
    above_N: Tensor
    share_N: Tensor

    def apply(self, value: Tensor, *, dim: int) -> Tensor:
        """`value` with the blended entries along `dim`."""
        share = self.share_N.float().reshape(-1, *[1] * (value.ndim - 1 - dim % value.ndim))
        below, above = (value.index_select(dim, index_N).float() for index_N in (self.below_N, self.above_N))
        return below.lerp_(above, share).to(value.dtype)


AxisMap = Select | Mix | Blend


@dataclass(frozen=True)
class StudentMaps:
    """The whole plan of a smaller student: `layers[i]` is the teacher's layer that layer i of the student comes from.

    Maps by layer are keyed by the student's layer; an axis without a map is taken as it is.
    gains: by role, the factor of weights that read this axis; 1 where it is missing. That of the width takes back what
    a norm over fewer units does: it stands in the weights behind such a norm, for the head in the final norm (the head
    may be tied), and where a norm writes to the stream in that norm.
    """

    layers: tuple[int, ...]
    width: AxisMap | None = None
    vocabulary: AxisMap | None = None
    ffn: Mapping[int, AxisMap] = field(default_factory=dict)
    heads: Mapping[int, AxisMap] = field(default_factory=dict)
    kv_heads: Mapping[int, AxisMap] = field(default_factory=dict)
    gains: Mapping[Role, float] = field(default_factory=dict)

    def of(self, role: Role, *, layer: int | None) -> AxisMap | None:
        """The map of an axis of the student's `layer` (None: outside of the layers)."""
        if role == "width":
            return self.width
        if role == "vocabulary":
            return self.vocabulary
        assert layer is not None
        maps: dict[Role, Mapping[int, AxisMap]] = {"ffn": self.ffn, "heads": self.heads, "kv_heads": self.kv_heads}
        return maps[role].get(layer)


def evenly_spaced(count: int, *, of: int) -> tuple[int, ...]:
    """`count` of the places 0 … of − 1 at equal distances with both ends (one place: the first); halves go down."""
    if count == 1:
        return (0,)
    return tuple((2 * index * (of - 1) + count - 2) // (2 * (count - 1)) for index in range(count))
