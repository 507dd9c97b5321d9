"""Scores of labels, tags and numbers by hand, and on resamples as on sets of their own."""

import math

import numpy as np
import pytest

from t5x_lite.evaluation import label_metrics as metrics
from t5x_lite.evaluation.bootstrap import bootstrap, with_intervals
from t5x_lite.types import InputError

TRUTH = ["a", "a", "a", "b", "b", "c"]
FOUND = ["a", "a", "b", "b", "c", "c"]


def test_scores_by_hand():
    assert metrics.accuracy(TRUTH, FOUND) == pytest.approx({"accuracy": 100 * 4 / 6})
    by_label = {"a": 2 * 2 / (3 + 2), "b": 2 * 1 / (2 + 2), "c": 2 * 1 / (1 + 2)}
    assert metrics.F1()(TRUTH, FOUND)["f1"] == pytest.approx(100 * sum(by_label.values()) / 3)
    assert metrics.F1("micro")(TRUTH, FOUND)["f1"] == pytest.approx(100 * 4 / 6)
    for label, value in by_label.items():
        found = metrics.F1("binary", positive=label)(TRUTH, FOUND)
        assert found["f1"] == pytest.approx(100 * value)
    # Two labels: tp 2, fn 1, fp 1, tn 2.
    truth, found = ["y", "y", "y", "n", "n", "n"], ["y", "y", "n", "y", "n", "n"]
    assert metrics.matthews(truth, found)["matthews"] == pytest.approx((2 * 2 - 1) / 9)
    assert metrics.matthews(["y", "n"], ["y", "y"])["matthews"] == 0.0
    assert metrics.F1("binary", positive="y")(["n"], ["n"])["f1"] == 0.0


def test_correlations_by_hand():
    x = [1.0, 2.0, 3.0, 4.0]
    assert metrics.pearson(x, [2.0, 4.0, 6.0, 8.0])["pearson"] == pytest.approx(1.0)
    assert metrics.pearson(x, [1.0, 4.0, 9.0, 16.0])["pearson"] < 1.0
    assert metrics.spearman(x, [1.0, 4.0, 9.0, 16.0])["spearman"] == pytest.approx(1.0)
    assert metrics.spearman(x, [-1.0, -2.0, -3.0, -4.0])["spearman"] == pytest.approx(-1.0)
    assert math.isnan(metrics.pearson(x, [1.0] * 4)["pearson"])
    found = with_intervals(metrics.pearson, x * 20, [1.0, 2.0, 4.0, 3.0] * 20, samples=50)
    assert found["pearson_low"] < found["pearson"] < found["pearson_high"]


def test_an_entity_counts_whole():
    truth = [["B-x", "I-x", "O", "B-y"], ["O", "O"], ["B-x", "B-x"]]
    found = [["B-x", "I-x", "O", "B-x"], ["O", "B-y"], ["B-x", "I-x"]]
    # True: (x 0-1), (y 3), (x 0), (x 1). Found: (x 0-1), (x 3), (y 1), (x 0-1). One agrees.
    expected = {"f1": 25.0, "precision": 25.0, "recall": 25.0}
    assert metrics.entities(truth, found) == pytest.approx(expected)
    assert metrics.entities(truth, truth)["f1"] == 100.0
    assert metrics.entities([["O"]], [["O"]])["f1"] == 0.0
    with pytest.raises(InputError, match="a sentence of 2 tags got 1 predicted"):
        metrics.entities([["O", "O"]], [["O"]])


@pytest.mark.parametrize(
    "metric",
    [metrics.accuracy, metrics.F1(), metrics.F1("binary", positive="b"), metrics.matthews],
    ids=["accuracy", "macro", "binary", "matthews"],
)
def test_resampled_sums_score_as_the_resampled_set(metric):
    rng = np.random.default_rng(0)
    rows, score = metric.statistics(TRUTH, FOUND)
    for _ in range(20):
        drawn = rng.integers(0, len(TRUTH), len(TRUTH)).tolist()
        sums = score(np.bincount(drawn, minlength=len(TRUTH)) @ rows)
        assert sums == pytest.approx(metric([TRUTH[i] for i in drawn], [FOUND[i] for i in drawn]))
    ((low, high),) = bootstrap(metric, TRUTH, FOUND, samples=30).values()
    assert low <= high


def test_what_can_not_be_scored():
    for settings in ({"average": "mean"}, {"average": "binary"}, {"positive": "a"}):
        with pytest.raises(InputError, match="F1"):
            metrics.F1(**settings)
    for metric in (metrics.accuracy, metrics.F1(), metrics.pearson, metrics.entities):
        with pytest.raises(InputError, match="1 targets and 0 predictions"):
            metric(["a"], [])
