"""Metrics whose score of a set is a function of a sum over its examples.

Corpus BLEU and chrF are such, as well as every mean. A resample of the set then costs one weighted
sum, in place of comparing all texts again: see `bootstrap`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from t5x_lite.types import InputError


class Statistics(NamedTuple):
    """What a metric sums, and what it makes of the sum."""

    rows: np.ndarray  # float64 [examples, k], or [groups, k]: what a resample draws
    score: Callable[[np.ndarray], dict[str, float]]  # of a sum of rows, [k]


class Additive(Protocol):
    """A metric that can also say its statistics."""

    statistics: Callable[[Sequence[Any], Sequence[Any]], Statistics]

    def __call__(self, targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]: ...


def additive(statistics: Callable[[Sequence[Any], Sequence[Any]], Statistics]) -> Additive:
    """Makes a metric, `(targets, predictions) -> {name: value}`, of a function of its statistics.

    >>> @additive
    ... def hits(targets, predictions):
    ...     rows = np.array([[t == p, 1] for t, p in zip(targets, predictions)], float)
    ...     return Statistics(rows, lambda total: {"hits": total[0] / total[1]})
    >>> hits(["a", "b"], ["a", "c"])
    {'hits': 0.5}

    Raises InputError, when it is called, for no examples or not one prediction a target.
    """

    @functools.wraps(statistics)
    def checked(targets: Sequence[Any], predictions: Sequence[Any]) -> Statistics:
        check_pairs(targets, predictions)
        return statistics(targets, predictions)

    @functools.wraps(statistics)
    def metric(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        found = checked(targets, predictions)
        return {name: float(value) for name, value in found.score(found.rows.sum(0)).items()}

    metric.statistics = checked  # type: ignore[attr-defined]
    return metric  # type: ignore[return-value]


def percentages(names: Sequence[str], rows: Sequence[Sequence[float]]) -> Statistics:
    """Means over examples of `rows` [examples, names], each in [0, 1], in percent."""
    table: np.ndarray = np.ones((len(rows), len(names) + 1))  # the last column counts
    table[:, :-1] = rows

    def score(total: np.ndarray) -> dict[str, float]:
        return dict(zip(names, (100.0 * total[:-1] / total[-1]).tolist(), strict=True))

    return Statistics(table, score)


def check_pairs(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
    """Raises InputError unless there is one prediction a target, and at least one."""
    if len(targets) != len(predictions):
        raise InputError(
            f"a metric got {len(targets)} targets and {len(predictions)} predictions; "
            "expected one prediction for each target"
        )
    if not len(targets):
        raise InputError("a metric got no examples: is the evaluation split empty?")
