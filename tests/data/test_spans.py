"""Groups of two tokenizations spell the same, are minimal, and survive what tokenizers do to offsets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from largekd.config.data import SourceConfig
from largekd.data.samples import load_samples
from largekd.data.spans import Alignment, Tokens, align, alignment_report
from largekd.data.token_bytes import UNSPELLED, Surface
from largekd.data.translator import Translator
from largekd.errors import DataError

Make = Callable[..., PreTrainedTokenizerFast]
TEXTS = (
    "the quick brown fox",
    "  two spaces,   three\n\n  and a line ",
    "naïve café e\u0301 x",
    "🙂🙂 flags 🇩🇪 and family 👨‍👩‍👧 世界 мир",
    "def f(x):\n    return {'a': [x, 1_000]}  # don't\n\t\treturn",
    "a",
    " ",
    "<|im_start|>user\nhello<|im_end|>\n",
    "\u00a0odd\u2003spaces\u200b",
)


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> Tokens:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Tokens(
        surface=Surface(tokenizer, key="k"),
        ids=np.array(encoded["input_ids"], np.int32),
        offsets=np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2),
    )


def aligned(text: str, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> Alignment:
    return align(text=text, student=tokens_of(student, text), teacher=tokens_of(teacher, text))


def character_ends(tokenizer: PreTrainedTokenizerFast, text: str) -> set[int]:
    """Reference: numbers of leading tokens that spell a prefix of the text, by trying each, as the prefix's bytes."""
    side = tokens_of(tokenizer, text)
    prefixes = {text[:end].encode() for end in range(1, len(text) + 1)}
    spelled = [side.surface.spell(side.ids[: count + 1]) for count in range(len(side.ids))]
    return {len(prefix) for prefix in spelled if prefix in prefixes}


@pytest.mark.parametrize("text", TEXTS)
def test_groups_spell_the_same_and_are_as_small_as_possible(
    text: str, tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    for student, teacher in ((tokenizer, other), (other, tokenizer), (tokenizer, tokenizer)):
        found = aligned(text, student, teacher)
        own, their = tokens_of(student, text), tokens_of(teacher, text)
        ends = []
        for (s0, s1, t0, t1), equal in zip(found.spans_N4.tolist(), found.equal_N.tolist(), strict=True):
            piece = own.surface.spell(own.ids[s0:s1])
            assert piece == their.surface.spell(their.ids[t0:t1])
            assert equal
            ends.append((ends[-1] if ends else 0) + len(piece))
        assert set(ends) == character_ends(student, text) & character_ends(teacher, text)
        assert ends[-1] == len(text.encode())
        if student is teacher:
            assert own.surface.spell(own.ids) == text.encode()


def test_a_character_of_several_tokens_is_one_group(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    found = aligned("🙂a", tokenizer, other)
    assert found.spans_N4.tolist() == [[0, 4, 0, 4], [4, 5, 4, 5]]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_spaces_and_byte_tokens(
    text: str, tokenizer: PreTrainedTokenizerFast, metaspace: PreTrainedTokenizerFast
) -> None:
    for student, teacher in ((tokenizer, metaspace), (metaspace, tokenizer)):
        found = aligned(text, student, teacher)
        own, their = tokens_of(student, text), tokens_of(teacher, text)
        groups = found.spans_N4[found.equal_N].tolist()
        assert groups
        for s0, s1, t0, t1 in groups:
            pieces = own.surface.spell(own.ids[s0:s1]), their.surface.spell(their.ids[t0:t1])
            assert pieces[0] == pieces[1] or (s0 == t0 == 0 and pieces[0].strip() == pieces[1].strip())
        if "<|" not in text:
            assert found.equal_N.all(), "everything but markers that one side does not know is aligned"
            assert found.spans_N4[-1].tolist()[1::2] == [len(own.ids), len(their.ids)]


def test_a_marker_that_one_side_spells_out_stays_alone(
    tokenizer: PreTrainedTokenizerFast, metaspace: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    text = "<|im_start|>user\nhello<|im_end|>\n"
    found = aligned(text, tokenizer, metaspace)
    ids = tokens_of(tokenizer, text).ids.tolist()
    grouped = {place for s0, s1, *_ in found.spans_N4[found.equal_N].tolist() for place in range(s0, s1)}
    special = {place for place, token in enumerate(ids) if token in (1, 2)}
    assert len(special) == 2
    assert grouped == set(range(len(ids))) - special
    both = aligned(text, tokenizer, other)
    assert both.equal_N.all()
    assert [0, 1, 0, 1] in both.spans_N4.tolist(), "one that both know is a group"


def test_text_that_a_normalizer_changed_is_left_out(make_tokenizer: Make) -> None:
    student, teacher = make_tokenizer(), make_tokenizer()
    teacher.backend_tokenizer.normalizer = normalizers.Lowercase()
    text = "the Quick brown FOX, hello"
    found = aligned(text, student, teacher)
    own, their = tokens_of(student, text), tokens_of(teacher, text)
    pieces = []
    for s0, s1, t0, t1 in found.spans_N4[found.equal_N].tolist():
        pieces.append(own.surface.spell(own.ids[s0:s1]))
        assert pieces[-1] == their.surface.spell(their.ids[t0:t1])
    joined = b"|".join(pieces)
    assert b"the" in joined
    assert b" brown" in joined
    assert b" hello" in joined
    assert not any(letter in joined for letter in b"QFOX")


def test_composed_accents_are_not_taken_for_decomposed_ones(make_tokenizer: Make) -> None:
    student, teacher = make_tokenizer(), make_tokenizer()
    teacher.backend_tokenizer.normalizer = normalizers.NFC()
    text = "one e\u0301 two cafe\u0301 the dog"
    found = aligned(text, student, teacher)
    own, their = tokens_of(student, text), tokens_of(teacher, text)
    assert not found.equal_N.all()
    for s0, s1, t0, t1 in found.spans_N4[found.equal_N].tolist():
        assert own.surface.spell(own.ids[s0:s1]) == their.surface.spell(their.ids[t0:t1])
    assert found.equal_N[-1], "behind the changed text both are in step again"


def test_reported_offsets_find_the_same_groups_as_bytes(
    tokenizer: PreTrainedTokenizerFast, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path for changed texts, on texts that are not changed."""
    teacher = make_tokenizer(vocab_size=290)
    expected = [aligned(text, tokenizer, teacher).spans_N4.tolist() for text in TEXTS]
    monkeypatch.setattr("largekd.data.spans.ADDED_SPACE", b"\xff")
    original = Surface.spell

    def misspelt(self: Surface, ids: np.ndarray) -> bytes:
        return original(self, ids) + b"?"

    monkeypatch.setattr(Surface, "spell", misspelt)
    found = [aligned(text, tokenizer, teacher) for text in TEXTS]
    assert [one.spans_N4.tolist() for one in found] == expected
    assert not any(one.equal_N.any() for one in found), "a text that is not spelled is not believed"


def test_pieces_keep_the_tokens_around_their_groups() -> None:
    spans = np.array([[0, 1, 0, 2], [1, 3, 2, 3], [3, 4, 3, 4], [4, 5, 4, 6], [5, 8, 6, 7]])
    whole = Alignment(
        teacher_ids=np.arange(10, 17, dtype=np.int32),
        spans_N4=spans,
        equal_N=np.array([True, True, False, True, True]),
    )
    inside = whole.piece(start=1, stop=5)
    assert inside.teacher_ids.tolist() == [12, 13, 14, 15]
    assert inside.groups.tolist() == [[0, 2, 0, 1], [3, 4, 2, 4]]
    across = whole.piece(start=2, stop=7)
    assert across.teacher_ids.tolist() == [12, 13, 14, 15, 16], "tokens that cross the border are kept"
    assert across.groups.tolist() == [[2, 3, 2, 4]]
    assert whole.piece(start=0, stop=8).teacher_ids.tolist() == whole.teacher_ids.tolist()


def test_affixes_belong_together_where_both_sides_have_them() -> None:
    whole = Alignment(teacher_ids=np.array([5], np.int32), spans_N4=np.array([[0, 2, 0, 1]]), equal_N=np.array([True]))
    both = whole.with_affixes(student=(1, 1), teacher=([8], [9]))
    assert both.teacher_ids.tolist() == [8, 5, 9]
    assert both.spans_N4.tolist() == [[0, 1, 0, 1], [1, 3, 1, 2], [3, 4, 2, 3]]
    assert both.equal_N.tolist() == [True, True, True]
    one = whole.with_affixes(student=(0, 1), teacher=([8], [9]))
    assert one.equal_N.tolist() == [False, True, True]
    assert one.piece(start=0, stop=3).teacher_ids.tolist() == [8, 5, 9]
    assert one.piece(start=0, stop=3).groups.tolist() == [[0, 2, 1, 2], [2, 3, 2, 3]]


def test_bytes_of_tokens(tokenizer: PreTrainedTokenizerFast, metaspace: PreTrainedTokenizerFast) -> None:
    for side, text in ((tokenizer, "naïve\n\t🙂 <|im_end|>"), (metaspace, " naïve 🙂 <s>")):
        tokens = tokens_of(side, text)
        assert tokens.surface.spell(tokens.ids).strip() == text.strip().encode()
    surface = Surface(tokenizer, key="k")
    assert sorted(len(piece) for piece in surface.pieces if len(piece) == 1) == [1] * 256, "every byte has a token"
    assert UNSPELLED not in surface.pieces
    assert surface.lengths.sum() == sum(map(len, surface.pieces))


def test_slow_tokenizers_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    for pair in ({"student": tokenizer, "teacher": Slow()}, {"student": Slow(), "teacher": tokenizer}):
        with pytest.raises(DataError, match=r"(student|teacher)\.model: its tokenizer \(Slow\) reports no character"):
            Translator(**pair)


@pytest.mark.parametrize("sequence_length", [3, 8, 1000])
def test_documents_in_pieces(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    other: PreTrainedTokenizerFast,
    metaspace: PreTrainedTokenizerFast,
    sequence_length: int,
) -> None:
    path = tmp_path / "a.txt"
    text = "the quick 🙂 brown fox naïve café jumps over\n\n the lazy dog" * 3
    path.write_text(text, encoding="utf-8")
    for teacher in (other, metaspace):
        samples = load_samples(
            SourceConfig(path=str(path)),
            tokenizer=tokenizer,
            sequence_length=sequence_length,
            vocab_size=400,
            teacher_tokenizer=teacher,
        ).samples
        own, their = Surface(tokenizer, key="k"), Surface(teacher, key="k")
        shown = []
        for sample in range(len(samples)):
            ids, theirs = samples.ids(sample), samples.teacher_ids(sample)
            assert samples.teacher_lengths[sample] == max(0, len(theirs) - 1)
            edge = [0, 0]
            for s0, s1, t0, t1 in samples.groups(sample).tolist():
                assert edge[0] <= s0 < s1 <= len(ids)
                assert edge[1] <= t0 < t1 <= len(theirs)
                edge = [s1, t1]
                pieces = own.spell(ids[s0:s1]), their.spell(theirs[t0:t1])
                last = sample == len(samples) - 1 and s1 == len(ids)
                first = sample == 0 and s0 == 0
                assert pieces[0] == pieces[1] or last or (first and pieces[1] == b" " + pieces[0])
                shown.append(pieces[0])
        if sequence_length == 1000:
            assert b"".join(shown) == text.encode() + b"<|im_end|>"
            assert samples.teacher_ids(0)[0] == (0 if teacher is metaspace else samples.teacher_ids(0)[0])
            assert samples.teacher_ids(0)[-1] == teacher.eos_token_id
            assert alignment_report(samples, tokenizer=tokenizer).aligned_frac == 1.0
        else:
            report = alignment_report(samples, tokenizer=tokenizer)
            assert 0.3 < report.single_frac <= report.aligned_frac < 1


def test_the_teachers_tokenizer_is_a_part_of_the_cache_key(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, make_tokenizer: Make
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox", encoding="utf-8")

    def load(**changes: object) -> str:
        loaded = load_samples(
            SourceConfig(path=str(path)), tokenizer=tokenizer, sequence_length=16, vocab_size=400, **changes
        )
        return loaded.samples.fingerprint

    fingerprints = [load(), load(teacher_tokenizer=other), load(teacher_tokenizer=make_tokenizer(vocab_size=260))]
    assert len(set(fingerprints)) == 3
    assert load(teacher_tokenizer=other) == fingerprints[1]
    with pytest.raises(DataError, match=r"holds token id \d+ .* of the teacher's tokenizer, beyond the 20 ids"):
        load(teacher_tokenizer=other, teacher_vocab_size=20)
