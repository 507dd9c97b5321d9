"""Assemblies: a fixed number of examples becomes a fixed number of rows.

`Pad` puts one example in a row. `Pack` puts a window of W consecutive examples into exactly R rows
by first fit. Since both numbers are fixed, row r of the data is row `r % R` of window `r // R`,
which holds the examples `[window * W, window * W + W)`: any row can be had without the ones before
it, and the data state of a run stays one integer.

Choosing the window: more examples fill rows better but must be made together. 32 to 256 is
plenty. Choosing the rows: R close to W * (mean tokens of an example) / (row length) fills rows
best; fewer rows drop more examples. `measure_packing` shows both shares for your data; an overflow
of one or two percent is the usual price. Packed examples that find no room are dropped and counted
(`Window.dropped`); since windows are shuffled anew each epoch, they differ from epoch to epoch.

Every assembly writes segment ids (from 1; 0 is padding) and positions (from 0 in each segment), so
that a model sees the same keys whichever made the batch. Masked slots are a stream with room of its
own, but without these: `masked_positions` says where in the row each points, so that an example's
are moved with its tokens. Unused slots point to 0, with weight 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from t5x_lite.types import (
    ENCODER_INPUT_TOKENS,
    FLOAT_KEYS,
    MASKED_LOSS_WEIGHTS,
    MASKED_POSITIONS,
    InputError,
)

_SLOTS = "masked"


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """Rows made together: arrays `[rows, length]` by batch key, and the examples that got in."""

    rows: dict[str, np.ndarray]
    placed: int
    dropped: int


class Assembly(Protocol):
    """Turns `window` examples (layout outputs) into exactly `rows` rows."""

    @property
    def window(self) -> int: ...
    @property
    def rows(self) -> int: ...
    def __call__(
        self, examples: Sequence[Mapping[str, np.ndarray]], lengths: Mapping[str, int]
    ) -> Window: ...


@dataclasses.dataclass(frozen=True)
class Pad:
    """One example a row, filled up with zeros.

    length 5        tokens  5 6 1 0 0     segment_ids  1 1 1 0 0     positions  0 1 2 0 0
    """

    window = 1
    rows = 1

    def __call__(
        self, examples: Sequence[Mapping[str, np.ndarray]], lengths: Mapping[str, int]
    ) -> Window:
        return place(examples, list(range(len(examples))), len(examples), lengths)


@dataclasses.dataclass(frozen=True)
class Pack:
    """First fit of a window of examples into rows; an example needs room in every stream of a row.

    examples [5 6 1] [7 1] [8 9 1], two rows of length 5:

    tokens       5 6 1 7 1      segment_ids  1 1 1 2 2      positions  0 1 2 0 1
                 8 9 1 0 0                   1 1 1 0 0                 0 1 2 0 0
    """

    window: int  # examples taken together
    rows: int  # rows made of them

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= self.window:
            raise InputError(
                f"Pack(window={self.window}, rows={self.rows}): expected 1 <= rows <= window"
            )

    def __call__(
        self, examples: Sequence[Mapping[str, np.ndarray]], lengths: Mapping[str, int]
    ) -> Window:
        return place(examples, first_fit(sizes(examples), self.rows, lengths), self.rows, lengths)


def stream_of(key: str) -> str:
    """`encoder_input_tokens` -> `encoder`."""
    return key.split("_", 1)[0]


def sizes(examples: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, int]]:
    """Each example's number of tokens by stream."""
    return [{stream_of(key): len(value) for key, value in e.items()} for e in examples]


def first_fit(
    sizes: Sequence[Mapping[str, int]], rows: int, lengths: Mapping[str, int]
) -> list[int]:
    """The first row with room for each example in all its streams, in order; -1 where none has."""
    streams = list(lengths)
    room = np.tile([lengths[stream] for stream in streams], (rows, 1))  # [rows, streams]
    chosen = []
    for size in sizes:
        need = np.array([size.get(stream, 0) for stream in streams])
        fits = (room >= need).all(axis=1)
        row = int(fits.argmax())
        if not fits[row]:
            row = -1
        else:
            room[row] -= need
        chosen.append(row)
    return chosen


def empty_rows(keys: Sequence[str], rows: int, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Zeros `[rows, length]` under `keys` and their streams' segment ids and positions."""
    result: dict[str, np.ndarray] = {}
    for key in keys:
        shape = (rows, lengths[stream_of(key)])
        result[key] = np.zeros(shape, np.float32 if key in FLOAT_KEYS else np.int32)
    for stream in dict.fromkeys(map(stream_of, keys)):
        if stream == _SLOTS:
            continue
        for name in ("segment_ids", "positions"):
            result[f"{stream}_{name}"] = np.zeros((rows, lengths[stream]), np.int32)
    return result


def place(
    examples: Sequence[Mapping[str, np.ndarray]],
    row_of: Sequence[int],
    rows: int,
    lengths: Mapping[str, int],
) -> Window:
    """Writes each example into its row (-1: dropped), one after another, as numbered segments."""
    result = empty_rows(list(examples[0]), rows, lengths)
    used = [dict.fromkeys(lengths, 0) for _ in range(rows)]
    segments = [0] * rows
    for example, row in zip(examples, row_of, strict=True):
        if row < 0:
            continue
        segments[row] += 1
        size = {}
        for key, values in example.items():
            stream = stream_of(key)
            size[stream] = len(values)
            start = used[row][stream]
            if key == MASKED_POSITIONS:
                values = values + used[row][stream_of(ENCODER_INPUT_TOKENS)]
            result[key][row, start : start + len(values)] = values
        for stream, length in size.items():
            start = used[row][stream]
            used[row][stream] += length
            if stream == _SLOTS:
                continue
            result[f"{stream}_segment_ids"][row, start : start + length] = segments[row]
            result[f"{stream}_positions"][row, start : start + length] = np.arange(length)
    placed = sum(segments)
    return Window(result, placed=placed, dropped=len(examples) - placed)


def efficiency(batch: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The share of positions that hold a token, by stream: `{"encoder": 0.97, "decoder": 0.9}`.

    Of masked slots, the share that is used.
    """
    return {
        stream_of(key): float((value > 0).mean())
        for key, value in batch.items()
        if key.endswith("_segment_ids") or key == MASKED_LOSS_WEIGHTS
    }


def measure_packing(
    sizes: Sequence[Mapping[str, int]], assembly: Pack, lengths: Mapping[str, int]
) -> dict[str, float]:
    """How `assembly` would pack examples of these sizes: full windows of them, in order.

    Returns each stream's share of non-padding positions, and `overflow`, the share of examples
    dropped. Raises InputError for fewer examples than one window.
    """
    windows = len(sizes) // assembly.window
    if not windows:
        raise InputError(
            f"{len(sizes)} examples don't fill a window of {assembly.window}: measure more, or "
            "make the window smaller"
        )
    used = dict.fromkeys(lengths, 0)
    dropped = 0
    for w in range(windows):
        window = sizes[w * assembly.window : (w + 1) * assembly.window]
        for size, row in zip(window, first_fit(window, assembly.rows, lengths), strict=True):
            dropped += row < 0
            for stream in used:
                used[stream] += size.get(stream, 0) if row >= 0 else 0
    rows = windows * assembly.rows
    return {
        **{stream: used[stream] / (rows * length) for stream, length in lengths.items()},
        "overflow": dropped / (windows * assembly.window),
    }
