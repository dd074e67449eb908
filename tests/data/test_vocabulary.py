"""Same ids must mean the same tokens; widths may differ."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from largekd.data.vocabulary import check_same_tokenizer, load_tokenizer
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
