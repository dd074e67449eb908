"""Files, folders, patterns and hub data sets as one map-style data set of records.

Each record has `text`, or `messages` (a list, or the same as JSON). A text file is one document, whole.
"""

import glob
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetsError
from pyarrow.parquet import read_metadata

from largekd.config.data import SourceConfig
from largekd.data.json_lines import stream_raw, stream_records
from largekd.errors import DataError

SUFFIXES = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Part of the cache key: raise it when the same files would give different records.
READER_VERSION = 1
PROBED_RECORDS = 32


@dataclass(frozen=True)
class Records:
    """A source's records: `dataset` has `text` and/or `messages`, and where files are read `origin` and `problem`."""

    dataset: Dataset
    source: str

    def __len__(self) -> int:
        return len(self.dataset)

    def origin(self, index: int) -> str:
        """Where record `index` stands: file and line where they are known."""
        if "origin" in self.dataset.column_names:
            return self.dataset[index]["origin"]
        return f"{self.source}: record {index}"


def read_records(source: SourceConfig, *, key: str = "data.train", teacher_field: str | None = None) -> Records:
    """The records of `source`, stored on disk by `datasets` and read back memory-mapped.

    Args:
        key: configuration key of this source, named in messages.
        teacher_field: column with the name of a record's teacher; the data set then has a column `teacher`, where the
            source has it at all.

    Raises:
        DataError: nothing at the path, files of several kinds, no record, no usable column, a broken JSON array.
    """
    files = find_files(source.path, key=key)
    if files is not None and source.subset is not None:
        raise DataError(f"{key}.subset = {source.subset!r} is for hub data sets, but {source.path} is a local path.")
    if files is None:
        dataset = _load_hub(source, key=key, teacher_field=teacher_field)
    elif SUFFIXES[files[0].suffix] == "parquet":
        dataset = _load_parquet(source, files=files, key=key, teacher_field=teacher_field)
    else:
        dataset = _load_lines(source, files=files, key=key, teacher_field=teacher_field)
    if len(dataset) == 0:
        raise _empty(source, key=key)
    return Records(dataset=dataset, source=source.path)


def find_files(path: str, *, key: str = "data.train") -> tuple[Path, ...] | None:
    """The local files that `path` names, sorted; None where it can only be the name of a hub data set.

    Raises:
        DataError: nothing there, no readable file among what is there, or files of several kinds.
    """
    place = Path(path).expanduser()
    if place.is_file():
        found = [place]
        tried = f"the file {place}"
    elif place.is_dir():
        found = [file for file in place.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
        tried = f"the folder {place} and all below it"
    elif glob.has_magic(path):
        found = [Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file()]
        tried = f"the pattern {place}"
    elif HUB_NAME.fullmatch(path) and place.suffix not in SUFFIXES:
        return None
    else:
        raise DataError(f"{key}.path = {path!r}: there is no file or folder {place.absolute()}.")
    unknown = [file for file in found if file.suffix not in SUFFIXES]
    if unknown or not found:
        names = ", ".join(SUFFIXES)
        problem = f"{unknown[0]} ends in none of them" if unknown else "there is no such file"
        raise DataError(f"{key}.path = {path!r}: searched {tried} for files that end in {names}; {problem}.")
    kinds = {SUFFIXES[file.suffix] for file in found}
    if len(kinds) > 1:
        raise DataError(
            f"{key}.path = {path!r} mixes {', '.join(sorted(kinds))} files: name one kind, e.g. with *.jsonl."
        )
    return tuple(sorted(found))


def _load_lines(source: SourceConfig, *, files: tuple[Path, ...], key: str, teacher_field: str | None) -> Dataset:
    names = tuple(str(file) for file in files)
    try:
        probed = [raw.value for raw in islice(stream_raw(files=names, text_field=source.text_field), PROBED_RECORDS)]
        if not probed:
            raise _empty(source, key=key)
        _check_columns(probed, source=source, key=key)
        stamps = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        settings: tuple[Any, ...] = (
            READER_VERSION,
            stamps,
            source.text_field,
            source.messages_field,
            source.skip_samples,
            source.max_samples,
        )
        column = Value("large_string")  # one text file may exceed the 2 GiB that `string` can address
        columns = {"text": column, "messages": column, "origin": column, "problem": column}
        if source.weight_field is not None:
            columns["weight"] = Value("float64")
            settings = (*settings, source.weight_field)
        routed: dict[str, str] = {}
        if teacher_field is not None:
            columns["teacher"] = column
            settings = (*settings, "teacher", teacher_field)
            routed["teacher_field"] = teacher_field
        if source.named_span_weights:
            _check_spans(probed, source=source, key=key)
            columns["spans"] = column
            settings = (*settings, "spans", source.spans_field)
            routed["spans_field"] = source.spans_field
        # A generator that gives nothing is an error of the library's that names no file.
        if next(islice(stream_raw(files=names, text_field=source.text_field), source.skip_samples, None), None) is None:
            raise _empty(source, key=key)
        return Dataset.from_generator(
            stream_records,
            features=Features(columns),
            # A tuple: the library would split a list of files into shards and call the reader once for each.
            gen_kwargs={
                "files": names,
                "text_field": source.text_field,
                "messages_field": source.messages_field,
                "skip_samples": source.skip_samples,
                "max_samples": source.max_samples,
                "weight_field": source.weight_field,
                **routed,
            },
            fingerprint=hashlib.sha256(repr(settings).encode()).hexdigest()[:32],
        )
    except (DatasetsError, OSError) as error:
        raise _explained(error, source=source, key=key) from error


def _load_parquet(source: SourceConfig, *, files: tuple[Path, ...], key: str, teacher_field: str | None) -> Dataset:
    try:
        if not sum(read_metadata(file).num_rows for file in files):
            raise _empty(source, key=key)
        dataset = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except (DatasetsError, OSError, ValueError) as error:
        raise _explained(error, source=source, key=key) from error
    return _two_columns(dataset, source=source, key=key, teacher_field=teacher_field)


def _load_hub(source: SourceConfig, *, key: str, teacher_field: str | None) -> Dataset:
    try:
        dataset = load_dataset(source.path, source.subset, split=source.split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{key}.path = {source.path!r}: there is no file or folder {Path(source.path).absolute()}, and it could "
            f"not be loaded as a hub data set (subset {source.subset!r}, split {source.split!r}): {error}"
        ) from error
    return _two_columns(dataset, source=source, key=key, teacher_field=teacher_field)


def _empty(source: SourceConfig, *, key: str) -> DataError:
    skipped = f" after the {source.skip_samples} of {key}.skip_samples" if source.skip_samples else ""
    return DataError(
        f"{key}: {source.path} is empty: no record was read{skipped}. Point {key}.path to data with records."
    )


def _explained(error: BaseException, *, source: SourceConfig, key: str) -> DataError:
    """The user's error inside the library's wrapping, or one that quotes the library's innermost cause."""
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, DataError):
        cause = cause.__cause__
    return cause if isinstance(cause, DataError) else DataError(f"{key}: cannot read {source.path}: {cause}")


def _two_columns(dataset: Dataset, *, source: SourceConfig, key: str, teacher_field: str | None) -> Dataset:
    """`dataset` with its text, messages, weight and teacher columns alone, under these names."""
    features = dataset.features
    _check_columns([dict.fromkeys(features, "")], source=source, key=key)
    text = features.get(source.text_field)
    if source.messages_field not in features and getattr(text, "dtype", None) not in ("string", "large_string"):
        raise DataError(f"{key}: column {source.text_field!r} of {source.path} holds {text}, expected strings.")
    names = {source.text_field: "text", source.messages_field: "messages"}
    if source.weight_field is not None:
        weight = features.get(source.weight_field)
        if not str(getattr(weight, "dtype", "")).startswith(("int", "uint", "float")):
            found = "is missing" if weight is None else f"holds {weight}, expected numbers"
            raise DataError(f"{key}.weight_field: column {source.weight_field!r} of {source.path} {found}.")
        names[source.weight_field] = "weight"
    if teacher_field is not None and teacher_field in features:
        found = features[teacher_field]
        if getattr(found, "dtype", None) not in ("string", "large_string"):
            raise DataError(f"{key}: column {teacher_field!r} of {source.path} holds {found}, expected names.")
        names[teacher_field] = "teacher"
    if source.named_span_weights:
        _check_spans([dict.fromkeys(features, "")], source=source, key=key)
        names[source.spans_field] = "spans"
    dataset = dataset.select_columns([name for name in names if name in features])
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old in features and old != new})
    first = source.skip_samples
    if first >= len(dataset):
        raise _empty(source, key=key)
    return dataset.select(range(first, min(first + (source.max_samples or len(dataset)), len(dataset))))


def _check_spans(values: Iterable[Any], *, source: SourceConfig, key: str) -> None:
    """Refuses a source where none of the first records has the column that named weights are about."""
    if not any(isinstance(value, dict) and source.spans_field in value for value in values):
        raise DataError(
            f"{key}.named_span_weights: {source.path} has no column {source.spans_field!r} ({key}.spans_field), which "
            "says where the named parts stand."
        )


def unknown_parts(dataset: Dataset, *, names: Iterable[str]) -> list[str]:
    """The names that no part in the column `spans` has."""
    wanted = list(names)
    if not wanted:
        return []
    column = dataset.select_columns("spans").with_format("arrow")[:]["spans"]
    if pa.types.is_large_string(column.type) or pa.types.is_string(column.type):
        # JSON: a look at its text is enough for a warning.
        return [name for name in wanted if not pc.any(pc.match_substring(column, json.dumps(name))).as_py()]
    values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    if not pa.types.is_struct(values.type) or "name" not in values.type.names:
        return []  # Each record will be told so.
    found = set(pc.unique(pc.struct_field(values, "name")).to_pylist())
    return [name for name in wanted if name not in found]


def _check_columns(values: Iterable[Any], *, source: SourceConfig, key: str) -> None:
    """Refuses a source where none of the first records has one of the two columns."""
    columns: set[str] = set()
    for value in values:
        columns.update(value if isinstance(value, dict) else ())
    if columns and not columns & {source.text_field, source.messages_field}:
        raise DataError(
            f"{key}: {source.path} has neither a column {source.messages_field!r} ({key}.messages_field) nor "
            f"{source.text_field!r} ({key}.text_field); its columns are {', '.join(map(repr, sorted(columns)))}."
        )
