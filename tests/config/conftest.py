"""A minimal run configuration and a way to change one key of it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "teacher": {"model": "t", "deepspeed": "ds_configs/teacher_zero3.json"},
    "student": {"model": "s", "deepspeed": "ds_configs/zero3.json"},
    "data": {"train": "train.jsonl"},
    "train": {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 16},
}


@pytest.fixture
def minimal() -> dict[str, Any]:
    return copy.deepcopy(MINIMAL)


@pytest.fixture
def with_key() -> Callable[[str, object], dict[str, Any]]:
    """with_key("train.seed", 3): the minimal configuration with that key."""

    def change(key: str, value: object) -> dict[str, Any]:
        tree = copy.deepcopy(MINIMAL)
        *parents, last = key.split(".")
        here = tree
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = value
        return tree

    return change
