"""Weights, master copies and moments from one engine to the next."""

import pytest
import torch
from stage_jobs import split_training
from tiny import save_tiny_llama

from largekd.engine.carried import by_updates
from largekd.optim.groups import ParameterGroup


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    teacher = save_tiny_llama(folder / "teacher", seed=1, layers=3, hidden=48)
    return {"teacher": str(teacher), "student": str(save_tiny_llama(folder / "student", seed=2))}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_new_engine_with_the_moments_goes_on_bit_for_bit(models, two_ranks, precision):
    options = {"steps": 5, "moments": True, "precision": precision, **models}
    straight = two_ranks.run(split_training, switch_at=None, **options)
    switched = two_ranks.run(split_training, switch_at=2, **options)
    for mine, theirs in zip(switched, straight, strict=True):
        assert mine["losses"] == theirs["losses"]
        for name, master in theirs["masters"].items():
            assert torch.equal(mine["masters"][name], master), name
    if precision == "bf16":
        low = [m != m.bfloat16().float() for m in straight[0]["masters"].values() if m.numel()]
        assert any(bool(part.any()) for part in low), "the masters must have more digits than the weights"


def test_without_the_moments_the_optimizer_begins_anew(models, two_ranks):
    straight, _ = two_ranks.run(split_training, switch_at=None, steps=4, moments=True, **models)
    fresh, _ = two_ranks.run(split_training, switch_at=2, steps=4, moments=False, **models)
    assert fresh["losses"][:3] == straight["losses"][:3], "weights are the same until the first new update"
    assert fresh["losses"][3] != straight["losses"][3]


def test_groups_are_split_by_the_number_of_updates():
    weights = tuple(torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(4))
    group = ParameterGroup("default", 1.0, 0.1, (0.9, 0.95), 1e-8, ("a", "b", "c", "d"), weights)
    split = by_updates((group,), updates={"a": 7, "c": 7, "d": 3})
    assert [(part.name, part.parameter_names) for part in split] == [
        ("default", ("a", "c")),
        ("default.after_3", ("d",)),
        ("default.after_0", ("b",)),
    ]
    assert by_updates((group,), updates={}) == (group,)
