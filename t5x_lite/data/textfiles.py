"""Text files by random access: an index of byte offsets, never a list of strings.

Opening reads each file once, in blocks, to find its records and to check that it is UTF-8; a
record is then one slice of a memory-mapped file. An index costs 24 bytes a record.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from t5x_lite.types import InputError

_BLOCK = 1 << 24  # bytes read at a time while indexing
_BOM = b"\xef\xbb\xbf"

Files = Mapping[str, str | Sequence[str]]  # split -> path(s) or glob pattern(s)


def expand(files: Files, split: str) -> list[str]:
    """The paths of `split`, sorted within each pattern. Raises InputError for one without files."""
    if split not in files:
        raise InputError(f"split '{split}' does not exist; the splits are: {', '.join(files)}")
    patterns = files[split]
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str | os.PathLike) else patterns:
        found = sorted(glob.glob(os.fspath(pattern), recursive=True))
        if not found:
            raise InputError(f"split '{split}' names '{pattern}', but there is no such file")
        paths += [path for path in found if os.path.isfile(path)]
    if not paths:
        raise InputError(f"split '{split}' has no files: expected a path or a glob pattern")
    return paths


class Unit(Protocol):
    """What one record of a text file is: maps lines to records."""

    def __call__(self, blank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`blank` bool `[lines]` -> (first line, last line) of each record."""


@dataclasses.dataclass(frozen=True)
class Lines:
    """One record a line; blank lines are passed over."""

    def __call__(self, blank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lines = np.flatnonzero(~blank)
        return lines, lines


@dataclasses.dataclass(frozen=True)
class Paragraphs:
    """One record a run of lines between blank lines; inner line breaks are kept."""

    def __call__(self, blank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        edges = np.concatenate([[True], blank, [True]])
        first = np.flatnonzero(~edges[1:-1] & edges[:-2])
        last = np.flatnonzero(~edges[1:-1] & edges[2:])
        return first, last


class TextRecords:
    """The records of several text files: `len`, `[i]` -> str, `where(i)` -> 'file, line n'."""

    def __init__(self, paths: Sequence[str], unit: Unit):
        self._paths = list(paths)
        self._data: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        lines: list[np.ndarray] = []
        counts = [0]
        for path in self._paths:
            data = _map_bytes(path)
            _check_utf8(path, data)
            line_starts, line_ends, blank = _lines(data)
            first, last = unit(blank)
            if not len(first):
                raise InputError(f"'{path}' is empty: expected at least one line of text")
            self._data.append(data)
            starts.append(line_starts[first])
            ends.append(line_ends[last])
            lines.append(first + 1)
            counts.append(len(first))
        self._starts, self._ends = np.concatenate(starts), np.concatenate(ends)
        self._lines = np.concatenate(lines)
        self._offsets: np.ndarray = np.cumsum(counts)  # records before each file

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        data = self._data[self._file(index)]
        text = data[self._starts[index] : self._ends[index]].tobytes().decode("utf-8")
        return text.replace("\r\n", "\n").strip("\r\n")

    def where(self, index: int) -> str:
        return f"'{self._paths[self._file(index)]}', line {self._lines[index]}"

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._offsets, index, side="right")) - 1


def _map_bytes(path: str) -> np.ndarray:
    try:
        if os.path.getsize(path) == 0:
            raise InputError(f"'{path}' is empty: expected at least one line of text")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from error


def _blocks(data: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(data), _BLOCK):
        yield start, data[start : start + _BLOCK]


def _check_utf8(path: str, data: np.ndarray) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start, block in _blocks(data):
        pending = len(decoder.getstate()[0])  # bytes of a character cut by the last block's end
        try:
            decoder.decode(block.tobytes(), final=start + len(block) == len(data))
        except UnicodeDecodeError as error:
            offset = start - pending + error.start
            line = 1 + sum(int((b[: offset - s] == 10).sum()) for s, b in _blocks(data[:offset]))
            raise InputError(
                f"'{path}' is not UTF-8: line {line}, byte offset {offset} (0x{data[offset]:02x}); "
                "convert the file, for example with `iconv -t UTF-8`"
            ) from error


def _lines(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, blank) of the lines, ends before the line feed: int64, int64, bool."""
    feeds = np.concatenate([start + np.flatnonzero(block == 10) for start, block in _blocks(data)])
    bom = len(_BOM) if data[: len(_BOM)].tobytes() == _BOM else 0
    starts = np.concatenate([[bom], feeds + 1])
    ends = np.concatenate([feeds, [len(data)]])
    if starts[-1] == len(data):  # the file ends with a line feed
        starts, ends = starts[:-1], ends[:-1]
    # Most lines show with their first byte that they are not blank.
    blank = (starts >= ends) | (data[np.minimum(starts, len(data) - 1)] <= 32)
    for i in np.flatnonzero(blank):
        blank[i] = not data[starts[i] : ends[i]].tobytes().strip()
    return starts, ends, blank
