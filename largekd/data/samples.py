"""Records to samples: tokenization, splitting, truncation; cached on disk."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from largekd.config.data import SourceConfig
from largekd.data.quarantine import BadRecord, Quarantine, UnusableRecordError
from largekd.data.sources import Records, read_records
from largekd.data.store import SampleStore
from largekd.data.templates import ChatEncoder, load_template
from largekd.errors import DataError

# Part of the cache key: raise it when the same records and settings would give different samples.
TOKENIZATION_VERSION = 1
FEATURES = Features(
    {
        "ids": List(Value("int32")),
        "label_mask": List(Value("uint8")),
        "weight": Value("float32"),
        "record": Value("int64"),
        "digest": Value("int64"),
        "truncated": Value("bool"),
        "reason": Value("string"),
    }
)


@dataclass(frozen=True)
class LoadedSamples:
    """A source's samples, what was set aside, and how many conversations lost their end to `sequence_length`."""

    samples: SampleStore
    quarantine: Quarantine
    truncated: int


def load_samples(
    source: SourceConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    vocab_size: int,
    num_proc: int | None = None,
    first: Callable[[], AbstractContextManager[Any]] = nullcontext,
    key: str = "data.train",
) -> LoadedSamples:
    """Reads and tokenizes `source`; the result is cached by `datasets` and memory-mapped.

    Args:
        sequence_length: positions in a row; longer documents are split, longer conversations lose their end.
        vocab_size: ids from here on make a record unusable: the smaller width of teacher and student.
        num_proc: processes that tokenize; None: this one.
        first: makes a context in which one process of each host runs alone before the others enter, so that one
            tokenizes and the others find its cache. If the first fails, the others must be let in to fail alike.
        key: configuration key of this source, named in messages.

    Raises:
        DataError: as `read_records`; or unusable records beyond `source.max_bad_frac`.
    """
    with first():
        records = read_records(source, key=key)
        tokenize = _Tokenize(
            tokenizer=tokenizer,
            chat=_chat_encoder(source, tokenizer=tokenizer, key=key),
            sequence_length=sequence_length,
            vocab_size=vocab_size,
            no_template=f"the tokenizer has no chat template: set {key}.chat_template to a Jinja file",
        )
        dataset = _mapped(records.dataset, tokenize=tokenize, num_proc=num_proc)
    return _sort_out(dataset, records=records, max_bad_frac=source.max_bad_frac, key=key)


def _chat_encoder(source: SourceConfig, *, tokenizer: PreTrainedTokenizerBase, key: str) -> ChatEncoder | None:
    template = load_template(tokenizer, path=source.chat_template, key=key)
    return None if template is None else ChatEncoder(tokenizer=tokenizer, template=template, loss_on=source.loss_on)


def _mapped(records: Dataset, *, tokenize: "_Tokenize", num_proc: int | None) -> Dataset:
    # The library's own fingerprint hashes the pickled tokenizer, which changes after its first call.
    settings = f"{records._fingerprint} {tokenize.fingerprint}"
    return records.map(
        tokenize,
        batched=True,
        batch_size=256,
        with_indices=True,
        remove_columns=records.column_names,
        features=FEATURES,
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        new_fingerprint=hashlib.sha256(settings.encode()).hexdigest()[:32],
        desc="tokenize",
    )


def _sort_out(dataset: Dataset, *, records: Records, max_bad_frac: float, key: str) -> LoadedSamples:
    table = dataset.data.table
    usable = pc.equal(table.column("reason"), "").to_numpy()
    indices, reasons = table.column("record"), table.column("reason")
    bad = tuple(
        BadRecord(record=record, origin=records.origin(record), reason=reasons[place].as_py())
        for place in np.flatnonzero(~usable).tolist()
        for record in (indices[place].as_py(),)
    )
    quarantine = Quarantine(source=records.source, total=len(records), bad=bad)
    quarantine.enforce(max_bad_frac=max_bad_frac, key=key)
    return LoadedSamples(
        samples=SampleStore(dataset, kept=np.flatnonzero(usable)),
        quarantine=quarantine,
        truncated=int(pc.sum(table.column("truncated")).as_py() or 0),
    )


@dataclass(frozen=True)
class _Tokenize:
    """One batch of records to the rows of FEATURES: several for a long document, one with a reason for a bad record."""

    tokenizer: PreTrainedTokenizerBase
    chat: ChatEncoder | None
    sequence_length: int
    vocab_size: int
    no_template: str

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows: dict[str, list[Any]] = {name: [] for name in FEATURES}
        documents = self._encode_texts(batch.get("text"))
        for place, record in enumerate(indices):
            try:
                for row in self._samples(batch, place=place, text_ids=documents.get(place)):
                    _append(rows, record=record, **row)
            except UnusableRecordError as error:
                _append(rows, record=record, reason=str(error))
        return rows

    def _encode_texts(self, texts: list[Any] | None) -> dict[int, list[int]]:
        """Ids of each usable text, all tokenized in one call, which a fast tokenizer spreads over threads."""
        places = [place for place, text in enumerate(texts or ()) if isinstance(text, str) and text.strip()]
        if not places or texts is None:
            return {}
        encoded = self.tokenizer(
            [texts[place] for place in places], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return dict(zip(places, encoded["input_ids"], strict=True))

    def _samples(
        self, batch: dict[str, list[Any]], *, place: int, text_ids: list[int] | None
    ) -> Iterator[dict[str, Any]]:
        problem = batch["problem"][place] if "problem" in batch else ""
        if problem:
            raise UnusableRecordError(problem)
        messages = batch["messages"][place] if "messages" in batch else None
        if messages is not None:
            yield self._conversation(messages)
        elif text_ids is None:
            text = batch["text"][place] if "text" in batch else None
            raise UnusableRecordError("has empty text" if isinstance(text, str) else "has no text")
        else:
            yield from self._document(text_ids)

    def _document(self, text_ids: list[int]) -> Iterator[dict[str, Any]]:
        """Pieces that share one token, so that every token but the document's first is predicted exactly once."""
        prefix, suffix = self._affixes
        ids = np.array([*prefix, *text_ids, *suffix], np.int32)
        self._check_vocabulary(ids)
        for start in range(0, len(ids) - 1, self.sequence_length):
            yield {"ids": ids[start : start + self.sequence_length + 1]}

    def _conversation(self, messages: Any) -> dict[str, Any]:
        if self.chat is None:
            raise UnusableRecordError(self.no_template)
        if isinstance(messages, str):
            try:
                messages = json.loads(messages)
            except json.JSONDecodeError as error:
                raise UnusableRecordError(f"messages are not JSON: {error.msg} at column {error.colno}") from error
        ids, mask = self.chat.encode(messages)
        self._check_vocabulary(ids)
        limit = self.sequence_length + 1
        kept, learnt = ids[:limit], mask[:limit]
        if not learnt[1:].any():
            cut = f": the first answer starts beyond sequence_length = {self.sequence_length}" if mask.any() else ""
            raise UnusableRecordError(f"has no assistant token to learn{cut}")
        return {"ids": kept, "label_mask": learnt, "truncated": len(ids) > limit}

    def _check_vocabulary(self, ids: NDArray[np.int32]) -> None:
        if ids.size and int(ids.max()) >= self.vocab_size:
            raise UnusableRecordError(
                f"holds token id {int(ids.max())} ({self.tokenizer.convert_ids_to_tokens(int(ids.max()))!r}), beyond "
                f"the {self.vocab_size} ids that both models know"
            )

    @cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        return document_affixes(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which samples a record gives."""
        chat = (self.chat.template, self.chat.loss_on) if self.chat else None
        settings = (TOKENIZATION_VERSION, chat, self.sequence_length, self.vocab_size, self.no_template)
        return hashlib.sha256(f"{settings!r} {tokenizer_fingerprint(self.tokenizer)}".encode()).hexdigest()


def _append(
    rows: dict[str, list[Any]],
    *,
    record: int,
    ids: NDArray[np.int32] | None = None,
    label_mask: NDArray[np.uint8] | None = None,
    truncated: bool = False,
    reason: str = "",
) -> None:
    ids = np.zeros(0, np.int32) if ids is None else ids
    label_mask = np.zeros(0, np.uint8) if label_mask is None else label_mask
    digest = hashlib.blake2b(ids.tobytes() + b"|" + label_mask.tobytes(), digest_size=8).digest()
    row = {
        "ids": ids,
        "label_mask": label_mask,
        "weight": 1.0,
        "record": record,
        "digest": int.from_bytes(digest, "little", signed=True),
        "truncated": truncated,
        "reason": reason,
    }
    for name, value in row.items():
        rows[name].append(value)


def document_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids around a plain-text document: the begin token where this tokenizer adds one by itself, and the end token.

    Raises:
        DataError: the tokenizer names no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos_token, which ends a document: set it in tokenizer_config.json.")
    # Many tokenizers name a begin token that their models never saw (SmolLM2: <|im_start|>).
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if begins else [], [tokenizer.eos_token_id]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a text's ids; padding and truncation settings, which calls change, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        described.pop("padding", None)
        described.pop("truncation", None)
    else:
        described = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    described["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
