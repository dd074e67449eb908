"""Seeding and random state on disk."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from largekd.errors import CheckpointError
from largekd.runtime.seeds import load_random_state, save_random_state, seed_everything


def _draws() -> list[float]:
    gauss = [random.gauss(0, 1), float(np.random.standard_normal())]
    return [random.random(), *gauss, float(np.random.random()), *torch.randn(3).tolist(), float(torch.rand(()))]


def test_the_same_seed_gives_the_same_draws() -> None:
    seed_everything(5)
    first = _draws()
    seed_everything(6)
    other = _draws()
    seed_everything(5)
    assert _draws() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_state_comes_back_in_the_middle_of_a_gaussian_pair(tmp_path: Path) -> None:
    seed_everything(1)
    # Both generators make normal draws in pairs; after an odd number one waits in the state.
    random.gauss(0, 1)
    np.random.standard_normal()
    save_random_state(tmp_path, rank=3)
    wanted = _draws()
    seed_everything(2)
    load_random_state(tmp_path, rank=3)
    assert _draws() == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_00003.json", "rank_00003.safetensors"]


def test_another_rank_or_accelerator_is_refused(tmp_path: Path) -> None:
    save_random_state(tmp_path, rank=0)
    with pytest.raises(CheckpointError, match="no usable random state for rank 1"):
        load_random_state(tmp_path, rank=1)
    path = tmp_path / "rank_00000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accelerator": "cuda"}))
    with pytest.raises(CheckpointError, match="saved on accelerator cuda, this process has None"):
        load_random_state(tmp_path, rank=0)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="no usable random state"):
        load_random_state(tmp_path, rank=0)
