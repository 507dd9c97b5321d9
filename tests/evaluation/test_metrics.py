"""Text metrics: worked values, limits, order of arguments, and clear errors."""

import sys

import pytest

from t5x_lite.evaluation.metrics import bleu, chrf, exact_match
from t5x_lite.types import InputError

TARGETS = ["In the beginning God created the heaven and the earth.", "And God said, Let there be."]
OTHERS = ["At the first God made the heaven and the earth.", "And God said, Let there be light."]


def test_exact_match_counts_equal_texts():
    assert exact_match(["a", "b", "c", "d"], ["a", "b ", "C", "d"]) == {"exact_match": 50.0}


@pytest.mark.parametrize("metric", [exact_match, bleu, chrf])
def test_a_perfect_prediction_is_100(metric):
    (value,) = metric(TARGETS, TARGETS).values()
    assert value == pytest.approx(100.0)
    assert isinstance(value, float)


@pytest.mark.parametrize("metric", [exact_match, bleu, chrf])
def test_nothing_in_common_is_0(metric):
    (value,) = metric(["aaa bbb ccc ddd eee"], ["xyz uvw rst opq lmn"]).values()
    assert value == pytest.approx(0.0, abs=1e-9)


def test_bleu_by_hand():
    # 4-grams up to order 4 all match; only the brevity penalty exp(1 - 6/5) is left.
    value = bleu(["one two three four five six"], ["one two three four five"])["bleu"]
    assert value == pytest.approx(100 * 2.718281828 ** (1 - 6 / 5), rel=1e-5)


def test_targets_come_first():
    # BLEU punishes short predictions: exchanging the arguments takes that penalty away.
    short, long = ["one two three four five"], ["one two three four five six"]
    assert bleu(long, short)["bleu"] != pytest.approx(bleu(short, long)["bleu"], rel=1e-3)
    # chrF2 weighs recall twice, so a prediction that says less scores lower.
    assert chrf(long, short)["chrf"] < chrf(short, long)["chrf"]


def test_closer_is_higher():
    for metric in (bleu, chrf):
        near, far = (metric(TARGETS, p) for p in (OTHERS, OTHERS[::-1]))
        assert next(iter(near.values())) > next(iter(far.values()))


@pytest.mark.parametrize("metric", [exact_match, bleu, chrf])
def test_bad_input_is_named(metric):
    with pytest.raises(InputError, match="2 targets and 1 predictions"):
        metric(TARGETS, OTHERS[:1])
    with pytest.raises(InputError, match="no examples"):
        metric([], [])


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_missing_sacrebleu_is_named(metric, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # import raises ImportError
    with pytest.raises(InputError, match=r"pip install t5x_lite\[eval\]"):
        metric(TARGETS, OTHERS)
