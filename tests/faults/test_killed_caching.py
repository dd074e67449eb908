"""A caching job that is killed goes on shard by shard, and what it leaves is what an undisturbed job leaves."""

import json
import signal

import pytest
import tiny_run
from tiny_run import settings

POINTS = (("before_shard", 1), ("after_shard", 2), ("before_manifest", 0))


def recipe(assets, folder):
    tree = settings(assets, folder / "run")
    return {**tree, "cache": {"path": str(folder / "cache"), "shard_samples": 30}}


@pytest.fixture(scope="module")
def straight(tiny_assets, two_ranks, tmp_path_factory):
    """The digest of the job that nobody kills."""
    digest, _ = two_ranks.run(tiny_run.cache, tree=recipe(tiny_assets, tmp_path_factory.mktemp("straight")))
    return digest


@pytest.mark.parametrize(
    "points", [POINTS[1:2], pytest.param(POINTS, marks=pytest.mark.slow)], ids=["one kill", "three kills"]
)
def test_a_killed_caching_job_goes_on(straight, tiny_assets, job_server, tmp_path, points):
    tree = recipe(tiny_assets, tmp_path)
    job = {"folder": tmp_path / "job", "script": "cache_teacher"}
    for point, number in points:
        killed = job_server.start(tree, LARGEKD_TEST_FAULT=f"cache:{point}:rank*:step{number}:sigkill", **job)
        assert -signal.SIGKILL in killed.wait(), killed.text()
        assert not (tmp_path / "cache/manifest.json").exists()
    finished = job_server.start(tree, **job)
    assert finished.wait() == [0, 0], finished.text()
    assert json.loads((tmp_path / "cache/manifest.json").read_text())["digest"] == straight
    assert not list(tmp_path.glob("cache/*/.tmp-*"))
