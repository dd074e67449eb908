"""Records to samples: tokenization, splitting, truncation; cached on disk."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
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
from largekd.data.named_parts import NamedPart
from largekd.data.quarantine import BadRecord, Quarantine, UnusableRecordError
from largekd.data.sources import Records, read_records, unknown_parts
from largekd.data.spans import Alignment
from largekd.data.store import SampleStore
from largekd.data.templates import ChatEncoder, Conversation, load_template
from largekd.data.token_weights import TokenWeights
from largekd.data.translator import Translator
from largekd.data.vocabulary import document_affixes, tokenizer_fingerprint

logger = logging.getLogger(__name__)

# Part of the cache key: raise it when the same records and settings would give different samples.
TOKENIZATION_VERSION = 3
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
# Columns that exist only where they are asked for; groups are (student from, to, teacher from, to), flat.
TRANSLATED = {"teacher_ids": List(Value("int32")), "groups": List(Value("int32"))}
WEIGHTED = {"token_weights": List(Value("float32"))}
ROUTED = {"teacher": Value("int16")}
OPTIONAL = {**TRANSLATED, **WEIGHTED}


@dataclass(frozen=True)
class Routing:
    """Records name one of several teachers: the column that does it, and the names by their places."""

    field: str
    names: tuple[str, ...]

    def place(self, name: str | None) -> int:
        """The named teacher's place; −1 for no name. Raises UnusableRecordError for a name that is none of them."""
        if name is None:
            return -1
        if name not in self.names:
            known = ", ".join(map(repr, self.names))
            raise UnusableRecordError(f"column {self.field!r} holds {name!r}; the teachers are {known}")
        return self.names.index(name)


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
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_vocab_size: int | None = None,
    routing: Routing | None = None,
) -> LoadedSamples:
    """Reads and tokenizes `source`; the result is cached by `datasets` and memory-mapped.

    Args:
        sequence_length: positions in a row; longer documents are split, longer conversations lose their end.
        vocab_size: ids from here on make a record unusable: the smaller width of teacher and student.
        num_proc: processes that tokenize; None: this one.
        first: makes a context in which one process of each host runs alone before the others enter, so that one
            tokenizes and the others find its cache. If the first fails, the others must be let in to fail alike.
        key: configuration key of this source, named in messages.
        teacher_tokenizer: where it differs from `tokenizer`: samples then also hold the teacher's tokens of the same
            text, and the groups of tokens that spell the same bytes. What the student's tokens are cut to decides.
        teacher_vocab_size: ids of the teacher from here on make a record unusable; None: all can be used.
        routing: samples also hold the place of the teacher that their record names.

    Raises:
        DataError: as `read_records`; unusable records beyond `source.max_bad_frac`; a slow tokenizer where texts are
            translated or their parts weighted.
    """
    translator = None
    if teacher_tokenizer is not None:
        translator = Translator(student=tokenizer, teacher=teacher_tokenizer, teacher_vocab_size=teacher_vocab_size)
    weights = None
    if source.span_weights or source.named_span_weights:
        weights = TokenWeights(tokenizer, entries=source.span_weights, named=source.named_span_weights, key=key)
    with first():
        records = read_records(source, key=key, teacher_field=None if routing is None else routing.field)
        for name in unknown_parts(records.dataset, names=source.named_span_weights):
            logger.warning("%s.named_span_weights.%s: no record of %s has a part of that name", key, name, source.path)
        tokenize = _Tokenize(
            tokenizer=tokenizer,
            chat=_chat_encoder(source, tokenizer=tokenizer, key=key),
            sequence_length=sequence_length,
            vocab_size=vocab_size,
            weight_field=source.weight_field,
            translator=translator,
            token_weights=weights,
            routing=routing,
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
        features=tokenize.features,
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
    weight_field: str | None = None
    translator: Translator | None = None
    token_weights: TokenWeights | None = None
    routing: Routing | None = None

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows: dict[str, list[Any]] = {name: [] for name in self.features}
        documents = self._encode_texts(batch.get("text"))
        for place, record in enumerate(indices):
            try:
                if "problem" in batch and batch["problem"][place]:
                    raise UnusableRecordError(batch["problem"][place])
                weight = self._weight(batch, place=place)
                names = batch.get("teacher") if self.routing else None
                teacher = -1 if self.routing is None or names is None else self.routing.place(names[place])
                for row in self._samples(batch, place=place, document=documents.get(place)):
                    _append(rows, record=record, weight=weight, teacher=teacher, **row)
            except UnusableRecordError as error:
                _append(rows, record=record, reason=str(error))
        return rows

    @property
    def features(self) -> Features:
        """The columns of the rows: those of FEATURES and what this source's settings add."""
        extra = {**(TRANSLATED if self.translator else {}), **(WEIGHTED if self.token_weights else {})}
        extra |= ROUTED if self.routing else {}
        return Features({**FEATURES, **extra}) if extra else FEATURES

    def _encode_texts(self, texts: list[Any] | None) -> dict[int, "_Document"]:
        """Ids of each usable text, all tokenized in one call, which a fast tokenizer spreads over threads."""
        places = [place for place, text in enumerate(texts or ()) if isinstance(text, str) and text.strip()]
        if not places or texts is None:
            return {}
        chosen = [texts[place] for place in places]
        encoded = self.tokenizer(
            chosen,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=self.translator is not None,
            verbose=False,
        )
        ids = encoded["input_ids"]
        if self.translator is None:
            return {place: _Document(ids=own) for place, own in zip(places, ids, strict=True)}
        aligned = self.translator.align(chosen, ids=ids, offsets=encoded["offset_mapping"])
        pairs = zip(ids, aligned, strict=True)
        return {place: _Document(*pair) for place, pair in zip(places, pairs, strict=True)}

    def _weight(self, batch: dict[str, list[Any]], *, place: int) -> float:
        if self.weight_field is None:
            return 1.0
        value = batch["weight"][place]
        if value is None or not 0 <= value < float("inf"):
            found = "nothing" if value is None else str(value)
            raise UnusableRecordError(f"column {self.weight_field!r} holds {found}, expected a number of at least 0")
        return float(value)

    def _samples(
        self, batch: dict[str, list[Any]], *, place: int, document: "_Document | None"
    ) -> Iterator[dict[str, Any]]:
        messages = batch["messages"][place] if "messages" in batch else None
        if messages is not None:
            spans = batch["spans"][place] if "spans" in batch else None
            yield self._conversation(messages, spans=spans)
        elif document is None:
            text = batch["text"][place] if "text" in batch else None
            raise UnusableRecordError("has empty text" if isinstance(text, str) else "has no text")
        else:
            yield from self._pieces(document)

    def _pieces(self, document: "_Document") -> Iterator[dict[str, Any]]:
        """Pieces that share one token, so that every token but the document's first is predicted exactly once."""
        prefix, suffix = self._affixes
        ids = np.array([*prefix, *document.ids, *suffix], np.int32)
        self._check_vocabulary(ids)
        aligned = None
        if self.translator is not None and document.aligned is not None:
            aligned = self.translator.document(document.aligned, student=(len(prefix), len(suffix)))
            self.translator.check_vocabulary(aligned)
        for start in range(0, len(ids) - 1, self.sequence_length):
            stop = min(start + self.sequence_length + 1, len(ids))
            yield {"ids": ids[start:stop], **_translated(aligned, start=start, stop=stop)}

    def _conversation(self, messages: Any, *, spans: Any = None) -> dict[str, Any]:
        if self.chat is None:
            raise UnusableRecordError(self.no_template)
        if isinstance(messages, str):
            try:
                messages = json.loads(messages)
            except json.JSONDecodeError as error:
                raise UnusableRecordError(f"messages are not JSON: {error.msg} at column {error.colno}") from error
        talk = self.chat.read(messages, locate=self.token_weights is not None)
        ids, mask = talk.ids, talk.mask
        self._check_vocabulary(ids)
        limit = self.sequence_length + 1
        kept, learnt = ids[:limit], mask[:limit]
        if not learnt[1:].any():
            cut = f": the first answer starts beyond sequence_length = {self.sequence_length}" if mask.any() else ""
            raise UnusableRecordError(f"has no assistant token to learn{cut}")
        named = () if self.token_weights is None else self.token_weights.named_parts(spans, messages=messages)
        extras = self._extras(talk, stop=len(kept), named=named)
        return {"ids": kept, "label_mask": learnt, "truncated": len(ids) > limit, **extras}

    def _extras(self, talk: Conversation, *, stop: int, named: Sequence[NamedPart] = ()) -> dict[str, Any]:
        """The optional columns of a conversation's first `stop` tokens."""
        extras: dict[str, Any] = {}
        if self.translator is not None:
            assert talk.offsets is not None
            (aligned,) = self.translator.align([talk.text], ids=[talk.ids], offsets=[talk.offsets])
            self.translator.check_vocabulary(aligned)
            extras |= _translated(aligned, start=0, stop=stop)
        if self.token_weights is not None:
            extras["token_weights"] = self.token_weights.of(talk, named=named)[:stop]
        return extras

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
        settings = (
            *(TOKENIZATION_VERSION, chat, self.sequence_length, self.vocab_size, self.no_template, self.weight_field),
            self.translator and self.translator.fingerprint,
            self.token_weights and self.token_weights.settings,
            *((self.routing,) if self.routing else ()),
        )
        return hashlib.sha256(f"{settings!r} {tokenizer_fingerprint(self.tokenizer)}".encode()).hexdigest()


@dataclass(frozen=True)
class _Document:
    """A text's ids without affixes, and where there is another tokenizer their alignment with its tokens."""

    ids: list[int]
    aligned: Alignment | None = None


def _translated(aligned: Alignment | None, *, start: int, stop: int) -> dict[str, Any]:
    if aligned is None:
        return {}
    piece = aligned.piece(start=start, stop=stop)
    return {"teacher_ids": piece.teacher_ids, "groups": piece.groups.reshape(-1)}


def _append(
    rows: dict[str, list[Any]],
    *,
    record: int,
    ids: NDArray[np.int32] | None = None,
    label_mask: NDArray[np.uint8] | None = None,
    weight: float = 1.0,
    teacher: int = -1,
    truncated: bool = False,
    reason: str = "",
    **extras: NDArray,
) -> None:
    """Adds a row; `extras` are the optional columns, empty where there is no sample."""
    ids = np.zeros(0, np.int32) if ids is None else ids
    label_mask = np.zeros(0, np.uint8) if label_mask is None else label_mask
    contents: list[NDArray] = [ids, label_mask, *(extras[name] for name in sorted(extras))]
    digest = hashlib.blake2b(b"|".join(content.tobytes() for content in contents), digest_size=8).digest()
    row = {
        "ids": ids,
        "label_mask": label_mask,
        "weight": weight,
        "record": record,
        "digest": int.from_bytes(digest, "little", signed=True),
        "truncated": truncated,
        "reason": reason,
        "teacher": teacher,
        **extras,
    }
    for name, values in rows.items():
        # Only optional columns can be missing: of a bad record, or token weights of a document.
        values.append(row[name] if name in row else np.zeros(0, OPTIONAL[name].feature.dtype))
