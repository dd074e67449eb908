"""Same ids must mean the same tokens; widths may differ."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from largekd.data.token_bytes import Surface
from largekd.data.vocabulary import (
    check_same_tokenizer,
    describe_mapping,
    end_token_of,
    load_tokenizer,
    shared_tokens,
)
from largekd.errors import DataError, TeacherError

Make = Callable[..., PreTrainedTokenizerFast]


def test_equal_tokenizers_with_unequal_widths_share_the_smaller(make_tokenizer: Make) -> None:
    one, other = make_tokenizer(), make_tokenizer()
    assert check_same_tokenizer(one, other, teacher_vocab_size=512, student_vocab_size=400) == 400
    assert check_same_tokenizer(one, one, teacher_vocab_size=384, student_vocab_size=400) == 384


def test_roles_and_one_sided_additions_may_differ(make_tokenizer: Make) -> None:
    one, other = make_tokenizer(), make_tokenizer(extra=("<think>",))
    other.eos_token = "<|endoftext|>"
    assert check_same_tokenizer(one, other, teacher_vocab_size=400, student_vocab_size=400) == 400


def test_different_tokens_are_named(make_tokenizer: Make) -> None:
    one, other = make_tokenizer(extra=("<a>",)), make_tokenizer(extra=("<b>",))
    place = len(one) - 1
    message = rf"student\.model differ: 1 ids .*id {place} is '<a>' to the teacher and '<b>' to the student"
    with pytest.raises(TeacherError, match=message):
        check_same_tokenizer(one, other, teacher_vocab_size=400, student_vocab_size=400)
    assert check_same_tokenizer(one, other, teacher_vocab_size=400, student_vocab_size=place) == place


def test_an_ordinary_token_that_one_side_lacks_is_a_difference(make_tokenizer: Make) -> None:
    one, other = make_tokenizer(), make_tokenizer(vocab_size=300)
    with pytest.raises(TeacherError, match=r"id 300 is '.*' to the teacher and no token to the student.*and \d+ more"):
        check_same_tokenizer(one, other, teacher_vocab_size=400, student_vocab_size=400)


def test_equal_vocabularies_that_split_differently_are_refused(make_tokenizer: Make) -> None:
    one, other = make_tokenizer(), make_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(TeacherError, match="split text differently: after 0 equal tokens the teacher has"):
        check_same_tokenizer(one, other, teacher_vocab_size=400, student_vocab_size=400)


def test_missing_tokenizers_name_key_and_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"teacher\.model = .*no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match=r"student\.model = .*/absent'"):
        load_tokenizer(str(tmp_path / "absent"), key="student.model")


def test_shared_tokens_spell_the_same(make_tokenizer: Make, metaspace: PreTrainedTokenizerFast) -> None:
    one, other = make_tokenizer(), make_tokenizer(vocab_size=290)
    for teacher, student in ((one, other), (other, one), (one, metaspace), (metaspace, one)):
        sides = Surface(teacher, key="k"), Surface(student, key="k")
        mapping = shared_tokens(
            teacher, student, teacher_vocab_size=len(teacher) + 8, student_vocab_size=len(student) + 8
        )
        assert len(mapping) == len(teacher) + 8
        found = [(place, int(own)) for place, own in enumerate(mapping) if own >= 0]
        assert len({own for _, own in found}) == len(found), "no id of the student's twice"
        ends = (teacher.eos_token_id, student.eos_token_id)
        assert ends in found
        for place, own in found:
            if (place, own) != ends:
                assert sides[0].pieces[place] == sides[1].pieces[own]
        missing = {sides[0].pieces[place] for place, own in enumerate(mapping[: len(teacher)]) if own < 0}
        special = {side.pieces[place] for side in sides for place in side.special}
        assert not (missing & set(sides[1].pieces)) - special - {bytes([byte]) for byte in range(128)}
    assert f"{len(found):,} tokens" in describe_mapping(mapping, student_vocab_size=len(one))


def test_every_shared_token_of_one_vocabulary_is_itself(make_tokenizer: Make) -> None:
    one = make_tokenizer(extra=("<think>",))
    mapping = shared_tokens(one, one, teacher_vocab_size=len(one), student_vocab_size=len(one))
    assert mapping.tolist() == list(range(len(one)))
    limited = shared_tokens(one, one, teacher_vocab_size=len(one), student_vocab_size=300)
    assert limited.max() == 299


def test_markers_are_not_their_characters_and_namesakes_win_over_ends(make_tokenizer: Make) -> None:
    teacher, student = make_tokenizer(), make_tokenizer(extra=("<think>",))
    teacher.add_special_tokens({"additional_special_tokens": ["<think>", " the"]})
    student.eos_token = "<|endoftext|>"
    mapping = shared_tokens(teacher, student, teacher_vocab_size=len(teacher), student_vocab_size=len(student))
    think = teacher.convert_tokens_to_ids("<think>")
    assert mapping[think] == student.convert_tokens_to_ids("<think>"), "added on one side, special on the other"
    assert mapping[teacher.convert_tokens_to_ids(" the")] == -1
    assert mapping[2] == 2, "<|im_end|> ends the teacher's documents, but the student knows it by name"
    assert end_token_of(teacher, student=student) == 0
    assert end_token_of(student, student=teacher) == 2
