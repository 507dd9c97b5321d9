"""Rows to answers, a batch at a time: one program for each bucket of lengths."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from t5x_lite.decode.modes.base import Mode, Row
from t5x_lite.decode.scoring import bucket
from t5x_lite.types import InputError

_SHORTEST = 8  # tokens; the smallest bucket
_WINDOW = 16  # batches whose rows are sorted by length together


@dataclass(frozen=True)
class Asker:
    """Asks a mode's rows, `batch_size` of them at a time; the last batch is filled up."""

    mode: Mode
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"infer.batch_size={self.batch_size}: expected at least 1")
        self.mode.loaded.partitioner.check_batch_size(self.batch_size)

    @functools.cached_property
    def _program(self) -> Any:
        """`(params, batch, numbers)`; compiled once for each bucket."""
        replicated = self.mode.loaded.partitioner.replicated
        return jax.jit(self.mode.compute, out_shardings=replicated)

    def answers(self, rows: Sequence[Row], first: int = 0) -> Iterator[list[Any]]:
        """The rows' answers in their order, a window at a time; row i has number `first + i`.

        In a window, rows of like length share a batch, which is as long as the next power of two.
        """
        size = self.batch_size * _WINDOW
        for start in range(0, len(rows), size):
            window = rows[start : start + size]
            order = sorted(range(len(window)), key=lambda i: window[i].length)
            found: dict[int, Any] = {}
            for begin in range(0, len(order), self.batch_size):
                part = order[begin : begin + self.batch_size]
                numbers = [first + start + i for i in part]
                found |= zip(part, self.batch([window[i] for i in part], numbers), strict=True)
            yield [found[i] for i in range(len(window))]

    def batch(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[Any]:
        """The answers to at most `batch_size` rows; `numbers` key what is drawn for each."""
        mode, size = self.mode, self.batch_size
        partitioner = mode.loaded.partitioner
        longest = max(row.length for row in rows)
        length = bucket(longest, mode.options.max_input_tokens, _SHORTEST)
        empty = size - len(rows)
        filled = mode.rows([*rows, *[None] * empty], length)
        local = partitioner.local_rows(size)
        keyed = np.array([*numbers, *[0] * empty], np.int32)[:, None]
        with partitioner.activate():
            batch = partitioner.put_batch({k: v[local] for k, v in filled.items()}, size)
            keys = partitioner.put_batch({"numbers": keyed[local]}, size)["numbers"]
            answers = jax.device_get(self._program(mode.loaded.params, batch, keys))
        return [jax.tree.map(lambda leaf, i=i: leaf[i], answers) for i in range(len(rows))]
