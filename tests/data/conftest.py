"""Tiny tokenizers built in memory, and sample stores without files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from largekd.data.samples import FEATURES
from largekd.data.store import SampleStore

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "Be kind.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = [
    "the quick brown fox jumps over the lazy dog",
    "user assistant system hello there, how are you today?",
    "numbers 1 2 3 and a newline\n\nafter it, naïve café",
] * 4


def build_tokenizer(
    *, begins: bool = False, trim_offsets: bool = False, vocab_size: int = 400, extra: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose pad token is its end token; `begins`: it puts <|endoftext|> before a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    if extra:
        backend.add_tokens(list(extra))
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    elif trim_offsets:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>" if begins else "<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


def build_store(
    lengths: Sequence[int], *, seed: int = 0, vocab_size: int = 97, masked: bool = False, weights: Sequence[float] = ()
) -> SampleStore:
    """Random samples of `lengths` positions each; `masked`: about half of their tokens carry no loss."""
    rng = np.random.default_rng(seed)
    rows = {
        "ids": [rng.integers(0, vocab_size, length + 1).astype(np.int32) for length in lengths],
        "label_mask": [rng.integers(0, 2 if masked else 1, (length + 1) if masked else 0) for length in lengths],
        "weight": list(weights) or [1.0] * len(lengths),
        "record": list(range(len(lengths))),
        "digest": rng.integers(-(2**62), 2**62, len(lengths)).tolist(),
        "truncated": [False] * len(lengths),
        "reason": [""] * len(lengths),
    }
    return SampleStore(datasets.Dataset.from_dict(rows, features=FEATURES), kept=np.arange(len(lengths)))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def make_store() -> Callable[..., SampleStore]:
    return build_store


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test stores its data sets apart from the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def build_metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece makes them: ▁ for a space and before a text, and <0xNN> for bytes of unknown characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    described = json.loads(trained.to_str())["model"]
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *described["vocab"]]
    merges = [tuple(pair) for pair in described["merges"]]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHATML)


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    return build_metaspace_tokenizer()


@pytest.fixture(scope="session")
def other(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with fewer merges than `tokenizer`, which reports offsets without spaces."""
    return make_tokenizer(vocab_size=290, trim_offsets=True)
