"""A cache's folder: random access to any samples, and damage that is found."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from largekd.config.cache import TopKCodecConfig
from largekd.contracts import Segment
from largekd.errors import ConfigError, TeacherError
from largekd.runtime.ranks import Ranks
from largekd.teachers.cache_format import (
    FORMAT,
    MANIFEST_FILE,
    CacheReader,
    DataIdentity,
    Identity,
    Manifest,
    TeacherIdentity,
    check_shards,
    read_manifest,
    shard_path,
    verified_shard,
    write_shard,
)

COUNTS = [3, 0, 5, 2, 4, 1, 6]
SIZE = 3


def make_cache(folder: Path) -> Manifest:
    """Seven samples in three shards; a row holds its sample and its place there."""
    (folder / "train").mkdir(parents=True)
    records = []
    for number in range(3):
        samples = range(number * SIZE, min((number + 1) * SIZE, len(COUNTS)))
        values = torch.tensor([[s, place] for s in samples for place in range(COUNTS[s])]).reshape(-1, 2)
        offsets = np.concatenate(([0], np.cumsum([COUNTS[s] for s in samples]))).astype(np.int64)
        tensors = {"a": values.to(torch.int16), "b": values.to(torch.bfloat16)}
        path = shard_path(folder, origin="train", number=number)
        records.append(write_shard(path, tensors=tensors, offsets=offsets, rank=0, number=number))
    identity = Identity(
        format=FORMAT,
        codec=TopKCodecConfig(),
        teacher=TeacherIdentity(
            model="m",
            weights="w",
            config="c",
            tokenizer="t",
            vocab_size=9,
            width=4,
            precision="fp32",
            attention="sdpa",
        ),
        data={"train": DataIdentity(fingerprint="f", chat_template=None, samples=len(COUNTS))},
        sequence_length=8,
        packing=True,
        micro_batch_size=2,
        shard_samples=SIZE,
    )
    manifest = Manifest.of(identity, shards={"train": records}, head=None)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest.model_dump(mode="json")))
    return manifest


def test_any_samples_in_any_order(tmp_path):
    make_cache(tmp_path)
    reader = CacheReader(tmp_path, manifest=read_manifest(tmp_path))
    wanted = [6, 2, 2, 1, 0, 5]
    rows = reader.rows([Segment(sample, 0, 9) for sample in wanted], origin="train")
    expected = [[sample, place] for sample in wanted for place in range(COUNTS[sample])]
    assert rows["a"].tolist() == expected
    assert rows["b"].dtype == torch.bfloat16 and rows["b"].tolist() == expected
    assert rows["a"].dtype == torch.int16


def test_a_batch_without_samples_has_the_same_columns(tmp_path):
    make_cache(tmp_path)
    rows = CacheReader(tmp_path, manifest=read_manifest(tmp_path)).rows([], origin="train")
    assert {name: tuple(tensor.shape) for name, tensor in rows.items()} == {"a": (0, 2), "b": (0, 2)}


def test_a_data_set_that_was_not_cached_is_named(tmp_path):
    manifest = make_cache(tmp_path)
    with pytest.raises(TeacherError, match=r"data\.eval"):
        CacheReader(tmp_path, manifest=manifest).rows([], origin="eval")


@pytest.mark.parametrize("place", [0, 40, -1])
def test_one_flipped_bit_is_found(tmp_path, place):
    make_cache(tmp_path)
    path = shard_path(tmp_path, origin="train", number=1)
    assert verified_shard(path) is not None
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert verified_shard(path) is None


def test_a_shard_without_its_record_is_not_whole(tmp_path):
    make_cache(tmp_path)
    path = shard_path(tmp_path, origin="train", number=0)
    path.with_suffix(".json").write_text("{")
    assert verified_shard(path) is None
    path.with_suffix(".json").unlink()
    assert verified_shard(path) is None


def test_a_missing_or_cut_shard_is_refused(tmp_path):
    manifest = make_cache(tmp_path)
    path = shard_path(tmp_path, origin="train", number=0)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TeacherError, match="cannot be read"):
        CacheReader(tmp_path, manifest=manifest).rows([Segment(0, 0, 3)], origin="train")
    path.unlink()
    with pytest.raises(TeacherError, match=r"shard_00000"):
        CacheReader(tmp_path, manifest=manifest).rows([Segment(0, 0, 3)], origin="train")


def test_all_shards_are_looked_at_before_a_run(tmp_path):
    manifest = make_cache(tmp_path)
    (a, b), ranks = (2 * 2, 2 * 2), Ranks()

    def check(ranks=ranks, origins=("train",)):
        check_shards(tmp_path, manifest=manifest, origins=origins, token_bytes=a + b, ranks=ranks)

    check()
    path = shard_path(tmp_path, origin="train", number=1)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:5], b""):
        path.write_bytes(damaged)
        with pytest.raises(TeacherError, match=rf"shard_00001.* it has {len(damaged)} bytes"):
            check()
    path.unlink()
    with pytest.raises(TeacherError, match=r"shard_00001.*cannot be read"):
        check()
    check(origins=())
    one, other = (Ranks(rank=rank, world_size=2, local_rank=rank, local_world_size=2) for rank in range(2))
    check(one)
    with pytest.raises(TeacherError, match="shard_00001"):
        check(other)


def test_a_manifest_is_not_edited(tmp_path):
    make_cache(tmp_path)
    path = tmp_path / MANIFEST_FILE
    tree = json.loads(path.read_text())
    tree["identity"]["teacher"]["weights"] = "other"
    path.write_text(json.dumps(tree))
    with pytest.raises(TeacherError, match="was changed"):
        read_manifest(tmp_path)
    tree["identity"]["format"] = FORMAT + 1
    path.write_text(json.dumps(tree))
    with pytest.raises(TeacherError, match=f"format {FORMAT + 1}"):
        read_manifest(tmp_path)
    path.write_text("[]")
    with pytest.raises(TeacherError, match="not a cache's manifest"):
        read_manifest(tmp_path)
    path.unlink()
    with pytest.raises(TeacherError, match=r"no manifest\.json"):
        read_manifest(tmp_path)


def test_a_full_disk_is_the_users_to_mend_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LARGEKD_TEST_FAULT", "cache:before_shard:rank0:step0:enospc")
    with pytest.raises(ConfigError, match=r"cache\.path: .*cannot be written"):
        make_cache(tmp_path)
    assert list((tmp_path / "train").iterdir()) == []
