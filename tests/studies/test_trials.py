"""A study's runs are done once each, on the examples and at the rate that they are to have."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from t5x_lite.data.pipeline import Batches, EvaluationBatches
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Full
from t5x_lite.studies import trials
from t5x_lite.studies.trials import Method, Recipe, Trial, run_all
from t5x_lite.train.evaluate import TeacherForced
from t5x_lite.train.optim import AdamW
from t5x_lite.train.schedules import FactorSchedule
from t5x_lite.types import InputError
from tests.train import harness

METHODS = {
    "Full, fast": Method(learning_rate=0.5),
    "LoRA": Method(learning_rate=0.1, transform=LoRA()),
}


def recipe(folder: Path) -> Recipe:
    task = dataclasses.replace(harness.tiny_task(folder), chunk=None)
    schedule = FactorSchedule("constant * linear_decay", base_learning_rate=1.0, total_steps=99)
    return Recipe(
        model=harness.MODEL,
        batches=Batches(task, batch_size=4),
        optimizer=AdamW(schedule, rate_rules=((".*", 2.0),)),
        evaluations=[TeacherForced(name="held", batches=EvaluationBatches(task, batch_size=4))],
    )


@pytest.fixture
def trained(monkeypatch):
    """Calls of `train`, in whose place a stand-in writes what a run leaves behind."""
    calls = []

    def stand_in(*, model_dir, seed, total_steps, **rest):
        folder = Path(model_dir)
        (folder / "checkpoints").mkdir(parents=True)
        lines = [
            {"step": 0, "held/loss": 5.0},
            {"step": 1, "loss": 3.0},
            {"step": total_steps, "held/loss": 2.0 + seed},
        ]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        calls.append({"model_dir": model_dir, "seed": seed, "total_steps": total_steps, **rest})

    monkeypatch.setattr(trials, "train", stand_in)
    return calls


def test_what_is_done_is_not_done_again(tmp_path, trained):
    made = recipe(tmp_path)
    wanted = [Trial(method=m, steps=4, seed=s) for s in (0, 1) for m in METHODS]
    first = run_all(str(tmp_path / "study"), made, METHODS, wanted[:2])
    assert len(trained) == 2
    asked = []

    def then(folder):
        asked.append(folder)
        assert (Path(folder) / "checkpoints").exists()
        return {"more/x": 1.0}

    both = run_all(str(tmp_path / "study"), made, METHODS, wanted, then=then)
    assert [call["seed"] for call in trained] == [0, 0, 1, 1]
    assert len(asked) == 2
    assert both[:2] == first
    assert [found.trial for found in both] == wanted
    assert both[3].scores == {0: {"held/loss": 5.0}, 4: {"held/loss": 3.0}}
    assert both[3].last == {"held/loss": 3.0, "more/x": 1.0}
    assert both[0].trained > both[1].trained > 0
    assert not list(tmp_path.glob("study/runs/*/checkpoints"))
    assert {p.parent.name for p in tmp_path.glob("study/runs/*/trial.json")} == {
        "full_fast-seed0",
        "full_fast-seed1",
        "lora-seed0",
        "lora-seed1",
    }


def test_a_run_of_a_broken_study_is_begun_anew(tmp_path, trained, monkeypatch):
    wanted = [Trial(method="LoRA", steps=4, seed=0)]

    def broken(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(str(tmp_path), recipe(tmp_path), METHODS, wanted, then=broken)
    assert not list(tmp_path.glob("runs/*/trial.json"))


def test_methods_have_their_rates_and_seeds_their_examples(tmp_path, trained):
    made = recipe(tmp_path)
    methods = {**METHODS, "slow head": Method(learning_rate=0.2, rate_rules=[["b.*", 0.5]])}
    wanted = [
        Trial(method=m, steps=8, seed=s, examples=n)
        for m, s, n in (("LoRA", 0, 5), ("LoRA", 1, 5), ("LoRA", 0, 9), ("slow head", 0, 5))
    ]
    run_all(str(tmp_path / "study"), made, methods, wanted)
    rates = [call["optimizer"].learning_rate for call in trained]
    assert [(rate.base_learning_rate, rate.total_steps) for rate in rates] == [
        (0.1, 8),
        (0.1, 8),
        (0.1, 8),
        (0.2, 8),
    ]
    assert trained[0]["optimizer"].rate_rules == ((".*", 2.0),)
    assert trained[3]["optimizer"].rate_rules == (("b.*", 0.5),)
    assert isinstance(trained[3]["transform"], Full)

    def texts(call):
        records = call["batches"].task.open("train")
        return [records[i]["text"] for i in range(len(records))]

    first, other, more, same = map(texts, trained)
    assert (len(first), len(more), trained[0]["batches"].seed) == (5, 9, 0)
    assert first == more[:5] == same != other
    assert len(trained[0]["batches"].task.open("validation")) == 120  # only the training split


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 5}, "other settings"), ({"method": "Full fast"}, "have one folder")],
)
def test_what_does_not_fit_is_refused(tmp_path, trained, change, message):
    made, methods = recipe(tmp_path), {**METHODS, "Full fast": Method(learning_rate=0.5)}
    wanted = Trial(method="Full, fast", steps=4, seed=0)
    run_all(str(tmp_path / "study"), made, methods, [wanted])
    others = [dataclasses.replace(wanted, **change)]
    others += [wanted] if "method" in change else []
    with pytest.raises(InputError, match=message):
        run_all(str(tmp_path / "study"), made, methods, others)
    assert len(trained) == 1


def test_a_run_of_another_recipe_is_not_taken_for_this_one(tmp_path, trained):
    made, wanted = recipe(tmp_path), [Trial(method="LoRA", steps=4, seed=0)]
    run_all(str(tmp_path / "study"), made, METHODS, wanted)
    wider = dataclasses.replace(made, batches=dataclasses.replace(made.batches, batch_size=8))
    with pytest.raises(InputError, match=r"other settings .* \(its recipe\): remove that folder"):
        run_all(str(tmp_path / "study"), wider, METHODS, wanted)


def test_more_examples_than_there_are_and_a_bare_rate_are_errors(tmp_path):
    made = recipe(tmp_path)
    with pytest.raises(InputError, match="split 'train' has 120 records: draw fewer"):
        made.batches_of(121, 0)
    with pytest.raises(InputError, match="expected at least 1"):
        made.batches_of(0, 0)
    with pytest.raises(InputError, match=r"Recipe\.optimizer needs a FactorSchedule"):
        dataclasses.replace(made, optimizer=AdamW(0.1))
