"""Rollouts around a loader's steps: whole groups of answers for baselines, and a step that is taken back."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from largekd.config.rollouts import RolloutConfig
from largekd.data.collate import collate
from largekd.data.packing import one_per_row
from largekd.data.samples import FEATURES
from largekd.data.store import SampleStore
from largekd.generation import rollouts as room
from largekd.generation.rollouts import Rollouts, RowShape
from largekd.generation.writer import Answer
from largekd.runtime.ranks import Ranks

ROWS = 3


class _Dice:
    """Writes one to four tokens; what they are follows from a question's seed alone."""

    def __init__(self):
        self.written = 0

    def write(self, questions, *, calls, beat):
        self.written += len(questions)
        answers = []
        for question in questions:
            generator = np.random.default_rng(question.seed)
            length = int(generator.integers(1, 5))
            ids, logq = generator.integers(3, 50, length).tolist(), (-generator.random(length)).tolist()
            answers.append(Answer(ids=tuple(ids), logq=tuple(logq), ended=True))
        return answers


@pytest.fixture
def store():
    columns = {"ids": [[10 * sample + place for place in range(9)] for sample in range(5)], "label_mask": [[]] * 5}
    columns |= {"weight": [1.0] * 5, "record": list(range(5)), "digest": [0] * 5}
    columns |= {"truncated": [False] * 5, "reason": [""] * 5}
    return SampleStore(Dataset.from_dict(columns, features=FEATURES), kept=np.arange(5))


def _rollouts(store, writer, **changes):
    shape = RowShape(
        global_batch_size=ROWS, micro_batch_size=ROWS, sequence_length=16, packing=False, chunk_tokens=8, seed=0
    )
    return Rollouts(
        RolloutConfig(share=1.0, prompt_tokens=4, max_new_tokens=4, **changes),
        shape=shape,
        samples=store,
        writer=writer,
        teacher=None,
        ranks=Ranks(),
        device=torch.device("cpu"),
    )


def _steps(store, *, count):
    rows = one_per_row(store.lengths, order=np.arange(ROWS))
    return iter([[collate(rows, samples=store, sequence_length=16, packing=False)] for _ in range(count)])


@pytest.mark.parametrize("samples_per_prompt", [2, 3])
def test_every_kept_answer_is_compared_with_all_others_of_its_prompt(store, monkeypatch, samples_per_prompt):
    scored = []

    def teacher_logp(answers, **_):
        scored.extend(answers)
        return [tuple(-0.5 for _ in answer.logq) for answer in answers]

    monkeypatch.setattr(room, "teacher_logp", teacher_logp)
    writer = _Dice()
    rollouts = _rollouts(store, writer, samples_per_prompt=samples_per_prompt, policy_gradient={})
    next(rollouts.steps(_steps(store, count=1), first=0, beat=lambda: None))
    groups = -(-ROWS // samples_per_prompt)
    assert writer.written == len(scored) == groups * samples_per_prompt and len(rollouts.latest) == ROWS

    returns = [np.cumsum([-0.5 - q for q in one.logq][::-1])[::-1] for one in scored]
    for place, kept in enumerate(rollouts.latest):
        first = place // samples_per_prompt * samples_per_prompt
        others = [returns[other] for other in range(first, first + samples_per_prompt) if other != place]
        expected = returns[place].copy()
        for other in others:
            shared = min(len(expected), len(other))
            expected[:shared] -= other[:shared] / len(others)
        assert kept.ids == scored[place].ids and kept.advantage == pytest.approx(expected)


def test_without_that_baseline_nothing_is_written_in_vain(store):
    writer = _Dice()
    next(_rollouts(store, writer, samples_per_prompt=2).steps(_steps(store, count=1), first=0, beat=lambda: None))
    assert writer.written == ROWS


@pytest.mark.parametrize("max_staleness", [0, 5])
def test_a_step_that_is_taken_back_has_used_and_written_nothing(store, max_staleness):
    rollouts = _rollouts(store, _Dice(), reuse=3, max_staleness=max_staleness)
    steps = rollouts.steps(_steps(store, count=3), first=0, beat=lambda: None)
    next(steps)
    before = rollouts.state()
    next(steps)
    assert rollouts.state() != before
    rollouts.take_back()
    assert rollouts.state() == before and len(before) == ROWS
