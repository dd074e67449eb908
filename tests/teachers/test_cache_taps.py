"""Captured activations as rows of a shard, and back as records of another batch."""

import numpy as np
import pytest
import torch

from largekd.contracts import AttentionInputs, Batch, Segment, TapRequest, Taps
from largekd.errors import TeacherError
from largekd.teachers.cache_format import CacheReader, check_shards, read_manifest
from largekd.teachers.cache_taps import StoredAttention, StoredLayers, names_of, positions_of

WIDTH, HEADS, KEY_HEADS, HEAD_WIDTH = 6, 4, 2, 3


def stored(precision="fp32"):
    rule = {"heads": HEADS, "key_heads": KEY_HEADS, "head_width": HEAD_WIDTH}
    return StoredLayers(
        precision=precision,
        depth=9,
        width=WIDTH,
        hidden=(2, 7),
        attention=(
            StoredAttention(layer=3, scale=0.5, window=4, softcap=None, **rule),
            StoredAttention(layer=7, scale=0.25, window=None, softcap=30.0, **rule),
        ),
    )


def batch_of(rows, *, positions):
    shape = (len(rows), positions)
    return Batch(
        input_ids_BS=torch.zeros(shape, dtype=torch.int64),
        labels_BS=torch.zeros(shape, dtype=torch.int64),
        token_weight_BS=torch.ones(shape),
        counted_T=torch.arange(shape[0] * shape[1]),
        segments=tuple(rows),
    )


def captured(batch, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, positions = batch.input_ids_BS.shape

    def draw(heads):
        # As a model leaves them: heads behind positions in memory.
        return torch.randn(rows, positions, heads, HEAD_WIDTH, generator=generator).transpose(1, 2)

    return Taps(
        hidden={layer: torch.randn(rows, positions, WIDTH, generator=generator) for layer in (2, 7)},
        attention={
            layer: AttentionInputs(draw(HEADS), draw(KEY_HEADS), draw(KEY_HEADS), scale=rule.scale)
            for layer, rule in stored().rules.items()
        },
    )


def test_other_rows_of_the_same_samples_get_the_same_values():
    written = batch_of([(Segment(5, 0, 3), Segment(8, 3, 4)), (Segment(6, 0, 2),), ()], positions=8)
    taps, layers = captured(written), stored()
    rows = layers.codec.encode(taps, places_P=positions_of(written))
    assert rows.pop("finite").tolist() == [True] * 9
    assert sum(tensor[0].nbytes for tensor in rows.values()) == layers.codec.position_bytes
    by_sample = {5: slice(0, 3), 8: slice(3, 7), 6: slice(7, 9)}
    read = batch_of([(Segment(8, 1, 4),), (Segment(6, 0, 2), Segment(5, 2, 3))], positions=5)
    ordered = {name: torch.cat([tensor[by_sample[s]] for s in (8, 6, 5)]) for name, tensor in rows.items()}
    request = TapRequest(hidden=(7,), attention=(3, 7))
    found = layers.taps(ordered, request=request, batch=read, places_P=positions_of(read))
    assert found.hidden.keys() == {7} and found.attention.keys() == {3, 7}
    assert torch.equal(found.hidden[7][0, 1:], taps.hidden[7][0, 3:7]) and not found.hidden[7][0, 0].any()
    for layer, inputs in found.attention.items():
        before = taps.attention[layer]
        for name, heads in (("query_BHSd", HEADS), ("key_BGSd", KEY_HEADS), ("value_BGSd", KEY_HEADS)):
            mine, theirs = getattr(inputs, name), getattr(before, name)
            assert mine.shape == (2, heads, 5, HEAD_WIDTH)
            assert torch.equal(mine[1, :, 2:], theirs[0, :, :3]) and torch.equal(mine[1, :, :2], theirs[1, :, :2])
    rules = [(inputs.scale, inputs.window, inputs.softcap) for inputs in found.attention.values()]
    assert rules == [(0.5, 4, None), (0.25, None, 30.0)]


def test_a_value_that_is_not_a_number_is_found_at_its_position():
    batch = batch_of([(Segment(0, 0, 4),)], positions=4)
    taps = captured(batch)
    taps.attention[3].value_BGSd[0, 1, 2, 0] = float("inf")
    assert stored().codec.encode(taps, places_P=positions_of(batch))["finite"].tolist() == [True, True, False, True]


def test_bf16_takes_half_the_bytes():
    assert stored("bf16").codec.position_bytes * 2 == stored("fp32").codec.position_bytes
    batch = batch_of([(Segment(0, 0, 4),)], positions=4)
    rows = stored("bf16").codec.encode(captured(batch), places_P=positions_of(batch))
    assert rows["tap.query.7"].dtype == torch.bfloat16 and rows["tap.query.7"].shape == (4, HEADS * HEAD_WIDTH)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (TapRequest(hidden=(2, 3)), r"^where: compares hidden states of the teacher's layers 2, 3; .* holds 2, 7\."),
        (TapRequest(attention=(2,)), r"^where: compares attention inputs of .* layers 2; the cache holds 3, 7\."),
    ],
)
def test_layers_that_are_asked_for_and_those_held_are_named(request_, message):
    stored().check(TapRequest(hidden=(2,), attention=(3, 7)), key="where")
    with pytest.raises(TeacherError, match=message):
        stored().check(request_, key="where")


def test_a_shard_has_both_kinds_of_rows(tmp_path):
    from test_cache_format import make_cache

    from largekd.runtime.files import write_json
    from largekd.runtime.ranks import Ranks
    from largekd.teachers.cache_format import MANIFEST_FILE, Manifest, shard_path, write_shard

    manifest, layers = make_cache(tmp_path), stored("bf16")
    path = shard_path(tmp_path, origin="train", number=1)
    rows = {name: torch.full((6, width), 2.0, dtype=dtype) for name, (dtype, width) in layers.codec.shapes.items()}
    rows["tap.hidden.7"][:, 0] = torch.arange(6)
    tokens = {"a": torch.zeros(3, 2, dtype=torch.int16), "b": torch.zeros(3, 2, dtype=torch.bfloat16)}
    record = write_shard(
        path,
        tensors=tokens | rows,
        offsets=np.array([0, 1, 1, 3]),
        rank=0,
        number=0,
        position_offsets=np.array([0, 2, 3, 6]),
    )
    assert (record.tokens, record.positions) == (3, 6)
    shards = {"train": (manifest.shards["train"][0], record)}
    whole = Manifest.of(manifest.identity, shards=shards, head=None, layers=layers)
    write_json(tmp_path / MANIFEST_FILE, value=whole.model_dump(mode="json"))
    found = read_manifest(tmp_path)
    assert found == whole
    reader = CacheReader(tmp_path, manifest=found)
    read = reader.rows([Segment(5, 0, 3), Segment(4, 0, 1)], origin="train", taps=names_of(TapRequest(hidden=(7,))))
    assert {name: len(tensor) for name, tensor in read.items()} == {"a": 2, "b": 2, "tap.hidden.7": 4}
    assert read["tap.hidden.7"][:, 0].tolist() == [3, 4, 5, 2]
    taps = reader.rows([Segment(3, 0, 2)], origin="train", records=False, taps=["tap.hidden.2"])
    assert {name: tuple(tensor.shape) for name, tensor in taps.items()} == {"tap.hidden.2": (2, WIDTH)}
    last = Manifest.of(manifest.identity, shards={"train": (record, record)}, head=None, layers=layers)
    for number in (0, 1):
        shard_path(tmp_path, origin="train", number=number).write_bytes(path.read_bytes())
    check_shards(tmp_path, manifest=last, origins=("train",), token_bytes=8, ranks=Ranks())
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(TeacherError, match=r"shard_00001.*damaged"):
        check_shards(tmp_path, manifest=last, origins=("train",), token_bytes=8, ranks=Ranks())
