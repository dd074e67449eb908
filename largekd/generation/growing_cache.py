"""Keys and values of a batch whose rows come and go: rows end at the same column, and begin where they begin.

Shape letters: B rows, H key heads, S columns, D width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_GROWTH = 1.5
_LEAST_COLUMNS = 64


class _Layer(DynamicLayer):
    """Grows in place, in a buffer with room to spare: appending copies the new columns alone."""

    def __init__(self) -> None:
        super().__init__()
        self.room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.room is None or self.room[0].shape[-2] < after:
            columns = max(int(_GROWTH * after), _LEAST_COLUMNS)
            rooms = [
                states.new_zeros(*states.shape[:-2], columns, states.shape[-1]) for states in (key_states, value_states)
            ]
            if before:
                for room, states in zip(rooms, _states(self), strict=True):
                    room[..., :before, :] = states
            self.room = (rooms[0], rooms[1])
        self.room[0][..., before:after, :] = key_states
        self.room[1][..., before:after, :] = value_states
        self.keys, self.values = (room[..., :after, :] for room in self.room)
        return _states(self)

    def take(self, rows: Sequence[int], *, source: DynamicLayer, lengths: Sequence[int], columns: int) -> None:
        """The listed rows become those of `source`, whose last `lengths` columns are theirs."""
        assert self.room is not None
        for own, new in zip(self.room, _states(source), strict=True):
            for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                own[row, :, columns - length : columns] = new[place, :, new.shape[-2] - length :]

    def keep(self, rows: Tensor, *, first: int) -> None:
        """Only these rows, and the columns from `first` on."""
        columns = self.get_seq_length()
        assert self.room is not None
        kept = [room[rows, :, first:columns] for room in self.room]
        self.room = None
        self.keys, self.values = (states[..., :0, :] for states in kept)
        self.update(kept[0], kept[1])

    def widen(self, columns: int) -> None:
        """More columns on the left, which belong to no row."""
        grown = []
        for states in _states(self):
            wide = states.new_zeros(*states.shape[:-2], columns, states.shape[-1])
            wide[..., columns - states.shape[-2] :, :] = states
            grown.append(wide)
        self.room = None
        self.keys, self.values = (states[..., :0, :] for states in grown)
        self.update(grown[0], grown[1])


def _states(layer: CacheLayerMixin) -> tuple[Tensor, Tensor]:
    assert layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


class GrowingCache(DynamicCache):
    """The cache of a batch of rows, for a model whose only state is keys and values."""

    def __init__(self, *, layers: int) -> None:
        super().__init__()
        self.layers = [_Layer() for _ in range(layers)]

    @property
    def own(self) -> list[_Layer]:
        """The layers that hold something; a layer that shares another one's keys and values holds nothing."""
        return [layer for layer in self.layers if isinstance(layer, _Layer) and layer.is_initialized]

    def replace(self, rows: Sequence[int], *, source: DynamicCache, lengths: Sequence[int]) -> None:
        """Rows that ended become rows of `source`, aligned at the last column."""
        columns = self.get_seq_length()
        new = [layer for layer in source.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
        for own, layer in zip(self.own, new, strict=True):
            own.take(rows, source=layer, lengths=lengths, columns=columns)

    def keep(self, rows: Sequence[int], *, columns: int) -> None:
        """Only these rows, and their last `columns` columns."""
        first = self.get_seq_length() - columns
        for layer in self.own:
            layer.keep(torch.tensor(rows, device=_states(layer)[0].device), first=first)

    def widen(self, *, columns: int) -> None:
        """As many columns, the new ones on the left."""
        for layer in self.own:
            layer.widen(columns)


def keeps_keys_and_values_alone(config: PreTrainedConfig) -> bool:
    """Whether a model's whole state between tokens is the keys and values of its attention layers."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)
