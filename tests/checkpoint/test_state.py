"""Owners: what they save is what they load, and a checkpoint of another kind of run is refused."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_forked
from savers import Job

from largekd.checkpoint.state import JsonOwner, RandomOwner, load_state, save_state
from largekd.errors import CheckpointError
from largekd.runtime.ranks import Ranks, current_ranks
from largekd.runtime.seeds import seed_everything


def _draws() -> list[float]:
    normal = float(np.random.standard_normal())
    return [random.random(), random.gauss(0, 1), normal, *torch.randn(3).tolist(), *torch.rand(2).tolist()]


def _resume_draws(folder: str) -> list[list[float]]:
    """Draws that follow a save, and draws that follow loading it."""
    job = Job(Path(folder), ranks=current_ranks())
    job.store.prepare()
    owners = {"rng": RandomOwner(ranks=job.ranks)}
    seed_everything(11 + job.ranks.rank)
    _draws()
    path = save_state(job.store, step=1, owners=owners)
    wanted = _draws()
    seed_everything(0)
    load_state(path, owners=owners)
    return [wanted, _draws()]


def test_every_rank_gets_its_own_random_state_back(tmp_path: Path) -> None:
    outcomes = run_forked(_resume_draws, tmp_path=tmp_path, world_size=2, folder=str(tmp_path / "checkpoints"))
    for outcome in outcomes:
        wanted, found = outcome.value
        assert wanted == found
    assert outcomes[0].value[0] != outcomes[1].value[0]


def test_owners_of_another_run_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    job = Job(tmp_path / "checkpoints", ranks=Ranks())
    job.store.prepare()
    path = job.save(1)
    job.step = 99
    fewer = {name: owner for name, owner in job.owners.items() if name != "engine"}
    with pytest.raises(CheckpointError, match=r"lacks nothing and holds \['engine'\]"):
        load_state(path, owners=fewer)
    more = {**job.owners, "loader": JsonOwner(get=dict, put=lambda value: None, ranks=Ranks())}
    with pytest.raises(CheckpointError, match=r"lacks \['loader'\] and holds nothing"):
        load_state(path, owners=more)
    assert job.step == 99


def test_json_per_rank(tmp_path: Path) -> None:
    loaded: list[object] = []
    for rank in (0, 1):
        owner = JsonOwner(
            get=lambda rank=rank: {"at": rank}, put=loaded.append, ranks=Ranks(rank=rank, world_size=2), per_rank=True
        )
        owner.save(tmp_path)
        owner.load(tmp_path)
    assert loaded == [{"at": 0}, {"at": 1}]
    with pytest.raises(CheckpointError, match=r"rank_00002\.json: cannot be read"):
        JsonOwner(get=dict, put=loaded.append, ranks=Ranks(rank=2, world_size=3), per_rank=True).load(tmp_path)
