"""Prompts, the buffer, and rollouts as rows of a micro-batch."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from largekd.contracts import COUNT_NAMES, IGNORE_LABEL, Segment, counts_of
from largekd.data.collate import collate
from largekd.data.samples import FEATURES
from largekd.data.store import SampleStore
from largekd.errors import CheckpointError, DataError
from largekd.generation.batches import FIRST_ID, with_rollouts, written_sample
from largekd.generation.buffer import Rollout, RolloutBuffer, RolloutRow
from largekd.generation.prompts import PromptSource

MASKS = [
    [],  # a text
    [0, 0, 0, 1, 1, 0, 0, 1, 1],  # two answers
    [0] * 9,  # no answer
    [0, 1, 1, 1, 1, 1, 1, 1, 1],
    [0, 0, 0, 0, 0, 0, 0, 0, 1],  # a long prompt
]


def _store(columns):
    return SampleStore(Dataset.from_dict(columns, features=FEATURES), kept=np.arange(len(columns["ids"])))


@pytest.fixture
def store():
    ids = [[10 * sample + place for place in range(9)] for sample in range(len(MASKS))]
    columns = {"ids": ids, "label_mask": MASKS, "weight": [0.5] * 5, "record": list(range(5)), "digest": [0] * 5}
    columns |= {"truncated": [False] * 5, "reason": [""] * 5}
    return _store(columns)


def test_a_prompt_is_what_stands_before_the_last_answer_or_a_texts_beginning(store):
    source = PromptSource(store, prompt_tokens=7, seed=0)
    found = [source.of(sample) for sample in range(5)]
    lengths = [None if prompt is None else len(prompt) for prompt in found]
    assert lengths == [7, 7, None, 1, None]
    assert found[1].tolist() == store.ids(1)[:7].tolist()
    assert len(PromptSource(store, prompt_tokens=50, seed=0).of(0)) == 8


def test_prompts_of_a_step_are_a_function_of_seed_and_step(store):
    def chosen(seed, step, count=3):
        return [
            prompt.sample_id
            for prompt in PromptSource(store, prompt_tokens=7, seed=seed).choose(step=step, count=count)
        ]

    assert chosen(0, 5) == chosen(0, 5) and sorted(chosen(0, 5)) == [0, 1, 3]
    assert len({tuple(chosen(0, step)) for step in range(20)}) > 2
    assert chosen(0, 5, count=7)[:3] == chosen(0, 5) and len(chosen(0, 5, count=7)) == 7


def test_prompts_that_are_all_too_long_are_refused_with_the_key():
    ids = [[place for place in range(9)] for _ in range(3)]
    columns = {"ids": ids, "label_mask": [[0] * 8 + [1]] * 3, "weight": [1.0] * 3, "record": [0, 1, 2]}
    source = PromptSource(
        _store(columns | {"digest": [0] * 3, "truncated": [False] * 3, "reason": [""] * 3}), prompt_tokens=7, seed=0
    )
    with pytest.raises(DataError, match=r"none of 3 samples.*rollouts\.prompt_tokens = 7"):
        source.choose(step=0, count=1)


def _row(*, born, tag=0):
    return RolloutRow((Rollout(sample_id=tag, ids=(1, 2, 3), prompt=2, ended=True, logq=(-0.1,)),), born=born)


def test_rows_are_reused_so_often_and_until_they_are_stale():
    buffer = RolloutBuffer(reuse=3, max_staleness=1)
    buffer.add([_row(born=0), _row(born=0)])
    assert buffer.usable(step=0) == 2 and len(buffer.take(1, step=0)) == 1
    assert buffer.usable(step=1) == 2
    buffer.add([_row(born=1)])
    assert [row.born for row in buffer.take(3, step=1)] == [0, 0, 1]
    assert buffer.usable(step=2) == 1 and buffer.usable(step=3) == 0
    once = RolloutBuffer(reuse=1, max_staleness=9)
    once.add([_row(born=0)])
    once.take(1, step=0)
    assert once.usable(step=0) == 0 and once.state() == []


def test_a_buffers_state_survives_json():
    buffer, other = (RolloutBuffer(reuse=2, max_staleness=9) for _ in range(2))
    buffer.add([_row(born=0, tag=1), _row(born=1, tag=2)])
    taken = buffer.take(1, step=1)
    other.restore(json.loads(json.dumps(buffer.state())))
    assert other.state() == buffer.state()
    assert other.take(2, step=2)[0].rollouts == taken[0].rollouts
    with pytest.raises(CheckpointError, match="rollouts"):
        other.restore([{"born": 1}])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("source", ["student", "teacher"])
def test_rows_are_replaced_and_labels_are_the_answers(store, packing, source):
    rows = [(Segment(0, 0, 8),), (Segment(3, 0, 8),)]
    batch = collate(rows, samples=store, sequence_length=16, packing=packing)
    answers = (
        Rollout(0, ids=(5, 6, 7, 8), prompt=2, ended=True, logq=(-1.0, -2.0), rewards=(0.5, 1.0), advantage=(1.5, 1.0)),
        Rollout(3, ids=(9, 4), prompt=1, ended=False, logq=(-3.0,), rewards=(2.0,), advantage=(-2.0,)),
    )
    kept = answers if packing else answers[:1]
    places = {1: RolloutRow(kept, born=0)}
    made = with_rollouts(batch, data=store, places=places, source=source, sequence_length=16)
    assert made.origin == "rollout" and batch.origin == "train"
    assert torch.equal(made.input_ids_BS[0, :8], batch.input_ids_BS[0, :8])
    assert made.labels_BS[1, :4].tolist() == [IGNORE_LABEL, 7, 8, 4 if packing else IGNORE_LABEL]
    assert made.token_weight_BS[1, :4].tolist() == [0, 1, 1, 1 if packing else 0]
    assert made.token_weight_BS[0, :8].tolist() == [0.5] * 8
    assert [segment.sample_id for segment in made.segments[1]] == [FIRST_ID, 2 * FIRST_ID + 3][: len(kept)]
    assert [written_sample(segment.sample_id) for segment in made.segments[1]] == [0, 3][: len(kept)]
    assert written_sample(made.segments[0][0].sample_id) is None
    counts = dict(zip(COUNT_NAMES, counts_of([made]).tolist(), strict=True))
    answers_tokens = 3.0 if packing else 2.0
    assert counts["label_tokens"] == counts["signal_tokens"] == 4.0 + answers_tokens
    if source == "teacher":
        assert made.task_weight_BS is None and counts["task_tokens"] == counts["label_tokens"]
        assert counts["sampled_tokens"] == 0
        return
    assert counts["task_tokens"] == 4.0 and counts["sampled_tokens"] == answers_tokens
    assert made.advantage_BS[1, :4].tolist() == [0, 1.5, 1.0, -2.0 if packing else 0]
    assert made.sampled_logq_BS[1, :4].tolist() == [0, -1.0, -2.0, -3.0 if packing else 0]
    assert not made.advantage_BS[0].any() and not made.sampled_BS[0].any()


def test_a_batch_without_rollouts_is_left_alone(store):
    batch = collate([(Segment(0, 0, 8),)], samples=store, sequence_length=16, packing=True)
    assert with_rollouts(batch, data=store, places={}, source="student", sequence_length=16) is batch
    counts = dict(zip(COUNT_NAMES, counts_of([batch]).tolist(), strict=True))
    assert counts["task_tokens"] == counts["label_tokens"] == 4.0 and counts["sampled_tokens"] == 0
