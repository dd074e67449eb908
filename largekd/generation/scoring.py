"""What the teacher gives to each token of an answer."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from largekd.contracts import Batch, HiddenSignal, SignalRequest
from largekd.data.collate import collate
from largekd.data.loader import FILLER_ROW
from largekd.generation.batches import StepSamples, row_of
from largekd.generation.buffer import Rollout
from largekd.objectives.rows import HeadShape
from largekd.objectives.spans import label_log_probabilities
from largekd.teachers.protocol import Teacher

REQUEST = SignalRequest("full")

# Micro-batches shown to the teacher at once: bounds the hidden states that are kept.
_AT_ONCE = 4


def teacher_logp(
    rollouts: Sequence[Rollout],
    *,
    teacher: Teacher,
    calls: int,
    micro_batch_size: int,
    sequence_length: int,
    chunk_tokens: int,
    device: torch.device,
) -> list[tuple[float, ...]]:
    """log p of each answer's tokens at temperature 1, in the order of the rollouts.

    calls: micro-batches on every rank, filled with weightless rows. A collective call.
    """
    assert len(rollouts) <= calls * micro_batch_size
    found: list[float] = []
    batches = [
        _batch(rollouts[start : start + micro_batch_size], rows=micro_batch_size, sequence_length=sequence_length)
        for start in range(0, calls * micro_batch_size, micro_batch_size)
    ]
    with torch.no_grad():
        for start in range(0, calls, _AT_ONCE):
            moved = [batch.to(device=device) for batch in batches[start : start + _AT_ONCE]]
            with teacher.signals(moved, request=REQUEST) as signals:
                for batch in moved:
                    signal = next(signals)
                    assert isinstance(signal, HiddenSignal), "checked at build"
                    found += _label_logp(batch, signal=signal, chunk_tokens=chunk_tokens).tolist()
    lengths = [len(rollout.answer) for rollout in rollouts]
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [tuple(found[start:stop]) for start, stop in pairwise(ends)]


def _batch(rollouts: Sequence[Rollout], *, rows: int, sequence_length: int) -> Batch:
    """One answer per row; its counted positions are the answers' tokens, one answer after another."""
    own = [row_of([rollout], first=place) for place, rollout in enumerate(rollouts)]
    return collate(
        own + [FILLER_ROW] * (rows - len(own)),
        samples=StepSamples(None, rollouts=rollouts),
        sequence_length=sequence_length,
        packing=False,
        origin="rollout",
    )


def _label_logp(batch: Batch, *, signal: HiddenSignal, chunk_tokens: int) -> Tensor:
    head = signal.head
    return label_log_probabilities(
        signal.hidden_BSE.reshape(-1, signal.hidden_BSE.shape[-1])[batch.counted_T],
        batch.labels_BS.reshape(-1)[batch.counted_T],
        weight_VD=head.weight_VD,
        bias_V=head.bias_V,
        head=HeadShape(head.vocab_size, head.scale, head.softcap, head.bias_V is not None),
        chunk_tokens=chunk_tokens,
    ).cpu()
