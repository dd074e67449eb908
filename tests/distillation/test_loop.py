"""What the loop does around a step that can be seen without a model."""

from types import SimpleNamespace

import pytest
import torch

from largekd.config.objective import ObjectiveConfig
from largekd.contracts import Progress
from largekd.distillation.loop import _read_ahead, _setting
from largekd.distillation.numerics import find_culprits
from largekd.generation.batches import FIRST_ID
from largekd.objectives.terms import build_objective


class _Asked:
    def __init__(self):
        self.prepared = []

    def prepare(self, batches, *, request):
        self.prepared.append(batches)


@pytest.mark.parametrize("rollouts", [None, object()])
def test_the_next_step_is_asked_for_only_where_its_rows_are_known(rollouts):
    teacher = _Asked()
    parts = SimpleNamespace(
        teacher=teacher,
        loader=SimpleNamespace(upcoming=lambda: ["next"]),
        rollouts=rollouts,
        objective=build_objective(ObjectiveConfig()),
        alignment=None,
        router=None,
        seed=0,
        layer_drop=None,
        config=SimpleNamespace(train=SimpleNamespace(seed=0)),
    )
    session = SimpleNamespace(parts=parts)
    setting = _setting(session, step=0, max_steps=4)
    _read_ahead(session, micro_batches=["this"], setting=setting, progress=Progress(step=0, max_steps=4))
    assert teacher.prepared == ([["this"], ["next"]] if rollouts is None else [["this"]])


def test_a_rollout_among_the_culprits_is_named_by_the_sample_of_its_prompt():
    batch = SimpleNamespace(sample_ids=(7, FIRST_ID + 12, 2 * FIRST_ID + 12, 5 * FIRST_ID + 3))
    (culprit,) = find_culprits([batch], losses=[torch.tensor(float("nan"))], gradients_finite=True, rank=0)
    assert str(culprit) == "rank 0 (loss; samples 7, rollout of sample 12, rollout of sample 3)"
