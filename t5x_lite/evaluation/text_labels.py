"""Metrics of labels, of labels said as text: what a text-to-text model writes instead.

A metric of labels counts names or numbers, and knows nothing of other texts; these two say what an
answer counts as that is none, as T5 does (Raffel et al. 2020, section 2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from t5x_lite.evaluation.additive import Statistics

Metric = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]


class _Reading:
    """A metric of what is read from texts."""

    metric: Metric

    def read(
        self, targets: Sequence[str], predictions: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        raise NotImplementedError

    def __call__(self, targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        return self.metric(*self.read(targets, predictions))

    @property
    def statistics(self) -> Callable[[Sequence[str], Sequence[str]], Statistics]:
        inner = self.metric.statistics  # type: ignore[attr-defined]  # AttributeError: has none
        return lambda targets, predictions: inner(*self.read(targets, predictions))


@dataclass(frozen=True, kw_only=True)
class Among(_Reading):
    """The metric of the labels' names; a prediction that is none of them counts as a wrong one."""

    metric: Metric
    labels: Sequence[str]

    def read(
        self, targets: Sequence[str], predictions: Sequence[str]
    ) -> tuple[list[str], list[str]]:
        names = set(self.labels)
        read = []
        for target, prediction in zip(targets, predictions, strict=True):
            text = prediction.strip()
            wrong = self.labels[0] if target != self.labels[0] else self.labels[1]
            read.append(text if text in names else wrong)
        return list(targets), read


@dataclass(frozen=True, kw_only=True)
class OfNumbers(_Reading):
    """The metric of the numbers that the texts are; a text that is none counts as `otherwise`."""

    metric: Metric
    otherwise: float = -1.0

    def read(
        self, targets: Sequence[str], predictions: Sequence[str]
    ) -> tuple[list[float], list[float]]:
        return [float(text) for text in targets], [self._number(text) for text in predictions]

    def _number(self, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            return self.otherwise
        return number if abs(number) < float("inf") else self.otherwise  # nan too
