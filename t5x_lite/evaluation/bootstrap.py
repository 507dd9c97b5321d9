"""Confidence intervals of metrics by resampling an evaluation set's examples.

The percentile bootstrap (Efron 1979): the set is drawn again, with replacement, as many examples as
it has, and scored again, a thousand times; the interval holds the middle 95% of the scores. It says
how much of a score is owed to the choice of examples. It says nothing of other seeds of training.

    >>> bootstrap(exact_match, ["a"] * 100, ["a"] * 80 + ["b"] * 20)
    {'exact_match': (72.0, 88.0)}

Corpus metrics are scored again as corpus metrics, never as means over sentences. The resamples are
a function of (seed, number of examples) alone, so that intervals of systems compare. (A metric of
groups of examples, such as `several_answers`, has its groups drawn.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from t5x_lite.evaluation.additive import check_pairs
from t5x_lite.types import InputError

Metric = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
Intervals = dict[str, tuple[float, float]]


def bootstrap(
    metric: Metric,
    targets: Sequence[Any],
    predictions: Sequence[Any],
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Intervals:
    """`{name: (low, high)}` for each of the metric's values.

    Metrics with `statistics` (see `additive`) take seconds for thousands of texts; any other is
    called once a resample. A value that is not a number on a resample (a correlation with equal
    targets) is left out of the interval.

    Args:
      metric: `(targets, predictions) -> {name: value}`.
      targets, predictions: one of each an example.
      samples: resamples.
      seed: of the resamples.
      level: the share of resamples' scores inside.

    Raises:
      InputError: no examples, not one prediction a target, `samples` or `level` out of range.
    """
    return _measure(metric, targets, predictions, samples, seed, level)[1]


def with_intervals(
    metric: Metric,
    targets: Sequence[Any],
    predictions: Sequence[Any],
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, float]:
    """The metric's values, each with its `<name>_low` and `<name>_high`: see `bootstrap`."""
    values, intervals = _measure(metric, targets, predictions, samples, seed, level)
    found: dict[str, float] = {}
    for name, value in values.items():
        low, high = intervals[name]
        found |= {name: float(value), f"{name}_low": low, f"{name}_high": high}
    return found


def measure_all(
    metrics: Sequence[Metric], targets: Sequence[Any], predictions: Sequence[Any], samples: int
) -> dict[str, float]:
    """All metrics' values, with intervals if `samples` is not 0. InputError: two of one name."""
    scores: dict[str, float] = {}
    for metric in metrics:
        if samples:
            found = with_intervals(metric, targets, predictions, samples=samples)
        else:
            found = metric(targets, predictions)
        if twice := scores.keys() & found.keys():
            raise InputError(
                f"two of the task's metrics give '{min(twice)}': keep one of them, or put the "
                "other in a task of its own"
            )
        scores |= found
    return scores


def bootstrap_difference(
    metric: Metric,
    targets: Sequence[Any],
    predictions: Sequence[Any],
    others: Sequence[Any],
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Intervals:
    """Intervals of metric(predictions) - metric(others), both on the same resamples.

    The paired bootstrap (Koehn 2004): two systems' scores rise and fall together with the choice of
    examples, so that their difference is known better than either. An interval without 0 says that
    the difference is not owed to that choice.
    """
    check_pairs(targets, predictions)
    check_pairs(targets, others)
    (score, size), (other, _) = (_scorer(metric, targets, t) for t in (predictions, others))
    drawn = []
    for indices in _resamples(size, samples, seed, level):
        one, two = score(indices), other(indices)
        drawn.append({name: one[name] - two[name] for name in one})
    return _percentiles(drawn, level)


def _measure(
    metric: Metric,
    targets: Sequence[Any],
    predictions: Sequence[Any],
    samples: int,
    seed: int,
    level: float,
) -> tuple[dict[str, float], Intervals]:
    check_pairs(targets, predictions)
    score, size = _scorer(metric, targets, predictions)
    drawn = [score(indices) for indices in _resamples(size, samples, seed, level)]
    return score(np.arange(size)), _percentiles(drawn, level)


def _scorer(
    metric: Metric, targets: Sequence[Any], predictions: Sequence[Any]
) -> tuple[Callable[[np.ndarray], dict[str, float]], int]:
    """(indices -> the metric's values on those examples, how many there are to draw from)."""
    statistics = getattr(metric, "statistics", None)
    if statistics is None:

        def again(indices: np.ndarray) -> dict[str, float]:
            return metric([targets[i] for i in indices], [predictions[i] for i in indices])

        return again, len(targets)
    rows, score = statistics(targets, predictions)
    return lambda indices: score(np.bincount(indices, minlength=len(rows)) @ rows), len(rows)


def _resamples(size: int, samples: int, seed: int, level: float) -> Iterator[np.ndarray]:
    if samples < 1 or not 0.0 < level < 1.0:
        raise InputError(
            f"bootstrap(samples={samples}, level={level}): expected 1 or more samples, and a level "
            "between 0 and 1, such as 0.95"
        )
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        yield rng.integers(0, size, size)


def _percentiles(drawn: Sequence[dict[str, float]], level: float) -> Intervals:
    tail = (1.0 - level) / 2
    found: Intervals = {}
    for name in drawn[0]:
        values: np.ndarray = np.array([one[name] for one in drawn], np.float64)
        values = values[~np.isnan(values)]
        low, high = np.quantile(values, [tail, 1 - tail]) if len(values) else (np.nan, np.nan)
        found[name] = (float(low), float(high))
    return found
