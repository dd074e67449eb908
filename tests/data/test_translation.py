"""A batch's translation, derived again token by token."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from largekd.config.data import SourceConfig
from largekd.contracts import IGNORE_LABEL, Batch, Segment, counts_of
from largekd.data.collate import collate
from largekd.data.packing import one_per_row, pack
from largekd.data.samples import load_samples
from largekd.data.store import SampleStore

LENGTH = 56
TALKS = [
    ("hello there", "naïve café 1 2 3 🙂"),
    ("how are you?", "the lazy dog jumps"),
    ("fox", "over the quick brown fox, user"),
]


@pytest.fixture(params=["byte_level", "metaspace", "documents"])
def samples(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    other: PreTrainedTokenizerFast,
    metaspace: PreTrainedTokenizerFast,
) -> SampleStore:
    """Conversations (masked) with either teacher, or documents in pieces; weights 0 among them."""
    talks = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in TALKS
    ]
    if request.param == "documents":
        records = [{"text": " ".join([a, b] * 4), "w": 0.5} for a, b in TALKS]
    else:
        records = [{"messages": talk, "w": place} for place, talk in enumerate(talks)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    # The student with fewer merges has groups of several tokens, the other has groups of one.
    student, teacher = {
        "byte_level": (other, tokenizer),
        "metaspace": (tokenizer, metaspace),
        "documents": (other, metaspace),
    }[request.param]
    return load_samples(
        SourceConfig(path=str(path), weight_field="w"),
        tokenizer=student,
        sequence_length=LENGTH,
        vocab_size=400,
        teacher_tokenizer=teacher,
    ).samples


def batches(samples: SampleStore) -> list[Batch]:
    order = np.arange(len(samples))[::-1].astype(np.int64)
    packed = list(pack(samples.lengths, sequence_length=2 * LENGTH, order=order))
    padded = list(one_per_row(samples.lengths, order=np.roll(order, 1)))
    return [
        collate([*packed, ()], samples=samples, sequence_length=2 * LENGTH, packing=True),
        collate([(), *padded], samples=samples, sequence_length=2 * LENGTH, packing=False),
    ]


def test_the_teachers_rows_hold_the_same_samples(samples: SampleStore) -> None:
    for batch in batches(samples):
        assert batch.translation is not None
        teacher = batch.translation.teacher
        rows, width = teacher.input_ids_BS.shape
        used = [sum(segment.length for segment in row) for row in teacher.segments]
        assert width == max(8, -(-max(used) // 8) * 8)
        assert teacher.sample_ids == batch.sample_ids
        assert (teacher.labels_BS == IGNORE_LABEL).all()
        assert teacher.token_weight_BS.sum() == teacher.counted_T.numel() == 0
        assert teacher.attention_mask_BS is None
        for place in range(rows):
            ids, positions, numbers = [], [], []
            for number, (sample, offset, length) in enumerate(teacher.segments[place], start=1):
                assert offset == len(ids)
                assert length == samples.teacher_lengths[sample]
                ids += samples.teacher_ids(sample)[:-1].tolist()
                positions += range(length)
                numbers += [number] * length
            fill = width - len(ids)
            assert teacher.input_ids_BS[place].tolist()[: len(ids)] == ids
            assert teacher.position_ids_BS[place].tolist() == positions + list(range(fill))
            assert teacher.segment_BS[place].tolist() == numbers + [0] * fill


def test_segment_numbers_of_the_students_rows(samples: SampleStore) -> None:
    for batch in batches(samples):
        assert batch.segment_BS.dtype == torch.int32
        for place, row in enumerate(batch.segments):
            expected = [0] * batch.input_ids_BS.shape[1]
            for number, (_, offset, length) in enumerate(row, start=1):
                expected[offset : offset + length] = [number] * length
            assert batch.segment_BS[place].tolist() == expected


def test_groups_at_positions(samples: SampleStore) -> None:
    for batch in batches(samples):
        found = batch.translation
        teacher = found.teacher
        width, teacher_width = batch.input_ids_BS.shape[1], teacher.input_ids_BS.shape[1]
        expected = []
        student_group, teacher_group = torch.zeros_like(batch.input_ids_BS), torch.zeros_like(teacher.input_ids_BS)
        for place, (row, their_row) in enumerate(zip(batch.segments, teacher.segments, strict=True)):
            number = 0
            for own, their in zip(row, their_row, strict=True):
                for s0, s1, t0, t1 in samples.groups(own.sample_id).tolist():
                    if s1 > own.length or t1 > their.length:
                        continue
                    number += 1
                    student_group[place, own.offset + s0 : own.offset + s1] = number
                    teacher_group[place, their.offset + t0 : their.offset + t1] = number
                    at = (place * width + own.offset + s0, place * teacher_width + their.offset + t0)
                    expected.append((at[0], s1 - s0, at[1], t1 - t0))
        columns = (found.student_start_G, found.student_length_G, found.teacher_start_G, found.teacher_length_G)
        assert torch.stack(columns, dim=-1).tolist() == [list(group) for group in expected]
        assert torch.equal(found.student_group_BS, student_group)
        assert torch.equal(found.teacher_group_BS, teacher_group)
        assert counts_of([batch])[3] == len(expected) > 20


def naive_scored(batch: Batch, samples: SampleStore) -> list[dict[str, object]]:
    """Scored groups with everything that the record must give, found by walking over tokens."""
    width = batch.input_ids_BS.shape[1]
    teacher_width = batch.translation.teacher.input_ids_BS.shape[1]
    counted = batch.counted_T.tolist()
    scored = []
    for place, (row, their_row) in enumerate(zip(batch.segments, batch.translation.teacher.segments, strict=True)):
        for own, their in zip(row, their_row, strict=True):
            ids = samples.teacher_ids(own.sample_id).tolist()
            for s0, s1, t0, t1 in samples.groups(own.sample_id).tolist():
                labels = [place * width + own.offset + token - 1 for token in range(s0, s1)]
                if s0 > 0 and t0 > 0 and all(label in counted for label in labels):
                    rows = [place * teacher_width + their.offset + token - 1 for token in range(t0, t1)]
                    scored.append({"tokens": [counted.index(at) for at in labels], "rows": rows, "ids": ids[t0:t1]})
    return scored


def test_scored_groups_spans_and_signals(samples: SampleStore) -> None:
    for batch in batches(samples):
        found, expected = batch.translation, naive_scored(batch, samples)
        assert len(expected) > 10
        assert found.scored_first_L.tolist() == [group["tokens"][0] for group in expected]
        assert found.scored_length_L.tolist() == [len(group["tokens"]) for group in expected]
        assert found.scored_row_L.tolist() == [group["rows"][0] for group in expected]
        assert found.scored_teacher_length_L.tolist() == [len(group["rows"]) for group in expected]
        assert found.row_N.tolist() == [row for group in expected for row in group["rows"]]
        assert found.id_N.tolist() == [token for group in expected for token in group["ids"]]
        assert found.scored_N.tolist() == [place for place, group in enumerate(expected) for _ in group["rows"]]
        signal = [-1] * batch.counted_T.numel()
        for place, group in enumerate(expected):
            if len(group["tokens"]) == 1:
                signal[group["tokens"][0]] = place
        assert found.signal_T.tolist() == signal
        spans = [place for place, group in enumerate(expected) if len(group["tokens"]) > 1]
        assert spans
        assert found.span_G.tolist() == spans
        assert found.span_first_T.tolist() == [expected[place]["tokens"][0] for place in spans]
        assert found.span_of_U.tolist() == [x for x, place in enumerate(spans) for _ in expected[place]["tokens"]]
        assert found.span_token_U.tolist() == [token for place in spans for token in expected[place]["tokens"]]
        # What the lists above are for: the ids that follow in the teacher's rows, last tokens of samples left out.
        flat = found.teacher.input_ids_BS.flatten()
        last = {place for place, row in enumerate(found.row_N.tolist()) if row + 1 in ends_of(found.teacher)}
        assert all(
            flat[row + 1] == token
            for place, (row, token) in enumerate(zip(found.row_N.tolist(), found.id_N.tolist(), strict=True))
            if place not in last
        )


def ends_of(batch: Batch) -> set[int]:
    width = batch.input_ids_BS.shape[1]
    return {
        place * width + segment.offset + segment.length for place, row in enumerate(batch.segments) for segment in row
    }


def test_packing_and_padding_give_the_same_groups(samples: SampleStore) -> None:
    packed, padded = batches(samples)
    assert packed.sample_ids != padded.sample_ids
    assert sorted(packed.sample_ids) == sorted(padded.sample_ids)
    assert torch.equal(counts_of([packed]), counts_of([padded]))

    def spelled(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        labels = batch.labels_BS.flatten()[batch.counted_T]
        found = batch.translation
        return sorted(
            (
                tuple(labels[first : first + length].tolist()),
                tuple(found.id_N[found.scored_N == place].tolist()),
            )
            for place, (first, length) in enumerate(
                zip(found.scored_first_L.tolist(), found.scored_length_L.tolist(), strict=True)
            )
        )

    assert spelled(packed) == spelled(padded)


def test_a_sample_without_tokens_of_the_teacher_is_an_empty_segment(samples: SampleStore) -> None:
    empty = SampleStore.__new__(SampleStore)
    empty.__dict__.update(samples.__dict__)
    empty.__dict__["teacher_lengths"] = np.where(np.arange(len(samples)) == 0, 0, samples.teacher_lengths)
    originals = samples.teacher_ids, samples.groups
    empty.teacher_ids = lambda sample: originals[0](sample)[: len(originals[0](sample)) * (sample != 0)]
    empty.groups = lambda sample: originals[1](sample)[: len(originals[1](sample)) * (sample != 0)]
    row = (Segment(0, 0, int(samples.lengths[0])), Segment(1, int(samples.lengths[0]), int(samples.lengths[1])))
    batch = collate([row], samples=empty, sequence_length=2 * LENGTH, packing=True)
    teacher = batch.translation.teacher
    assert [segment.length for segment in teacher.segments[0]] == [0, int(samples.teacher_lengths[1])]
    assert set(teacher.segment_BS.flatten().tolist()) <= {0, 2}
    assert (batch.translation.student_start_G >= samples.lengths[0]).all()


def test_moving_a_batch_moves_its_translation(samples: SampleStore) -> None:
    moved = batches(samples)[0].to(device=torch.device("meta"))
    tensors = [value for value in vars(moved.translation).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.is_meta for tensor in [*tensors, moved.translation.teacher.input_ids_BS])


def test_samples_of_one_tokenizer_have_no_translation(make_store: object) -> None:
    store = make_store([5, 4])
    batch = collate(
        list(one_per_row(store.lengths, order=np.arange(2))), samples=store, sequence_length=8, packing=True
    )
    assert batch.translation is None
    assert not store.is_translated
    with pytest.raises(AssertionError, match="without a teacher's tokenizer"):
        store.groups(0)
