"""The endless, random-access sequence of one task's training examples, and the caches behind it.

Example n of a task depends on (task, split, seed, n) alone. Documents come in a new order each
epoch, from a permutation that is computed and never stored; with `Chunks`, windows of documents
are cut into pieces (see `tasks.Chunks`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from t5x_lite.data.objectives.base import append_eos
from t5x_lite.data.sources import RandomAccess
from t5x_lite.data.tasks import Chunks, Task

V = TypeVar("V")
_MEASURED_DOCUMENTS = 512
_SHUFFLE_ROUNDS = 4  # Feistel rounds; Grain's own default


def keyed_rng(seed: int, index: int) -> np.random.Generator:
    """The generator of (seed, index): counter-based, so that no two keys' streams overlap."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def derived_seed(*parts: int | str) -> int:
    """32 bits from a hash of the parts, the same on every machine and in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def shuffled(index: int, size: int, seed: int) -> int:
    """Where `index` goes in the permutation of `range(size)` that `seed` names."""
    return _index_shuffle()(index, size - 1, seed, _SHUFFLE_ROUNDS) if size > 1 else 0


@functools.cache
def _index_shuffle() -> Callable[[int, int, int, int], int]:
    # Importing Grain imports JAX where it is installed, and this package must import without it.
    from grain.experimental import index_shuffle

    return index_shuffle


class Cache(Generic[V]):
    """The `capacity` last used values of a pure function of an int; threads wait for each other.

    A value is made once, however many threads ask for it at the same time.
    """

    def __init__(self, make: Callable[[int], V], capacity: int):
        self._make, self._capacity = make, capacity
        self._lock = threading.Lock()
        self._entries: OrderedDict[int, tuple[threading.Lock, list[V]]] = OrderedDict()

    def __call__(self, key: int) -> V:
        with self._lock:
            entry = self._entries.setdefault(key, (threading.Lock(), []))
            self._entries.move_to_end(key)
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        lock, value = entry
        with lock:
            if not value:
                value.append(self._make(key))
        return value[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of one window of documents, `[pieces][tokens]`, and what was left over."""

    pieces: list[np.ndarray]
    left_over: int  # tokens after the last whole piece


def cut(documents: list[np.ndarray], length: int, eos_id: int) -> Pieces:
    """Joins documents, eos after each, and cuts whole pieces of `length` tokens.

        documents [5 6] [7 8 9], length 3:    5 6 1 | 7 8 9 | 1      left over: 1 token

    If there is not one whole piece, all of it is one short piece.
    """
    stream = np.concatenate([append_eos(document, eos_id) for document in documents])
    whole = len(stream) // length
    if not whole:
        return Pieces([stream], 0)
    return Pieces(list(stream[: whole * length].reshape(whole, length)), len(stream) % length)


class TrainingExamples:
    """`streams(n, rng)` of a task, for any n >= 0, and how many examples an epoch has."""

    def __init__(self, task: Task, split: str, seed: int, shuffle: bool):
        self.task = task
        self._split, self._seed, self._shuffle = split, seed, shuffle
        self._records: RandomAccess = task.open(split)
        self.windows = Cache(self._make_window, capacity=4)

    @functools.cached_property
    def chunk_rows(self) -> int:
        """Pieces taken of each window: as configured, or measured (see `Chunks`)."""
        chunk = self._chunk
        if chunk.rows is not None:
            return chunk.rows
        size = len(self._records)
        measured = min(size, _MEASURED_DOCUMENTS)
        lengths = [len(self._document(i * size // measured)) + 1 for i in range(measured)]
        return max(1, int(chunk.window * float(np.mean(lengths)) / self.task.limits[0]))

    @property
    def epoch_size(self) -> int:
        """Examples that correspond to one pass over the records."""
        if self.task.chunk is None:
            return len(self._records)
        return max(1, len(self._records) * self.chunk_rows // self._chunk.window)

    def tokens(self, n: int) -> tuple[np.ndarray, ...]:
        """The tokens of example n by feature, before the objective."""
        if self.task.chunk is None:
            return self.task.read(self._records, self._position(n))
        window, row = divmod(n, self.chunk_rows)
        pieces = self.windows(window).pieces
        return (pieces[row % len(pieces)],)

    def streams(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Unpadded arrays of example n by batch key; `rng` draws the objective's noise."""
        return self.task.streams(self.tokens(n), rng)

    @property
    def _chunk(self) -> Chunks:
        assert self.task.chunk is not None
        return self.task.chunk

    def _position(self, n: int) -> int:
        """Which record comes n-th: each once an epoch, in the epoch's order."""
        epoch, index = divmod(n, len(self._records))
        if not self._shuffle:
            return index
        seed = derived_seed("records", self._seed, self.task.name, epoch)
        return shuffled(index, len(self._records), seed)

    def _document(self, position: int) -> np.ndarray:
        return self.task.read(self._records, position)[0]

    def _make_window(self, window: int) -> Pieces:
        size = self._chunk.window
        documents = [
            self._document(self._position(n)) for n in range(window * size, (window + 1) * size)
        ]
        made = cut(documents, self.task.limits[0], self.task.vocabulary.eos_id)
        if not self._shuffle:
            return made
        rng = keyed_rng(derived_seed("pieces", self._seed, self.task.name), window)
        order = rng.permutation(len(made.pieces))
        return Pieces([made.pieces[i] for i in order], made.left_over)
