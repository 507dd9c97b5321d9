"""What is compared is compared at equal task loss; and a whole study of a tiny model."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from t5x_lite.data.objectives import TextToText
from t5x_lite.data.pipeline import Batches, EvaluationBatches
from t5x_lite.data.preprocessors import Template
from t5x_lite.evaluation.metrics import chrf
from t5x_lite.peft.lora import LoRA
from t5x_lite.studies import forgetting
from t5x_lite.studies.forgetting import Measures, at_level, front, study_forgetting
from t5x_lite.studies.spread import spread
from t5x_lite.studies.trials import Found, Method, Recipe, Trial
from t5x_lite.train import loop
from t5x_lite.train.evaluate import Generate, TeacherForced
from t5x_lite.train.optim import AdamW
from t5x_lite.train.run import RunCheckpoint
from t5x_lite.train.schedules import FactorSchedule
from t5x_lite.types import InputError
from tests.train import harness


def test_the_front_is_what_no_other_point_beats():
    assert front([(1, 5), (2, 3), (3, 4), (4, 1)]) == [0, 1, 3]
    assert front([(2, 2), (2, 1), (1, 3), (2, 1)]) == [2, 1]  # of equals the first
    points = [(math.sin(7 * i), math.cos(5 * i)) for i in range(40)]
    kept = set(front(points))
    for index, (a, b) in enumerate(points):
        beaten = any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)
        assert (index in kept) != beaten


def test_what_is_kept_at_a_level_lies_between_points():
    curve = [(5.0, 4.2), (4.0, 4.6), (4.4, 4.9), (3.0, 5.0)]
    assert at_level(curve, 4.5) == pytest.approx(4.4)
    assert at_level(curve, 4.0) == 4.6  # the first time
    assert at_level(curve, 5.5) == 4.2
    assert at_level(curve, 2.9) is None


def found(method, seed, *points):
    scores = {
        step: {"test/loss": task, "pretraining/loss": kept}
        for step, (task, kept) in enumerate(points)
    }
    scores[len(points) - 1]["generate/chrf"] = 20.0 + seed
    trial = Trial(method=method, steps=2, seed=seed)
    return Found(trial, scores, 100, 1.0, 1.5, {"zero_shot/accuracy": 40.0 + seed})


def test_a_row_has_its_spread_and_says_what_was_not_reached():
    runs = [
        found("LoRA", 0, (5.0, 4.0), (4.0, 4.4)),
        found("LoRA", 1, (5.0, 4.0), (3.8, 4.6)),
    ]
    method = Method(learning_rate=0.01)
    row = forgetting.summarise("LoRA", method, runs, Measures(), 4.5)
    assert row.task_loss == spread([4.0, 3.8])
    assert row.kept_at_level.mean == pytest.approx((4.2 + 4.25) / 2)
    assert row.zero_shot.mean == 40.5
    assert forgetting.summarise("LoRA", method, runs, Measures(), 3.9).kept_at_level is None
    before = {"test/loss": 5.0, "pretraining/loss": 4.0, "generate/chrf": 3.0}
    made = forgetting.table([row], before, Measures(), 4.5)
    assert made.rows[0][:6] == ("before", "", "", "5.000", "3.0", "4.000")
    assert made.rows[1][:2] == ("LoRA", "100")
    assert made.rows[1][3].startswith("3.900 ± 1.2")  # t(1) = 12.7


@pytest.fixture
def recipe(tmp_path):
    task = dataclasses.replace(harness.tiny_task(tmp_path), chunk=None)
    pairs = dataclasses.replace(
        task,
        name="pairs",
        objective=TextToText(task.vocabulary),
        lengths={"encoder": 32, "decoder": 16},
        preprocessors=[Template({"inputs": "{text}", "targets": "{text}"})],
        metrics=[chrf],
    )

    def held(given):
        return EvaluationBatches(given, batch_size=8, limit=8)

    return Recipe(
        model=dataclasses.replace(
            harness.MODEL,
            encoder=dataclasses.replace(harness.STACK, num_layers=1),
            decoder=dataclasses.replace(harness.STACK, num_layers=1),
        ),
        batches=Batches(pairs, batch_size=8),
        optimizer=AdamW(
            FactorSchedule("constant * linear_decay", base_learning_rate=1.0, total_steps=9)
        ),
        evaluations=[
            TeacherForced(name="test", batches=held(pairs)),
            TeacherForced(name="pretraining", batches=held(task)),
            Generate(name="generate", batches=held(pairs), max_tokens=4, resamples=0),
        ],
        partitioner=harness.one_device(),
    )


@pytest.mark.slow
def test_a_study_of_a_tiny_model_runs_and_is_not_done_twice(tmp_path, recipe, monkeypatch):
    task = recipe.evaluations[1].batches.task
    loop.train(
        model_dir=str(tmp_path / "base"),
        model=recipe.model,
        batches=Batches(task, batch_size=8),
        optimizer=AdamW(0.01),
        total_steps=2,
        partitioner=recipe.partitioner,
    )
    methods = {
        "full": Method(learning_rate=0.01),
        "LoRA": Method(learning_rate=0.01, transform=LoRA(rank=2)),
    }

    def study():
        return study_forgetting(
            output=str(tmp_path / "study"),
            recipe=recipe,
            base=RunCheckpoint(str(tmp_path / "base")),
            methods=methods,
            steps=4,
            eval_period=2,
            seeds=(0,),
        )

    rows = study()
    assert [row.method for row in rows] == ["full", "LoRA"]
    assert rows[0].trained > rows[1].trained
    record = json.loads((tmp_path / "study" / "forgetting.json").read_text())
    for run in record["runs"]:
        # All start from one model.
        assert run["scores"]["0"]["pretraining/loss"] == pytest.approx(
            record["before"]["pretraining/loss"], rel=1e-5
        )
        assert list(run["scores"]) == ["0", "2", "4"]
    page = (tmp_path / "study" / "forgetting.html").read_text()
    assert "<svg" in page
    assert "LoRA" in page
    assert not re.search(
        r"src=|<link|url\([^#]|href=.http", page
    )  # asks for nothing from elsewhere
    assert (tmp_path / "study" / "forgetting.png").stat().st_size > 10_000
    monkeypatch.setattr("t5x_lite.studies.trials.train", None)
    assert study() == rows


def test_a_measure_of_no_evaluation_is_an_error(recipe):
    with pytest.raises(InputError, match="'kept', which the recipe lacks; it has: generate, pre"):
        study_forgetting(
            output="nowhere",
            recipe=recipe,
            base=RunCheckpoint("nowhere"),
            methods={"full": Method(learning_rate=1.0)},
            steps=2,
            eval_period=1,
            measures=Measures(kept_loss="kept/loss"),
        )
