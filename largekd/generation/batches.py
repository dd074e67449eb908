"""Rollouts as rows of a micro-batch, beside rows of the training data."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from largekd.contracts import Batch, Segment
from largekd.data.collate import collate
from largekd.data.packing import Row
from largekd.data.store import SampleStore
from largekd.generation.buffer import Rollout, RolloutRow

FIRST_ID = 2**40
"""Sample ids of rollouts begin here: no data set is as large. FIRST_ID · (1 + place) + sample is the rollout at `place`
among a batch's, which answers the prompt of `sample`."""


def written_sample(sample: int) -> int | None:
    """The training sample whose prompt a rollout with this id answers; None for the id of a training sample."""
    return sample % FIRST_ID if sample >= FIRST_ID else None


class StepSamples:
    """The samples of one step: the data set's under their own ids, rollouts from FIRST_ID on."""

    def __init__(self, data: SampleStore | None, *, rollouts: Sequence[Rollout]) -> None:
        self._data, self._rollouts = data, rollouts

    @property
    def weights(self) -> "StepSamples":
        """Weights by sample id, 1 for rollouts."""
        return self

    @property
    def teachers(self) -> None:
        """The configuration refuses records that name a teacher beside rollouts."""
        return None

    def __getitem__(self, sample: int) -> float:
        return 1.0 if sample >= FIRST_ID else float(self._of_data.weights[sample])

    def ids(self, sample: int) -> NDArray[np.int32]:
        """See SampleStore."""
        if sample < FIRST_ID:
            return self._of_data.ids(sample)
        return np.array(_at(sample, rollouts=self._rollouts).ids, np.int32)

    def label_mask(self, sample: int) -> NDArray[np.uint8] | None:
        """See SampleStore; of a rollout the answer's tokens are labels."""
        if sample < FIRST_ID:
            return self._of_data.label_mask(sample)
        rollout = _at(sample, rollouts=self._rollouts)
        return (np.arange(len(rollout.ids)) >= rollout.prompt).astype(np.uint8)

    def token_weights(self, sample: int) -> NDArray[np.float32] | None:
        """See SampleStore."""
        return None if sample >= FIRST_ID else self._of_data.token_weights(sample)

    @property
    def _of_data(self) -> SampleStore:
        assert self._data is not None, "a sample of the data set among rollouts alone"
        return self._data


def _at(sample: int, *, rollouts: Sequence[Rollout]) -> Rollout:
    return rollouts[sample // FIRST_ID - 1]


def row_of(rollouts: Sequence[Rollout], *, first: int) -> Row:
    """The row of these rollouts, one after another; `first` is the place of the first one among the step's."""
    segments, used = [], 0
    for place, rollout in enumerate(rollouts):
        segment_id = FIRST_ID * (1 + first + place) + rollout.sample_id
        segments.append(Segment(segment_id, used, len(rollout.ids) - 1))
        used += len(rollout.ids) - 1
    return tuple(segments)


def with_rollouts(
    batch: Batch,
    *,
    data: SampleStore,
    places: Mapping[int, RolloutRow],
    source: Literal["student", "teacher"],
    sequence_length: int,
) -> Batch:
    """The micro-batch with the rows at `places` replaced; without any it is the same batch.

    A token that the student drew carries no cross-entropy: it would teach the student what it says already.
    """
    if not places:
        return batch
    rows, rollouts = list(batch.segments), list[Rollout]()
    for place, row in sorted(places.items()):
        rows[place] = row_of(row.rollouts, first=len(rollouts))
        rollouts += row.rollouts
    made = collate(
        rows,
        samples=StepSamples(data, rollouts=rollouts),
        sequence_length=sequence_length,
        packing=batch.position_ids_BS is not None,
        origin="rollout",
    )
    return made if source == "teacher" else _as_sampled(made, rollouts=rollouts)


def _as_sampled(batch: Batch, *, rollouts: Sequence[Rollout]) -> Batch:
    task_BS, sampled_BS = batch.token_weight_BS.clone(), torch.zeros_like(batch.token_weight_BS)
    advantage_BS, logq_BS = torch.zeros_like(sampled_BS), torch.zeros_like(sampled_BS)
    scored = False
    for place, row in enumerate(batch.segments):
        for segment in row:
            if segment.sample_id < FIRST_ID:
                continue
            rollout = _at(segment.sample_id, rollouts=rollouts)
            # Position t predicts token t + 1.
            answer = slice(segment.offset + rollout.prompt - 1, segment.offset + segment.length)
            task_BS[place, answer] = 0.0
            sampled_BS[place, answer] = 1.0
            if rollout.advantage:
                scored = True
                advantage_BS[place, answer] = torch.tensor(rollout.advantage)
                logq_BS[place, answer] = torch.tensor(rollout.logq)
    if not scored:
        return replace(batch, task_weight_BS=task_BS)
    return replace(
        batch, task_weight_BS=task_BS, sampled_BS=sampled_BS, advantage_BS=advantage_BS, sampled_logq_BS=logq_BS
    )
