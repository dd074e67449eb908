"""Tokenized samples, read in place from memory-mapped Arrow columns."""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from largekd.errors import DataError


class SampleStore:
    """Random access to samples by id, 0 … len - 1.

    Sample i holds `lengths[i]` + 1 token ids for `lengths[i]` positions: position t reads ids[t] and predicts
    ids[t + 1]. Ids follow the order of the source and do not depend on packing, shuffling or ranks.
    """

    def __init__(self, dataset: Dataset | pa.Table, *, kept: NDArray[np.int64]) -> None:
        """Args: dataset: columns of `samples.FEATURES`; kept: indices of the rows that are samples."""
        table = dataset if isinstance(dataset, pa.Table) else dataset.data.table
        self._table, self._rows = table, kept
        self._ids = _Ragged(table.column("ids"))
        self._masks = _Ragged(table.column("label_mask"))
        self.lengths: NDArray[np.int64] = (self._ids.lengths - 1)[kept]
        self.weights: NDArray[np.float32] = table.column("weight").to_numpy()[kept]
        self.records: NDArray[np.int64] = table.column("record").to_numpy()[kept]
        # Optional columns: the teacher's tokens where its tokenizer is another, weights of parts of answers.
        named = set(table.column_names)
        self._teacher_ids = _Ragged(table.column("teacher_ids")) if "teacher_ids" in named else None
        self._groups = _Ragged(table.column("groups")) if "groups" in named else None
        self._token_weights = _Ragged(table.column("token_weights")) if "token_weights" in named else None
        # Places of the teachers that records name, −1 for none.
        self.teachers: NDArray[np.int64] | None = None
        if "teacher" in named:
            self.teachers = table.column("teacher").to_numpy()[kept].astype(np.int64)
        self._digests: NDArray[np.int64] = table.column("digest").to_numpy()[kept]

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self, sample: int) -> NDArray[np.int32]:
        """The sample's `length + 1` token ids, a read-only view of the file."""
        return self._ids[int(self._rows[sample])]

    def label_mask(self, sample: int) -> NDArray[np.uint8] | None:
        """For each of `ids`, 1 where it is a token to learn; None: all of them."""
        mask = self._masks[int(self._rows[sample])]
        return mask if mask.size else None

    def token_weights(self, sample: int) -> NDArray[np.float32] | None:
        """For each of `ids`, its weight within the sample; None: 1 for all of them."""
        if self._token_weights is None:
            return None
        weights = self._token_weights[int(self._rows[sample])]
        return weights if weights.size else None

    @property
    def is_translated(self) -> bool:
        """Whether samples also hold the teacher's tokens and the groups of both."""
        return self._teacher_ids is not None

    @cached_property
    def teacher_lengths(self) -> NDArray[np.int64]:
        """Positions of each sample in the teacher's tokens, one less than it has tokens (0 for none)."""
        assert self._teacher_ids is not None, "the samples were loaded without a teacher's tokenizer"
        return np.maximum(self._teacher_ids.lengths - 1, 0)[self._rows]

    def teacher_ids(self, sample: int) -> NDArray[np.int32]:
        """The sample's text in the teacher's tokens: `teacher_lengths[sample]` + 1 ids, or none."""
        assert self._teacher_ids is not None, "the samples were loaded without a teacher's tokenizer"
        return self._teacher_ids[int(self._rows[sample])]

    def groups(self, sample: int) -> NDArray[np.int32]:
        """(G, 4), in order: places [0, 1) in `ids` and [2, 3) in `teacher_ids` that spell the same bytes."""
        assert self._groups is not None, "the samples were loaded without a teacher's tokenizer"
        return self._groups[int(self._rows[sample])].reshape(-1, 4)

    @cached_property
    def tokens(self) -> int:
        """Positions of all samples together."""
        return int(self.lengths.sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every sample's length, weight, digest of its ids and mask, and named teacher, in order."""
        total = hashlib.sha256()
        named = () if self.teachers is None else (self.teachers,)
        for column in (self.lengths, self.weights, self._digests, *named):
            total.update(np.ascontiguousarray(column).tobytes())
        return total.hexdigest()

    @cached_property
    def text_fingerprint(self) -> str:
        """SHA-256 over every sample's length, ids and mask, in order: weights and other columns left out."""
        total = hashlib.sha256(np.ascontiguousarray(self.lengths).tobytes())
        if self._teacher_ids is None and self._token_weights is None:
            total.update(np.ascontiguousarray(self._digests).tobytes())
            return total.hexdigest()
        # Digests cover the other columns too, so that they are made again as they would be without them.
        for row in self._rows.tolist():
            contents = self._ids[row].tobytes() + b"|" + self._masks[row].tobytes()
            total.update(hashlib.blake2b(contents, digest_size=8).digest())
        return total.hexdigest()

    def check_fits(self, *, sequence_length: int) -> None:
        """Raises DataError if a sample has more positions than a row."""
        longest = int(self.lengths.max())
        if longest > sequence_length:
            raise DataError(
                f"a sample has {longest} positions, but train.sequence_length = {sequence_length}: "
                "load the samples with the same sequence_length as the rows."
            )


def joined(stores: Sequence[SampleStore]) -> SampleStore:
    """The samples of several stores one after another, still in place: ids go on where those of the store before end.

    `records` stay those of each source. Samples of a store without weights of tokens have 1 for all.
    """
    if len(stores) == 1:
        return stores[0]
    columns = list(dict.fromkeys(name for store in stores for name in store._table.column_names))
    types = {name: store._table.schema.field(name).type for store in stores for name in store._table.column_names}
    starts = np.cumsum([0, *(len(store._table) for store in stores)])
    tables = [
        pa.table({name: _column(store._table, name=name, kind=types[name]) for name in columns}) for store in stores
    ]
    kept = [store._rows + start for store, start in zip(stores, starts, strict=False)]
    return SampleStore(pa.concat_tables(tables), kept=np.concatenate(kept))


def _column(table: pa.Table, *, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """The column, or an empty list in every row where the table has none."""
    if name in table.column_names:
        return table.column(name)
    assert name == "token_weights", f"only some of the stores have {name}"
    offsets = pa.array(np.zeros(len(table) + 1, np.int32))
    return pa.chunked_array([pa.ListArray.from_arrays(offsets, pa.array([], pa.float32())).cast(kind)])


class _Ragged:
    """A column of lists as flat NumPy views, one pair for each Arrow chunk."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
        parts = [np.diff(offsets) for offsets in self._offsets]
        self.lengths: NDArray[np.int64] = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def __getitem__(self, row: int) -> NDArray:
        chunk = int(np.searchsorted(self._ends, row, side="right"))
        local = row - (int(self._ends[chunk - 1]) if chunk else 0)
        offsets = self._offsets[chunk]
        return self._values[chunk][offsets[local] : offsets[local + 1]]
