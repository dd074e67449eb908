"""Rows to tensors: one shift, restarting positions, fill that never counts."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from largekd.contracts import IGNORE_LABEL, counts_of
from largekd.data.collate import collate
from largekd.data.packing import one_per_row, pack
from largekd.data.store import SampleStore

MakeStore = Callable[..., SampleStore]


def test_packed_rows_hold_inputs_labels_and_positions(make_store: MakeStore) -> None:
    rng = np.random.default_rng(0)
    for masked in (False, True):
        samples = make_store(rng.integers(1, 17, 50).tolist(), masked=masked)
        rows = pack(samples.lengths, sequence_length=16, order=rng.permutation(50))
        batch = collate(list(rows), samples=samples, sequence_length=16, packing=True)
        assert batch.attention_mask_BS is None
        assert batch.input_ids_BS.shape == (len(rows), 16)
        for place, row in enumerate(batch.segments):
            used = 0
            for sample, offset, length in row:
                ids, mask = samples.ids(sample), samples.label_mask(sample)
                used = offset + length
                assert batch.input_ids_BS[place, offset:used].tolist() == ids[:-1].tolist()
                expected = [
                    int(token) if mask is None or mask[i] else IGNORE_LABEL for i, token in enumerate(ids) if i > 0
                ]
                assert batch.labels_BS[place, offset:used].tolist() == expected
                assert batch.position_ids_BS[place, offset:used].tolist() == list(range(length))
            assert batch.position_ids_BS[place, used:].tolist() == list(range(16 - used))
            assert (batch.labels_BS[place, used:] == IGNORE_LABEL).all()


def test_weights_and_counted_positions(make_store: MakeStore) -> None:
    samples = make_store([4, 5, 6], masked=True, weights=[0.5, 0.0, 2.0])
    rows = list(pack(samples.lengths, sequence_length=16, order=np.arange(3)))
    batch = collate([*rows, ()], samples=samples, sequence_length=16, packing=True)
    learnt = [int(samples.label_mask(i)[1:].sum()) for i in range(3)]
    assert batch.token_weight_BS.dtype == torch.float32
    assert len(batch.counted_T) == learnt[0] + learnt[2]
    assert (batch.labels_BS.flatten()[batch.counted_T] != IGNORE_LABEL).all()
    assert float(counts_of([batch])[0]) == 0.5 * learnt[0] + 2.0 * learnt[2]
    assert batch.token_weight_BS[batch.labels_BS == IGNORE_LABEL].sum() == 0
    assert batch.sample_ids == tuple(segment.sample_id for row in rows for segment in row)


def test_padded_rows_are_as_wide_as_needed(make_store: MakeStore) -> None:
    samples = make_store([3, 9, 19, 20])
    rows = one_per_row(samples.lengths, order=np.arange(4))
    for chosen, width in (([0], 8), ([0, 1], 16), ([2], 20), ([], 8)):
        batch = collate([*(rows[i] for i in chosen), ()], samples=samples, sequence_length=20, packing=False)
        assert batch.input_ids_BS.shape == (len(chosen) + 1, width)
        assert batch.position_ids_BS is None
        lengths = batch.attention_mask_BS.sum(-1).tolist()
        assert lengths == [int(samples.lengths[i]) for i in chosen] + [width], "a filler row's mask is all ones"
        assert len(batch.counted_T) == sum(int(samples.lengths[i]) for i in chosen)


def test_end_tokens_inside_a_sample_count_although_they_may_be_the_pad_token(make_store: MakeStore) -> None:
    samples = make_store([7], vocab_size=1)
    batch = collate(
        [one_per_row(samples.lengths, order=np.arange(1))[0]], samples=samples, sequence_length=8, packing=False
    )
    assert (batch.input_ids_BS == 0).all()
    assert len(batch.counted_T) == 7
    assert batch.attention_mask_BS.tolist() == [[1] * 7 + [0]]


def test_logits_of_a_sample_are_the_same_alone_packed_and_padded(make_store: MakeStore) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    # Lengths that leave a tail, fill a row exactly, and put a single position next to others.
    samples = make_store([24, 11, 9, 5, 1, 1, 23, 7])
    packed = pack(samples.lengths, sequence_length=24, order=np.arange(8))
    assert any(len(row) > 1 for row in packed)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor(samples.ids(i)[:-1].astype(np.int64))[None]).logits[0] for i in range(8)]
        for rows, packing in ((list(packed), True), (list(one_per_row(samples.lengths, order=np.arange(8))), False)):
            batch = collate([*rows, ()], samples=samples, sequence_length=24, packing=packing)
            # A cache would make transformers overlook the packing.
            logits = model(**batch.model_inputs, use_cache=False).logits
            assert torch.isfinite(logits).all()
            for place, row in enumerate(rows):
                for sample, offset, length in row:
                    difference = (logits[place, offset : offset + length] - alone[sample]).abs().max()
                    assert difference < 1e-5, (packing, sample)
