"""Captured activations in a cache: outputs and attention inputs of layers, one row for each position of a sample.

Alignment compares every position of a sample, also those without a label, and a query looks at keys before it; so these
rows are more than the records of `cache_codec`, which are of labels alone. A layer's output is E values; queries, keys
and values are H·d, G·d and G·d, after rotary embedding.

Shape letters: B sequences, S positions, P positions of the batch's samples in order, E teacher width, H heads, G key
heads, d width of a head.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from largekd.config.common import Frozen
from largekd.contracts import AttentionInputs, Batch, TapRequest, Taps
from largekd.errors import TeacherError
from largekd.models.build import DTYPES
from largekd.models.taps import AttentionShape

POSITION_PREFIX = "tap."
"""Begins the names of a shard's tensors that have one row for each position."""


class TapIdentity(Frozen):
    """What is stored of which layers (the first is 0), and the dtype of the stored values."""

    precision: Literal["fp32", "bf16"]
    hidden: tuple[int, ...]
    attention: tuple[int, ...]


class StoredAttention(Frozen):
    """Heads of a layer and how it makes scores of queries and keys; see AttentionInputs."""

    layer: int
    heads: int
    key_heads: int
    head_width: int
    scale: float
    window: int | None
    softcap: float | None

    @property
    def shape(self) -> AttentionShape:
        """Its sizes alone."""
        return AttentionShape(heads=self.heads, key_heads=self.key_heads, head_width=self.head_width)


class StoredLayers(Frozen):
    """The teacher's layers, as far as a run that has only the cache must know them."""

    precision: Literal["fp32", "bf16"]
    depth: int
    width: int
    hidden: tuple[int, ...]
    attention: tuple[StoredAttention, ...]

    @property
    def rules(self) -> Mapping[int, StoredAttention]:
        """By layer."""
        return {stored.layer: stored for stored in self.attention}

    @property
    def codec(self) -> "TapCodec":
        """How a position becomes bytes."""
        return TapCodec(
            self.precision,
            width=self.width,
            hidden=self.hidden,
            attention={layer: stored.shape for layer, stored in self.rules.items()},
        )

    def check(self, request: TapRequest, *, key: str) -> None:
        """Errors: TeacherError for layers that are not stored; it names those that are asked for and those held."""
        held = {"hidden": self.hidden, "attention": tuple(self.rules)}
        for kind, what in (("hidden", "hidden states"), ("attention", "attention inputs")):
            asked = getattr(request, kind)
            if not set(asked) <= set(held[kind]):
                raise TeacherError(
                    f"{key}: compares {what} of the teacher's layers {_listed(asked)}; the cache holds "
                    f"{_listed(held[kind])}. Name layers that it holds (map: explicit), or make another cache with "
                    "this objective."
                )

    def taps(self, rows: Mapping[str, Tensor], *, request: TapRequest, batch: Batch, places_P: Tensor) -> Taps:
        """The records of `request` from the stored rows of the batch's samples; fill is 0. `places_P`: positions_of."""
        shape = batch.input_ids_BS.shape

        def spread(name: str) -> Tensor:
            stored = rows[POSITION_PREFIX + name]
            whole = stored.new_zeros((shape[0] * shape[1], stored.shape[1]))
            return whole.index_copy_(0, places_P, stored).view(*shape, -1)

        def heads(name: str, count: int) -> Tensor:
            return spread(name).unflatten(-1, (count, -1)).transpose(1, 2)

        attention = {}
        for layer in request.attention:
            rule = self.rules[layer]
            attention[layer] = AttentionInputs(
                query_BHSd=heads(f"query.{layer}", rule.heads),
                key_BGSd=heads(f"key.{layer}", rule.key_heads),
                value_BGSd=heads(f"value.{layer}", rule.key_heads),
                scale=rule.scale,
                window=rule.window,
                softcap=rule.softcap,
            )
        return Taps(hidden={layer: spread(f"hidden.{layer}") for layer in request.hidden}, attention=attention)


class TapCodec:
    """A position's bytes: the captured values as they are, in the stored dtype."""

    def __init__(
        self, precision: str, *, width: int, hidden: tuple[int, ...], attention: Mapping[int, AttentionShape]
    ) -> None:
        """Args: width: of a layer's output. attention: the sizes of each layer whose attention inputs are stored."""
        self.dtype = DTYPES[precision]
        self.request = TapRequest(hidden=hidden, attention=tuple(attention))
        widths = {f"hidden.{layer}": width for layer in hidden}
        for layer, shape in attention.items():
            widths[f"query.{layer}"] = shape.heads * shape.head_width
            widths[f"key.{layer}"] = widths[f"value.{layer}"] = shape.key_heads * shape.head_width
        self.shapes = {POSITION_PREFIX + name: (self.dtype, count) for name, count in widths.items()}

    @property
    def position_bytes(self) -> int:
        """Bytes of a record."""
        return sum(dtype.itemsize * width for dtype, width in self.shapes.values())

    def encode(self, taps: Taps, *, places_P: Tensor) -> dict[str, Tensor]:
        """Records of the positions `places_P` (see positions_of). `finite` (P,): whether all values are numbers that
        the stored dtype has."""
        found = {f"hidden.{layer}": states.flatten(0, 1) for layer, states in taps.hidden.items()}
        for layer, inputs in taps.attention.items():
            for name, tensor in (
                ("query", inputs.query_BHSd),
                ("key", inputs.key_BGSd),
                ("value", inputs.value_BGSd),
            ):
                found[f"{name}.{layer}"] = tensor.transpose(1, 2).flatten(2).flatten(0, 1)
        rows = {POSITION_PREFIX + name: tensor[places_P].to(self.dtype) for name, tensor in found.items()}
        assert {name: tensor.shape[1] for name, tensor in rows.items()} == {
            name: width for name, (_, width) in self.shapes.items()
        }
        finite = torch.stack([tensor.isfinite().all(-1) for tensor in rows.values()]).all(0)
        return rows | {"finite": finite}


def check_taps(request: TapRequest, *, layers: StoredLayers | None, key: str = "objective") -> None:
    """Errors: TeacherError for layers that a cache does not hold; None: it holds none."""
    if layers is None:
        raise TeacherError(
            f"{key}: compares layers of the teacher, and the cache holds none; make another cache with this objective "
            "and without cache.taps=null, use teacher.kind online, or take objective.features and objective.attention "
            "out."
        )
    layers.check(request, key=key)


def names_of(request: TapRequest) -> list[str]:
    """The tensors of a shard that hold what is asked for."""
    inputs = [f"{name}.{layer}" for layer in request.attention for name in ("query", "key", "value")]
    return [POSITION_PREFIX + name for name in (*(f"hidden.{layer}" for layer in request.hidden), *inputs)]


def positions_of(batch: Batch) -> Tensor:
    """(P,) flat positions (b * S + s) of the batch's samples, one sample after the other, on the batch's device."""
    width = batch.input_ids_BS.shape[1]
    parts = [np.empty(0, np.int64)]
    for place, row in enumerate(batch.segments):
        parts += [np.arange(s.offset, s.offset + s.length, dtype=np.int64) + place * width for s in row]
    return torch.from_numpy(np.concatenate(parts)).to(batch.input_ids_BS.device, non_blocking=True)


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) or "none"
