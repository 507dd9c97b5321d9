"""Bootstrap intervals: of the right width, the same whichever way a metric is resampled."""

from __future__ import annotations

import math

import numpy as np
import pytest

from t5x_lite.evaluation.bootstrap import (
    bootstrap,
    bootstrap_difference,
    measure_all,
    with_intervals,
)
from t5x_lite.evaluation.metrics import bleu, chrf, exact_match
from t5x_lite.types import InputError

WORDS = ["in", "the", "beginning", "God", "created", "heaven", "and", "earth", "it", "was", "good"]


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 12))) for _ in range(count)]


def closer(targets: list[str], every: int) -> list[str]:
    """Predictions of which one in `every` is right."""
    others = texts(len(targets), 9)
    return [targets[i] if i % every == 0 else others[i] for i in range(len(targets))]


def test_a_share_has_the_binomial_interval():
    # 400 examples, 60% right: the standard error is sqrt(.6 x .4 / 400) = 2.449 points.
    targets = ["a"] * 400
    predictions = ["a"] * 240 + ["b"] * 160
    (low, high) = bootstrap(exact_match, targets, predictions)["exact_match"]
    error = 100 * math.sqrt(0.6 * 0.4 / 400)
    assert low == pytest.approx(60 - 1.96 * error, abs=0.6)
    assert high == pytest.approx(60 + 1.96 * error, abs=0.6)
    narrow = bootstrap(exact_match, targets, predictions, level=0.5)["exact_match"]
    assert low < narrow[0] < 60 < narrow[1] < high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        right = rng.random(80) < 0.7
        predictions = ["a" if hit else "b" for hit in right]
        low, high = bootstrap(exact_match, ["a"] * 80, predictions, samples=200)["exact_match"]
        inside += low <= 70 <= high
    assert 0.88 * 200 <= inside <= 200


@pytest.mark.parametrize("metric", [exact_match, bleu, chrf])
def test_statistics_give_what_scoring_the_resamples_gives(metric):
    targets = texts(30, 0)
    predictions = closer(targets, 3)
    plain = lambda t, p: metric(t, p)  # has no statistics: called once a resample
    fast = bootstrap(metric, targets, predictions, samples=40)
    slow = bootstrap(plain, targets, predictions, samples=40)
    assert fast.keys() == slow.keys()
    for name in fast:
        np.testing.assert_allclose(fast[name], slow[name], rtol=1e-9)
        assert fast[name][0] < metric(targets, predictions)[name] < fast[name][1]


def test_scores_stand_between_their_limits():
    targets = texts(30, 0)
    predictions = closer(targets, 3)
    found = with_intervals(chrf, targets, predictions, samples=30)
    (interval,) = bootstrap(chrf, targets, predictions, samples=30).values()
    assert found == {
        **chrf(targets, predictions),
        "chrf_low": interval[0],
        "chrf_high": interval[1],
    }


def test_the_seed_alone_decides():
    targets = texts(30, 0)
    predictions = closer(targets, 2)
    one, same = (bootstrap(chrf, targets, predictions, samples=50) for _ in range(2))
    other = bootstrap(chrf, targets, predictions, samples=50, seed=1)
    assert one == same != other


def test_a_difference_is_known_better_than_either_score():
    targets = texts(60, 0)
    better, worse = closer(targets, 2), closer(targets, 4)  # right wherever the other is, and more
    (low, high) = bootstrap_difference(chrf, targets, better, worse, samples=200)["chrf"]
    assert 0 < low < chrf(targets, better)["chrf"] - chrf(targets, worse)["chrf"] < high
    one, two = (bootstrap(chrf, targets, p, samples=200)["chrf"] for p in (better, worse))
    assert high - low < (one[1] - one[0]) + (two[1] - two[0])
    same = bootstrap_difference(chrf, targets, better, better, samples=20)["chrf"]
    assert same == (0.0, 0.0)


def test_resamples_without_a_value_are_left_out():
    def ratio(targets, predictions):
        hits = sum(targets)
        return {"ratio": sum(predictions) / hits if hits else float("nan")}

    found = bootstrap(ratio, [0, 0, 1], [1, 1, 1], samples=100)["ratio"]
    assert not np.isnan(found).any()
    assert np.isnan(bootstrap(ratio, [0, 0], [1, 1], samples=5)["ratio"]).all()


def test_what_cannot_be_resampled_is_named():
    with pytest.raises(InputError, match="2 targets and 1 predictions"):
        bootstrap(exact_match, ["a", "b"], ["a"])
    with pytest.raises(InputError, match="no examples"):
        bootstrap(exact_match, [], [])
    with pytest.raises(InputError, match=r"level=95.* such as 0\.95"):
        bootstrap(exact_match, ["a"], ["a"], level=95)
    with pytest.raises(InputError, match="samples=0"):
        bootstrap(exact_match, ["a"], ["a"], samples=0)


def test_two_metrics_of_one_name_are_refused():
    def share(targets, predictions):
        return {"share": 1.0}

    assert measure_all([share], ["a"], ["a"], 0) == {"share": 1.0}
    with pytest.raises(InputError, match="two of the task's metrics give 'share'"):
        measure_all([share, share], ["a"], ["a"], 0)
