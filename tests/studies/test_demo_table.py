"""The demo's table: scores with their intervals, and what is a difference and what is not."""

from __future__ import annotations

import re

import pytest

from t5x_lite.studies import demo

COUNT = 40


def records(prediction):
    return [
        {
            "inputs": f"And it came to pass that word {i} was",
            "targets": f"It came about that word {i} is",
            "prediction": prediction(i),
        }
        for i in range(COUNT)
    ]


@pytest.fixture(scope="module")
def predictions():
    right, wrong = (lambda i: f"It came about that word {i} is"), (lambda i: "nothing of it")
    return {
        demo.TUNED["lora"]: records(right),
        demo.TUNED["full"]: records(right),
        demo.TUNED["lora_random"]: records(wrong),
    }


def test_scores_have_intervals(predictions):
    row = demo.copy_row(predictions[demo.TUNED["lora"]])
    for name in ("chrf", "bleu"):
        low, value, high = (row.scores[name + end] for end in ("_low", "", "_high"))
        assert low <= value <= high
        assert 0 < value < 100
    shown = demo._with_interval({"x": 1.25, "x_low": 0.96, "x_high": 2.0}, "x")
    assert shown == "1.2 (1.0 to 2.0)"


def test_differences_are_paired(predictions):
    lines = demo.differences(predictions)
    numbers = [[float(n) for n in re.findall(r"[+-]\d+\.\d", line)] for line in lines]
    (pretraining, full, copying) = numbers
    assert pretraining[1] > 50
    assert full == [0.0, 0.0, 0.0]
    assert 0 < copying[1] <= copying[0] <= copying[2]
    assert lines[0].startswith("chrF of LoRA from pretrained - LoRA from random weights: +")
