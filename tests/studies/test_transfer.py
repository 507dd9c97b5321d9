"""Points by examples over seeds, differences seed by seed; and a whole study of a tiny model."""

from __future__ import annotations

import json

import pytest

from t5x_lite.data.pipeline import Batches, EvaluationBatches
from t5x_lite.studies import transfer
from t5x_lite.studies.trials import Found, Method, Recipe, Trial
from t5x_lite.train.evaluate import TeacherForced
from t5x_lite.train.optim import AdamW
from t5x_lite.train.schedules import FactorSchedule
from t5x_lite.types import InputError
from tests.train import harness
from tests.train.harness import tiny_task


def found(method, examples, seed, score):
    trial = Trial(method=method, steps=4, seed=seed, examples=examples)
    return Found(trial, {0: {"test/loss": 9.0}, 4: {"test/accuracy": score}}, 10, 2.0, 3.0)


FOUND = [
    found(method, examples, seed, base + 10 * (examples == 100) + seed)
    for seed in (0, 1, 2)
    for examples in (10, 100)
    for method, base in (("LoRA", 70.0), ("random", 50.0 if seed else 49.0))
]


def test_points_are_over_seeds_and_differences_seed_by_seed():
    points = transfer.summarise(FOUND, "test/accuracy")
    assert [(p.method, p.examples, p.values) for p in points] == [
        ("LoRA", 10, (70.0, 71.0, 72.0)),
        ("random", 10, (49.0, 51.0, 52.0)),
        ("LoRA", 100, (80.0, 81.0, 82.0)),
        ("random", 100, (59.0, 61.0, 62.0)),
    ]
    apart = transfer.differences(points)
    assert [(other, n) for other, n, _ in apart] == [("random", 10), ("random", 100)]
    assert apart[0][2].mean == pytest.approx((21 + 20 + 20) / 3)
    assert apart[0][2].high - apart[0][2].low < 3  # the seeds' own spread is no part of it
    scores, minus, cost = transfer.tables(points, "test/accuracy")
    assert scores.rows[0] == ["10", "71.0 (68.5 to 73.5)", "50.7 (46.9 to 54.5)"]
    assert minus.rows[1][1].startswith("20.3 (")
    assert cost.rows[0] == ["LoRA", "10", "10", "4", "2.0", "3.0"]
    assert scores.markdown().splitlines()[0] == "| examples | LoRA | random |"


def test_a_metric_that_was_not_measured_is_an_error():
    with pytest.raises(InputError, match="has no 'test/f1'; it measured: test/accuracy"):
        transfer.summarise(FOUND, "test/f1")


def recipe(folder):
    task = tiny_task(folder)
    held = EvaluationBatches(task, batch_size=8, limit=8)
    schedule = FactorSchedule("constant * linear_decay", base_learning_rate=1.0, total_steps=9)
    return Recipe(
        model=harness.MODEL,
        batches=Batches(task, batch_size=8),
        optimizer=AdamW(schedule),
        evaluations=[TeacherForced(name="test", batches=held)],
        partitioner=harness.one_device(),
    )


def test_what_cannot_be_measured_is_refused_before_training(tmp_path):
    given = {
        "output": str(tmp_path),
        "recipe": recipe(tmp_path),
        "methods": {"a": Method(learning_rate=1.0)},
    }
    with pytest.raises(InputError, match="'valid/loss' is of no evaluation; there are: test"):
        transfer.study_pretraining(**given, budgets={10: 2}, metric="valid/loss")
    with pytest.raises(InputError, match="has 120 records: draw fewer"):
        transfer.study_pretraining(**given, budgets={10: 2, 500: 2}, metric="test/loss")


@pytest.mark.slow
def test_a_study_of_a_tiny_model_runs(tmp_path):
    points = transfer.study_pretraining(
        output=str(tmp_path / "study"),
        recipe=recipe(tmp_path),
        methods={"fast": Method(learning_rate=0.01), "not at all": Method(learning_rate=0.0)},
        budgets={20: 3},
        metric="test/loss",
        seeds=(0,),
    )
    fast, still = points
    assert fast.spread.mean < still.spread.mean
    record = json.loads((tmp_path / "study" / "transfer.json").read_text())
    assert [p["method"] for p in record["points"]] == ["fast", "not at all"]
    assert record["differences"][0]["mean"] < 0
    assert record["differences"][0]["low"] is None  # of one seed
    assert "<svg" in (tmp_path / "study" / "transfer.html").read_text()
    assert "fast minus" in (tmp_path / "study" / "transfer.md").read_text()
