"""A trimmed byte-pair tokenizer spells every text, and splits a text whose tokens are all kept as before."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_tiny_model import Shape, make_model, make_text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from largekd.data.trimming import (
    MergeTable,
    Trim,
    check_trimmed,
    choose_tokens,
    count_tokens,
    description_of,
    rename_ids,
    save_trimmed,
)
from largekd.data.vocabulary import shared_tokens
from largekd.errors import DataError

ODD = "naïve 世界 🙂\tdef f(x):\n  return 12345 + x  # Привет"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [record["text"] for record in make_text(samples=60, seed=3)]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("byte_level") / "model"
    make_model(folder, shape=Shape(vocab=460, layers=1), seed=0)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """A tokenizer of the SentencePiece kind: ▁ for spaces, <0xNN> for unknown characters, a begin token."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *alphabet], show_progress=False)
    lines = [record["text"] for record in make_text(samples=500, seed=0)]
    backend.train_from_iterator([*lines, "caféxyz世"], trainer=trainer)
    described = description_of(PreTrainedTokenizerFast(tokenizer_object=backend))
    # Bytes are tokens of the model, not added ones.
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(described))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def trimmed_of(tokenizer: Any, folder: Path, *, texts: list[str], **options: Any) -> tuple[Any, Trim]:
    counts = count_tokens(tokenizer(texts, add_special_tokens=False)["input_ids"])
    trim = choose_tokens(description_of(tokenizer), counts=counts, always=tokenizer.all_special_ids, **options)
    return save_trimmed(tokenizer, folder=folder, trim=trim), trim


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_covered_text_is_split_as_before(
    kind: str, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    trimmed, trim = trimmed_of(tokenizer, tmp_path, texts=texts[:5], coverage=1.0)
    assert len(trimmed) == len(trim.kept_V) < len(tokenizer)
    assert trim.coverage == 1.0
    old, new = tokenizer(texts[:5])["input_ids"], trimmed(texts[:5])["input_ids"]
    assert [trim.kept_V[ids].tolist() for ids in new] == old
    assert trimmed.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_every_text_is_spelled_by_the_smallest_vocabulary(
    kind: str, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    trimmed, trim = trimmed_of(tokenizer, tmp_path, texts=texts, coverage=0.01)
    assert check_trimmed(tokenizer, trimmed, trim=trim, texts=[*texts, ODD]) < len(texts)
    assert trimmed.decode(trimmed(ODD, add_special_tokens=False)["input_ids"]) == ODD


def test_any_subset_of_text_with_kept_tokens_is_split_as_before(
    byte_level: Any, texts: list[str], tmp_path: Path
) -> None:
    draw = random.Random(0)
    words = sorted({word for text in texts for word in text.split()})
    trimmed, trim = trimmed_of(byte_level, tmp_path, texts=texts[:2], keep=330)
    drawn = [" ".join(draw.choices(words, k=3)) for _ in range(300)]
    kept = check_trimmed(byte_level, trimmed, trim=trim, texts=drawn)
    assert 0 < kept < len(drawn)


def test_kept_tokens_are_closed_under_their_merges(byte_level: Any, texts: list[str]) -> None:
    described = description_of(byte_level)
    table = MergeTable(described)
    counts = count_tokens(byte_level(texts)["input_ids"])
    trim = choose_tokens(described, counts=counts, keep=340)
    kept = set(trim.kept_V.tolist())
    assert len(kept) == 340
    assert {token["id"] for token in described["added_tokens"]} | table.base() <= kept
    token_of = {place: token for token, place in table.vocabulary.items()}
    for place in kept & token_of.keys():
        assert table.parts(token_of[place]) <= kept


def test_the_most_frequent_tokens_are_kept(byte_level: Any, texts: list[str]) -> None:
    described = description_of(byte_level)
    table, counts = MergeTable(described), count_tokens(byte_level(texts)["input_ids"])
    kept = set(choose_tokens(described, counts=counts, coverage=0.9).kept_V.tolist())
    token_of = {place: token for token, place in table.vocabulary.items()}
    # But for what other kept tokens are made of.
    ends = kept - {part for other in kept for part in table.parts(token_of[other]) if part != other}
    rarest = min(counts.get(place, 0) for place in ends - table.base() - {0, 1, 2})
    assert rarest >= max(counts.get(place, 0) for place in set(token_of) - kept) > 0


def test_coverage_is_filled_up_to_a_multiple(byte_level: Any, texts: list[str]) -> None:
    described = description_of(byte_level)
    counts = count_tokens(byte_level(texts)["input_ids"])
    tight = choose_tokens(described, counts=counts, coverage=0.8)
    filled = choose_tokens(described, counts=counts, coverage=0.8, multiple=32)
    assert 0.8 <= tight.coverage <= filled.coverage < 1
    assert len(filled.kept_V) == -(-len(tight.kept_V) // 32) * 32
    assert set(tight.kept_V) <= set(filled.kept_V)


def test_the_chat_template_writes_the_same_text(byte_level: Any, texts: list[str], tmp_path: Path) -> None:
    trimmed, trim = trimmed_of(byte_level, tmp_path, texts=texts, coverage=0.5)
    chat = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    written = [side.apply_chat_template(chat, tokenize=False) for side in (byte_level, trimmed)]
    assert written[0] == written[1]
    ids = trimmed(written[1])["input_ids"]
    assert trimmed.decode(ids) == written[0]
    stop = trimmed.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(stop) == 2
    assert trim.kept_V[stop] == byte_level.convert_tokens_to_ids("<|im_end|>")


def test_translation_finds_every_kept_token(byte_level: Any, texts: list[str], tmp_path: Path) -> None:
    trimmed, trim = trimmed_of(byte_level, tmp_path, texts=texts, coverage=0.9)
    mapping = shared_tokens(byte_level, trimmed, teacher_vocab_size=len(byte_level), student_vocab_size=len(trimmed))
    assert mapping[trim.kept_V].tolist() == list(range(len(trim.kept_V)))
    assert int((mapping >= 0).sum()) == len(trim.kept_V)


def test_ids_in_configurations_are_renamed_at_any_depth() -> None:
    config = {
        "eos_token_id": [5, 9],
        "pad_token_id": 7,
        "bos_token_id": None,
        "inner": {"image_token_id": 9, "hidden_size": 5, "suppress_tokens": [5, 6]},
        "many": [{"unk_token_id": 5}],
        "use_token_id": True,
    }
    assert rename_ids(config, new_id={5: 1, 9: 2}) == {
        "eos_token_id": [1, 2],
        "pad_token_id": None,
        "bos_token_id": None,
        "inner": {"image_token_id": 2, "hidden_size": 5, "suppress_tokens": [1]},
        "many": [{"unk_token_id": 1}],
        "use_token_id": True,
    }


def test_what_cannot_be_trimmed_is_refused(byte_level: Any) -> None:
    described = description_of(byte_level)
    with pytest.raises(DataError, match="keep = 100: bytes, added and special tokens alone are 259"):
        choose_tokens(described, counts={}, keep=100)
    with pytest.raises(DataError, match="coverage = 0"):
        choose_tokens(described, counts={}, coverage=0.0)
    with pytest.raises(DataError, match="either the number"):
        choose_tokens(described, counts={})
    with pytest.raises(DataError, match="'WordPiece'; only BPE"):
        MergeTable({"model": {"type": "WordPiece"}})
    with pytest.raises(DataError, match="end_of_word_suffix = '</w>'"):
        MergeTable({"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {}, "merges": []}})


def test_a_tokenizer_that_splits_otherwise_is_found_out(byte_level: Any, texts: list[str], tmp_path: Path) -> None:
    whole = Trim(kept_V=np.arange(len(byte_level)), coverage=1.0)
    assert check_trimmed(byte_level, byte_level, trim=whole, texts=texts) == len(texts)
    other = AutoTokenizer.from_pretrained(byte_level.name_or_path)
    described = description_of(other)
    described["model"]["merges"] = described["model"]["merges"][:-40]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)))
    with pytest.raises(DataError, match=r"splits .* otherwise"):
        check_trimmed(byte_level, other, trim=whole, texts=texts)
