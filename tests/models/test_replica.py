"""A whole copy of a sharded model: the same model, while the sharded one stays as it is."""

import pytest
from rollout_jobs import copy_model
from tiny import save_tiny_llama


@pytest.mark.parametrize(("tied", "precision"), [(True, "fp32"), (False, "bf16")])
def test_a_copy_is_the_same_model_and_leaves_the_shards_alone(two_ranks, tmp_path, tied, precision):
    student = save_tiny_llama(tmp_path / "student", seed=1, tied=tied)
    for result in two_ranks.run(copy_model, student=str(student), precision=precision):
        assert result.pop("tied") is tied
        assert all(result.values()), [name for name, same in result.items() if not same]
