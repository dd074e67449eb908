"""The process group leaves nothing behind."""

import os
from pathlib import Path


def buffers_of_this_job() -> list[str]:
    """Names in shared memory that carry this job's port."""
    return [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]


def sum_of_ranks() -> float:
    import torch

    from largekd.runtime.ranks import all_sum

    return float(all_sum(torch.tensor(float(os.environ["RANK"]) + 1.0)))


def test_shared_memory_has_no_names_and_collectives_go_on(two_ranks) -> None:
    assert two_ranks.run(sum_of_ranks) == [3.0, 3.0]
    assert two_ranks.run(buffers_of_this_job) == [[], []]
