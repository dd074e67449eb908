"""The tool that looks at a cache: figures of what is stored, and damage by name."""

import json

import inspect_cache
import numpy as np
import pytest
import torch

from largekd.config.cache import TopKCodecConfig
from largekd.teachers.cache_codec import TopKCodec
from largekd.teachers.cache_format import (
    FORMAT,
    MANIFEST_FILE,
    DataIdentity,
    Identity,
    Manifest,
    TeacherIdentity,
    shard_path,
    write_shard,
)
from largekd.teachers.cache_taps import StoredAttention, StoredLayers

VOCAB = 500


def make_folder(folder, *, layers=None):
    """Two samples of a teacher that is even over 100 of its ids; the values of `layers` are all 3."""
    logits = torch.full((6, VOCAB), float("-inf"))
    logits[:, :100] = 0.0
    config = TopKCodecConfig(k=50)
    codec = TopKCodec(config, vocab_size=VOCAB)
    rows = codec.encode_chunk(torch.log_softmax(logits, -1), labels_C=torch.zeros(6, dtype=torch.int64))
    (folder / "train").mkdir()
    tensors, captured = {name: rows[name] for name in codec.shapes}, None
    if layers is not None:
        shapes = layers.codec.shapes.items()
        tensors |= {name: torch.full((8, width), 3.0, dtype=dtype) for name, (dtype, width) in shapes}
        captured = np.array([0, 3, 8])
    record = write_shard(
        shard_path(folder, origin="train", number=0),
        tensors=tensors,
        offsets=np.array([0, 2, 6]),
        rank=0,
        number=0,
        position_offsets=captured,
    )
    teacher = TeacherIdentity(
        model="some/teacher",
        weights="w",
        config="c",
        tokenizer="t",
        vocab_size=VOCAB,
        width=4,
        precision="fp32",
        attention="sdpa",
    )
    identity = Identity(
        format=FORMAT,
        codec=config,
        teacher=teacher,
        data={"train": DataIdentity(fingerprint="f", chat_template=None, samples=2)},
        sequence_length=8,
        packing=True,
        micro_batch_size=2,
        shard_samples=4,
    )
    manifest = Manifest.of(identity, shards={"train": [record]}, head=None, layers=layers)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest.model_dump(mode="json")))
    return manifest


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path)
    return tmp_path


def test_figures_of_a_known_teacher(folder, capsys):
    assert inspect_cache.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "some/teacher" in shown and "2 samples, 6 tokens, 1 shards" in shown
    assert "all checksums are right" in shown
    assert float(shown.split("kept mass   mean ")[1].split(",")[0]) == pytest.approx(0.5, abs=1e-3)
    # 50 ids at 1/100 and one outcome of 1/2.
    assert float(shown.split("entropy     mean ")[1].split(" nats")[0]) == pytest.approx(2.649, abs=5e-3)
    assert "2.0 … 3.0  100.0%" in shown


def test_captured_layers_are_listed_with_their_size(tmp_path, capsys):
    layers = StoredLayers(
        precision="bf16",
        depth=8,
        width=4,
        hidden=(1, 5),
        attention=(StoredAttention(layer=5, heads=2, key_heads=1, head_width=2, scale=1.0, window=None, softcap=None),),
    )
    manifest = make_folder(tmp_path, layers=layers)
    assert manifest.layers.codec.position_bytes == 2 * (2 * 4 + 2 * 2 + 2 * 2)
    assert inspect_cache.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "hidden states of 1, 5; attention inputs of 5; of 8, bf16, 32 bytes per position" in shown
    assert "6 tokens, 1 shards" in shown and "8 positions" in shown
    assert "hidden.5    root mean square 3" in shown and "value.5     root mean square 3" in shown


def test_one_flipped_bit_is_named(folder, capsys):
    path = shard_path(folder, origin="train", number=0)
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    assert inspect_cache.main([str(folder)]) == 1
    assert f"DAMAGED {path}" in capsys.readouterr().out


def test_a_folder_without_a_cache(tmp_path, capsys):
    assert inspect_cache.main([str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err
