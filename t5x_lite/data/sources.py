"""Sources: where records come from. Each split opens as random access: `len`, and `[i]` -> dict.

Sources are frozen and hold names only, so they pickle; files are opened by `open(split)`, which is
where a missing split, a missing or broken file is reported. Records are dicts of str, int and numpy
arrays; the field names that the tasks know are `text`, `inputs`, `targets` and `tokens`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from t5x_lite.data.textfiles import Files, Lines, TextRecords, Unit, expand
from t5x_lite.types import InputError

Record = dict[str, Any]


class RandomAccess(Protocol):
    """A split's records."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...


class Source(Protocol):
    """Named splits of records."""

    @property
    def splits(self) -> tuple[str, ...]: ...
    def open(self, split: str) -> RandomAccess: ...


def texts(source: Source, split: str = "train", fields: Iterable[str] = ("text",)) -> Iterator[str]:
    """The split's texts in order, field by field: what `train_sentencepiece` reads.

    Raises InputError for a field that a record doesn't have.
    """
    records = source.open(split)
    for i in range(len(records)):
        record = records[i]
        for field in fields:
            if field not in record:
                raise InputError(
                    f"record {i} of split '{split}' has no field '{field}'; its fields are: "
                    + ", ".join(record)
                )
            yield record[field]


# --- pairs ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PairedSource:
    """Adds another record's text to each record: `{"text": ...}` -> `{"text": ..., "other": ...}`.

    Which one depends on (seed, index) alone; it is never the record itself, and all others are
    equally likely. For `NextSentencePairs`. Raises InputError for a split of a single record.
    """

    source: Source
    field: str = "text"  # the other record's field
    name: str = "other"  # under this name
    seed: int = 0

    @property
    def splits(self) -> tuple[str, ...]:
        return self.source.splits

    def open(self, split: str) -> RandomAccess:
        records = self.source.open(split)
        if len(records) < 2:
            raise InputError(
                f"split '{split}' has {len(records)} records: PairedSource takes the other text "
                "from another one; expected 2 or more"
            )
        return _Paired(records, self)


@dataclasses.dataclass(frozen=True)
class _Paired:
    records: RandomAccess
    config: PairedSource

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        record, config = self.records[index], self.config
        digest = hashlib.sha256(f"other/{config.seed}/{index}".encode()).digest()
        away = 1 + int.from_bytes(digest[:8], "big") % (len(self) - 1)
        other = self.records[(index + away) % len(self)]
        if config.field not in other:
            raise InputError(
                f"PairedSource.field is '{config.field}', but the record has {', '.join(other)}"
            )
        return {**record, config.name: other[config.field]}


# --- text ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextSource:
    """UTF-8 text files: `{"text": ...}`, one record a line, or as `unit` says (`Paragraphs()`)."""

    files: Files
    unit: Unit = dataclasses.field(default_factory=Lines)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def open(self, split: str) -> RandomAccess:
        return _Text(TextRecords(expand(self.files, split), self.unit))


@dataclasses.dataclass(frozen=True)
class _Text:
    records: TextRecords

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return {"text": self.records[index]}


@dataclasses.dataclass(frozen=True)
class JsonlSource:
    """JSON lines: one object a line is one record.

    The first and last line of every file are parsed when it is opened (a truncated file breaks in
    its last), the others when they are read; a broken one is named with its file and line.
    """

    files: Files

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def open(self, split: str) -> RandomAccess:
        paths = expand(self.files, split)
        for path in paths:
            one = _Jsonl(TextRecords([path], Lines()))
            one[0], one[len(one) - 1]
        return _Jsonl(TextRecords(paths, Lines()))


@dataclasses.dataclass(frozen=True)
class _Jsonl:
    records: TextRecords

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        try:
            record = json.loads(self.records[index])
        except json.JSONDecodeError as error:
            raise InputError(
                f"{self.records.where(index)} is not JSON: {error.msg} at column {error.colno}; "
                "expected one object a line"
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f"{self.records.where(index)} holds a JSON {type(record).__name__}; expected an "
                'object such as {"inputs": "...", "targets": "..."}'
            )
        return record


# --- tokens --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TokenFileSource:
    """Headerless files of token ids, memory-mapped: record i is tokens `[i*length, (i+1)*length)`.

    `{"tokens": int32 [length]}`; what is left at a file's end is dropped. Files written by
    `write_token_file` have a JSON file beside them, `PATH.json`, against which size and dtype are
    checked; a bare file is checked only for whole tokens. Take `length` from the objective's
    `fit`: 568 for span corruption of 512.
    """

    files: Files
    length: int  # tokens a record
    dtype: str = "uint16"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise InputError(f"TokenFileSource length is {self.length}; expected 1 or more")
        if self.dtype not in ("uint8", "uint16", "uint32", "int32"):
            raise InputError(
                f"TokenFileSource dtype is '{self.dtype}'; expected uint8, uint16, uint32 or int32"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def open(self, split: str) -> RandomAccess:
        return _Tokens([self._map(path) for path in expand(self.files, split)], self.length)

    def _map(self, path: str) -> np.ndarray:
        size, item = os.path.getsize(path), np.dtype(self.dtype).itemsize
        about: dict[str, Any] = {}
        if os.path.exists(f"{path}.json"):
            with open(f"{path}.json", encoding="utf-8") as file:
                about = json.load(file)
        if about.get("dtype", self.dtype) != self.dtype:
            raise InputError(
                f"token file '{path}' was written as {about['dtype']}, not {self.dtype}: set dtype"
            )
        if size % item or size != about.get("tokens", size // item) * item:
            expected = about["tokens"] * item if about else f"a multiple of {item}"
            raise InputError(
                f"token file '{path}' is truncated: {size} bytes, expected {expected}; write it "
                "again"
            )
        if size // item < self.length:
            raise InputError(
                f"token file '{path}' has {size // item} tokens, fewer than one record of "
                f"{self.length}"
            )
        return np.memmap(path, dtype=self.dtype, mode="r")


class _Tokens:
    def __init__(self, data: list[np.ndarray], length: int):
        self._data, self._length = data, length
        self._offsets: np.ndarray = np.cumsum([0, *(len(d) // length for d in data)])

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self._offsets, index, side="right")) - 1
        start = (index - int(self._offsets[file])) * self._length
        return {"tokens": self._data[file][start : start + self._length].astype(np.int32)}


def write_token_file(
    path: str | os.PathLike[str], tokens: Iterable[np.ndarray], *, dtype: str = "uint16"
) -> int:
    """Writes the arrays one after another, with `PATH.json` beside them; returns their tokens.

    Append eos to each document before, if documents are to be told apart. The file appears only
    when it is complete. Raises InputError for a token that `dtype` can't hold.
    """
    path, count, info = os.fspath(path), 0, np.iinfo(dtype)
    with open(f"{path}.partial", "wb") as file:
        for array in map(np.asarray, tokens):
            if array.size and (array.min() < info.min or array.max() > info.max):
                raise InputError(
                    f"token {array.max()} does not fit {dtype} (up to {info.max}): use uint32"
                )
            file.write(array.astype(dtype).tobytes())
            count += array.size
    with open(f"{path}.json", "w", encoding="utf-8") as file:
        json.dump({"tokens": count, "dtype": dtype}, file)
    os.replace(f"{path}.partial", path)
    return count


# --- TFDS ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A prepared TFDS dataset in array_record format, read without TensorFlow.

    `name` may add a config and a version (`wiki/en:1.0.0`); without a version the highest one under
    `data_dir` is read. Text comes back as str, and scalars as int or float. Nothing is downloaded.
    """

    name: str
    data_dir: str

    @property
    def path(self) -> str:
        """The dataset's folder. Raises InputError, with the command to run, if there is none."""
        path, _, version = self.name.partition(":")
        root = os.path.join(os.path.expanduser(self.data_dir), path)
        prepared = []
        for entry in os.listdir(root) if os.path.isdir(root) else ():
            done = os.path.exists(os.path.join(root, entry, "dataset_info.json"))
            if done and re.fullmatch(r"\d+\.\d+\.\d+", entry) and version in ("", entry):
                prepared.append((tuple(map(int, entry.split("."))), entry))
        if not prepared:
            raise InputError(
                f"dataset '{self.name}' is not prepared in '{self.data_dir}'; prepare it with "
                f"`{self._command}`"
            )
        return os.path.join(root, max(prepared)[1])

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds  # half a second, so only when it is needed

        return tfds.builder_from_directory(self.path)

    @property
    def _command(self) -> str:
        name = self.name.partition(":")[0]
        return f"python scripts/prepare_data.py --dataset={name} --data_dir={self.data_dir}"

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "data_dir": self.data_dir}

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._builder.info.splits)

    def open(self, split: str) -> RandomAccess:
        if split not in self.splits:
            raise InputError(
                f"split '{split}' does not exist in dataset '{self.name}'; the splits are: "
                + ", ".join(self.splits)
            )
        try:
            source = self._builder.as_data_source(split=split)
            records = _Tfds(source)
            if len(records):
                records[0]
        except Exception as error:  # TFDS and array_record raise many kinds for a damaged file
            raise InputError(
                f"dataset '{self.name}' in '{self.data_dir}' cannot be read ({error}); expected "
                f"array_record files: delete it and prepare it with `{self._command}`"
            ) from error
        if not len(records):
            raise InputError(f"split '{split}' of dataset '{self.name}' is empty")
        return records


@dataclasses.dataclass(frozen=True)
class _Tfds:
    records: Any

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return _plain(self.records[int(index)])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.item() if isinstance(value, np.generic) else value
