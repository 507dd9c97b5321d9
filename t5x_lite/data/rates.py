"""Rates of a mixture's tasks, and which task each example is of: exact in the long run, undrawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np


class Rates(Protocol):
    """Relative rates of tasks, from their numbers of examples."""

    def __call__(self, sizes: Sequence[int]) -> list[Fraction]: ...


@dataclasses.dataclass(frozen=True)
class Explicit:
    """The given rates, relative to each other."""

    rates: Sequence[float]

    def __call__(self, sizes: Sequence[int]) -> list[Fraction]:
        # 0.3 means 3/10, not the double next to it, so that long-run counts are exact.
        return [Fraction(rate).limit_denominator(10**9) for rate in self.rates]


@dataclasses.dataclass(frozen=True)
class Proportional:
    """In proportion to the number of examples: every example is seen as often as another."""

    def __call__(self, sizes: Sequence[int]) -> list[Fraction]:
        return [Fraction(size) for size in sizes]


@dataclasses.dataclass(frozen=True)
class Capped:
    """min(examples, limit): T5's examples-proportional mixing (Raffel et al. 2020, 3.5.2)."""

    limit: int

    def __call__(self, sizes: Sequence[int]) -> list[Fraction]:
        return [Fraction(min(size, self.limit)) for size in sizes]


@dataclasses.dataclass(frozen=True)
class Temperature:
    """min(examples, limit) ** (1 / temperature): 1 is Capped, large is equal rates."""

    temperature: float
    limit: int | None = None

    def __call__(self, sizes: Sequence[int]) -> list[Fraction]:
        capped = [min(size, self.limit) if self.limit else size for size in sizes]
        largest = max(capped)
        return [
            Fraction((size / largest) ** (1 / self.temperature)).limit_denominator(10**9)
            for size in capped
        ]


def whole_ratio(rates: Sequence[Fraction]) -> tuple[int, ...]:
    """`[1/2, 1/3]` -> `(3, 2)`."""
    common = np.lcm.reduce([rate.denominator for rate in rates], dtype=object)
    return tuple(int(rate * common) for rate in rates)


def assign(index: int, weights: Sequence[int]) -> tuple[int, int]:
    """(which task, how many of its examples came before) for example `index` of a mixture.

    Task 0 takes the indices at which `floor(index * w0 / sum)` is about to step; the others share
    the rest in the same way. Any prefix of n examples has each task within one step a task before
    it of its exact share, and nothing is drawn or remembered.

        weights (1, 2):   index  0 1 2 3 4 5      task  1 1 0 1 1 0      before  0 1 0 2 3 1
    """
    total = sum(weights)
    for task, weight in enumerate(weights):
        before = index * weight // total
        if (index + 1) * weight // total > before:
            return task, before
        index -= before
        total -= weight
    raise AssertionError("the last task takes every index that is left")
