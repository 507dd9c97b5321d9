"""Scores of predicted labels, tags and numbers: accuracy, F1, Matthews, correlations, entities.

Accuracy, F1 and entities' scores are in percent, as texts' are; correlations are in [-1, 1]. What
a confusion matrix tells is computed by scikit-learn, correlations by scipy, and what is an entity
is decided by seqeval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from t5x_lite.evaluation.additive import Statistics, additive, check_pairs, percentages
from t5x_lite.evaluation.metrics import require
from t5x_lite.types import InputError


@additive
def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> Statistics:
    """`accuracy`: the percentage of predictions equal to their target."""
    hits = [[t == p] for t, p in zip(targets, predictions, strict=True)]
    return percentages(["accuracy"], hits)


@dataclass(frozen=True)
class F1:
    """`f1`: of one label ("binary"), or over all labels ("macro", "micro"), in percent.

    Macro is the mean of all labels' own F1 (of those that occur), micro that of all decisions: for
    single labels that is accuracy.
    """

    average: Literal["binary", "macro", "micro"] = "macro"
    positive: str | None = None  # the label of "binary"

    def __post_init__(self) -> None:
        if self.average not in ("binary", "macro", "micro"):
            raise InputError(f"F1.average='{self.average}': expected binary, macro or micro")
        if (self.average == "binary") != (self.positive is not None):
            raise InputError(
                f"F1(average='{self.average}', positive={self.positive!r}): a positive label goes "
                "with average='binary', and with nothing else"
            )

    def __call__(self, targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        return _of_sums(self.statistics(targets, predictions))

    def statistics(self, targets: Sequence[Any], predictions: Sequence[Any]) -> Statistics:
        """Counts of (target, prediction), and the score of them: see `additive`."""
        sklearn = require("sklearn.metrics", "F1 scores")
        positive = self.positive

        def score(truth: list, found: list, counts: np.ndarray) -> dict[str, float]:
            if self.average == "binary":
                truth, found = ([label == positive for label in x] for x in (truth, found))
            value = sklearn.f1_score(
                truth, found, sample_weight=counts, average=self.average, zero_division=0.0
            )
            return {"f1": 100.0 * value}

        return _confusion(targets, predictions, score)


@additive
def matthews(targets: Sequence[Any], predictions: Sequence[Any]) -> Statistics:
    """`matthews`: the correlation of predicted and true labels, of two or more; CoLA's score."""
    sklearn = require("sklearn.metrics", "Matthews correlations")

    def score(truth: list, found: list, counts: np.ndarray) -> dict[str, float]:
        return {"matthews": sklearn.matthews_corrcoef(truth, found, sample_weight=counts)}

    return _confusion(targets, predictions, score)


def pearson(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """`pearson`: the linear correlation; not a number where either side is constant."""
    return {"pearson": _correlation("pearsonr", targets, predictions)}


def spearman(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """`spearman`: the correlation of ranks; not a number where either side is constant."""
    return {"spearman": _correlation("spearmanr", targets, predictions)}


@additive
def entities(targets: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> Statistics:
    """`f1`, `precision` and `recall` of entities, in percent: conlleval's, by seqeval.

    Tags are "O", "B-kind" and "I-kind". An entity counts as found if its kind, its first and its
    last word are right; sums are over all sentences (micro).
    """
    entities_of = require("seqeval.metrics.sequence_labeling", "Entity scores").get_entities
    rows = []
    for target, prediction in zip(targets, predictions, strict=True):
        if len(target) != len(prediction):
            raise InputError(
                f"a sentence of {len(target)} tags got {len(prediction)} predicted: expected one "
                "for each word"
            )
        truth, found = set(entities_of(list(target))), set(entities_of(list(prediction)))
        rows.append([len(truth & found), len(truth), len(found)])

    def score(total: np.ndarray) -> dict[str, float]:
        both, wanted, made = total.tolist()
        return {
            "f1": 200.0 * both / max(wanted + made, 1.0),
            "precision": 100.0 * both / max(made, 1.0),
            "recall": 100.0 * both / max(wanted, 1.0),
        }

    return Statistics(np.array(rows, np.float64), score)


def _confusion(
    targets: Sequence[Any],
    predictions: Sequence[Any],
    score: Callable[[list, list, np.ndarray], dict[str, float]],
) -> Statistics:
    """Each example's place among the pairs that occur, and a score of the pairs' counts."""
    check_pairs(targets, predictions)
    pairs = sorted(set(zip(targets, predictions, strict=True)))
    place = {pair: i for i, pair in enumerate(pairs)}
    rows: np.ndarray = np.zeros((len(targets), len(pairs)))
    rows[np.arange(len(rows)), [place[p] for p in zip(targets, predictions, strict=True)]] = 1
    truth, found = ([pair[side] for pair in pairs] for side in (0, 1))

    def of_counts(total: np.ndarray) -> dict[str, float]:
        some = total > 0  # a label that a resample lacks is none of its labels
        kept = np.flatnonzero(some).tolist()
        return score([truth[i] for i in kept], [found[i] for i in kept], total[some])

    return Statistics(rows, of_counts)


def _of_sums(found: Statistics) -> dict[str, float]:
    return {name: float(value) for name, value in found.score(found.rows.sum(0)).items()}


def _correlation(name: str, targets: Sequence[float], predictions: Sequence[float]) -> float:
    check_pairs(targets, predictions)
    stats = require("scipy.stats", "Correlations")
    x, y = (np.asarray(side, np.float64) for side in (targets, predictions))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(getattr(stats, name)(x, y).statistic)
