"""A cache's shards are refused before the first forward where host memory would not hold one."""

import pytest
from tiny_run import cache, settings

from largekd.distillation.cache_writer import check_memory
from largekd.errors import ConfigError


def test_a_shard_that_memory_does_not_hold_is_refused_with_a_number_that_fits():
    check_memory(400, free=1000, shard_samples=100)
    with pytest.raises(ConfigError, match=r"cache\.shard_samples = 100: .* about 50 would fit"):
        check_memory(800, free=1000, shard_samples=100)
    with pytest.raises(ConfigError, match="about 1 would fit"):
        check_memory(10**6, free=1, shard_samples=100)


def starved(*, tree, free):
    """For a rank pool: the message of a caching job on a machine with this much free memory."""
    from types import SimpleNamespace
    from unittest.mock import patch

    memory = "largekd.distillation.cache_writer.psutil.virtual_memory"
    with patch(memory, lambda: SimpleNamespace(available=free)), pytest.raises(ConfigError) as caught:
        cache(tree=tree)
    return str(caught.value)


def test_the_job_counts_codec_and_layers(tiny_assets, one_rank, tmp_path):
    features = [{"name": "hidden", "loss": "mse", "layers": {"map": "uniform"}}]
    tree = settings(tiny_assets, tmp_path / "run", objective__features=features)
    tree["cache"] = {"path": str(tmp_path / "cache"), "shard_samples": 1000, "codec": {"kind": "hidden"}}
    one_rank.run(cache, tree=tree | {"cache": tree["cache"] | {"path": str(tmp_path / "fits")}})
    needed = sum(path.stat().st_size for path in (tmp_path / "fits/train").rglob("*") if path.is_file())
    (message,) = one_rank.run(starved, tree=tree, free=int(needed * 1.5))
    assert message.startswith("cache.shard_samples = 1000: the largest shard takes")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
