"""The records that rooms exchange.

Shape letters: B sequences (rows), S positions, T counted tokens, V student vocabulary, W teacher vocabulary,
D student width, E teacher width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_LABEL = -100

HEALTH_NAMES = (
    "token_weight",
    "ce",
    "student_top1_correct",
    "student_entropy",
    "teacher_entropy",
    "teacher_ce",
    "kl_t1",
    "top1_agree",
)
"""Figures at temperature 1, each a sum over tokens times the token's weight, in the order in which they travel."""

TEACHER_HEALTH_NAMES = HEALTH_NAMES[4:]
"""The figures that need a teacher; without a signal they are 0 and mean nothing."""


class Segment(NamedTuple):
    """One sample's place in a row: it fills positions [offset, offset + length)."""

    sample_id: int
    offset: int
    length: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch of rows.

    `labels_BS` is already shifted: position t holds the token that must be predicted there, or IGNORE_LABEL.
    Exactly one of the two layouts holds: padded rows have `attention_mask_BS` and no `position_ids_BS`; packed rows
    have `position_ids_BS`, restarting in every segment (the padded tail is a segment of its own), and no mask.
    `counted_T` are the flat positions (b * S + s) whose label counts and whose weight is positive: it is made with
    the batch so that the loss needs no device synchronisation.
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    token_weight_BS: Tensor
    counted_T: Tensor
    attention_mask_BS: Tensor | None = None
    position_ids_BS: Tensor | None = None
    segments: tuple[tuple[Segment, ...], ...] = ()

    def to(self, *, device: torch.device) -> "Batch":
        """This batch with its tensors on `device`; the copies are asynchronous where memory is pinned."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a Hugging Face decoder."""
        inputs = {"input_ids": self.input_ids_BS}
        if self.position_ids_BS is not None:
            inputs["position_ids"] = self.position_ids_BS
        if self.attention_mask_BS is not None:
            inputs["attention_mask"] = self.attention_mask_BS
        return inputs

    @property
    def sample_ids(self) -> tuple[int, ...]:
        """Ids of the samples in this batch; filler rows have none."""
        return tuple(segment.sample_id for row in self.segments for segment in row)


@dataclass(frozen=True)
class Counts:
    """What the terms of one rank's micro-batches are divided by, before the all-reduce."""

    label_tokens: float

    @classmethod
    def of(cls, micro_batches: Sequence[Batch]) -> "Counts":
        """Sum of token weights over the counted positions, in float64."""
        weights = (batch.token_weight_BS.flatten()[batch.counted_T].double().sum() for batch in micro_batches)
        return cls(label_tokens=float(sum(weights)))


@dataclass(frozen=True)
class VocabularyHead:
    """The map from hidden states to logits: softcap(scale * (hidden @ weight.T + bias)).

    `weight_VD` may have padded rows beyond `vocab_size`; they take no part in any distribution.
    `softcap` c means c * tanh(logit / c).
    """

    weight_VD: Tensor
    vocab_size: int
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class SignalRequest:
    """What the active terms need of a teacher: the union over terms."""

    distribution: bool = False


@dataclass(frozen=True)
class HiddenSignal:
    """Last hidden states and the teacher's head: a full distribution without logits."""

    hidden_BSE: Tensor
    head: VocabularyHead


TeacherSignal = HiddenSignal


@dataclass(frozen=True)
class Progress:
    """Where a run stands; schedules are functions of this alone. `tokens` are label tokens over all ranks, `train_s`
    seconds of wall time inside steps, `consecutive_skips` the non-finite steps since the last good one."""

    step: int = 0
    max_steps: int = 0
    tokens: int = 0
    train_s: float = 0.0
    skipped_steps: int = 0
    consecutive_skips: int = 0
