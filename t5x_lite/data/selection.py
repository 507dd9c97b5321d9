"""Sources of some of another's records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_lite.data.sources import RandomAccess, Record, Source
from t5x_lite.types import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
    """The records whose `field` is one of `values` (of the splits `only`: others stay whole).

    A split's records are all read when it is opened: for small datasets.
    """

    source: Source
    field: str
    values: Sequence[Any]
    only: Sequence[str] | None = None  # the splits that are selected from; None: all

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if self.only is not None:
            object.__setattr__(self, "only", tuple(self.only))

    @property
    def splits(self) -> tuple[str, ...]:
        return self.source.splits

    def open(self, split: str) -> RandomAccess:
        """Raises InputError for a field that a record does not have, and if none is left."""
        records = self.source.open(split)
        if self.only is not None and split not in self.only:
            return records
        found = []
        for i in range(len(records)):
            record = records[i]
            if self.field not in record:
                raise InputError(
                    f"Where.field is '{self.field}', but the record has {', '.join(record)}"
                )
            if record[self.field] in self.values:
                found.append(i)
        if not found:
            raise InputError(
                f"no record of split '{split}' has one of {self.values} in its field "
                f"'{self.field}': mend Where.values"
            )
        return _Selected(records, found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """`count` records of each split, drawn by `seed` (of the splits `only`: others stay whole).

    A larger count draws the same and more: what is learned from 100 and from 1,000 examples of one
    seed differs by the 900 alone.
    """

    source: Source
    count: int
    seed: int = 0
    only: Sequence[str] | None = None  # the splits that are drawn from; None: all

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"Drawn.count={self.count}: expected at least 1")
        if self.only is not None:
            object.__setattr__(self, "only", tuple(self.only))

    @property
    def splits(self) -> tuple[str, ...]:
        return self.source.splits

    def open(self, split: str) -> RandomAccess:
        """Raises InputError for a split of fewer records."""
        records = self.source.open(split)
        if self.only is not None and split not in self.only:
            return records
        if self.count > len(records):
            raise InputError(
                f"Drawn.count={self.count}, but split '{split}' has {len(records)} records: draw "
                "fewer"
            )
        order = np.random.default_rng(self.seed).permutation(len(records))
        return _Selected(records, order[: self.count].tolist())


@dataclasses.dataclass(frozen=True)
class _Selected:
    records: RandomAccess
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.records[self.indices[int(index)]]
