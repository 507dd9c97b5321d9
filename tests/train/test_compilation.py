"""What a run compiles, and when: its step once, and nothing in the course of its steps."""

from __future__ import annotations

import threading

import pytest

from t5x_lite.train import loop
from t5x_lite.train.evaluate import Evaluator
from t5x_lite.train.optim import AdamW
from t5x_lite.train.schedules import FactorSchedule
from t5x_lite.train.session import Session
from t5x_lite.train.writers import read_jsonl
from t5x_lite.types import InputError
from tests.common import compiled
from tests.train import harness

FIRST_BATCH = "the first batch"


def test_a_run_compiles_its_step_once_and_nothing_between_steps(tmp_path, monkeypatch):
    run = harness.tiny_run(tmp_path / "run", tmp_path)
    with compiled() as names:
        harness.stop_at(0, lambda: names.append(FIRST_BATCH), monkeypatch.setattr)
        loop.train(**run)
    assert [name for name in names if "train_step" in name] == ["jit(train_step)"], names
    assert [name for name in names if "score" in name] == ["jit(score)"], names
    # Three evaluations, four checkpoints and five records later:
    assert names[names.index(FIRST_BATCH) :] == [FIRST_BATCH], names

    # Going on, what evaluates is compiled when it is first asked to.
    with compiled() as names:
        harness.stop_at(harness.TOTAL_STEPS, lambda: names.append(FIRST_BATCH), monkeypatch.setattr)
        loop.train(**run | {"total_steps": harness.TOTAL_STEPS + 4})
    assert names.count("jit(train_step)") == 1
    assert names[names.index(FIRST_BATCH) + 1 :] == ["jit(score)"]


def test_records_have_their_steps_learning_rate_and_no_program_of_their_own(tmp_path):
    schedule = FactorSchedule("constant * linear_warmup", base_learning_rate=0.3, warmup_steps=7)
    made = {"optimizer": AdamW(schedule), "evaluations": [], "log_period": 1}
    with compiled() as names:
        loop.train(**harness.tiny_run(tmp_path / "run", tmp_path) | made)
    assert set(names) == {"jit(init)", "jit(train_step)"}
    records = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert [record["step"] for record in records] == [*range(1, harness.TOTAL_STEPS + 1)]
    assert [record["learning_rate"] for record in records] == pytest.approx(
        [float(schedule(record["step"] - 1)) for record in records], rel=1e-6
    )


def test_the_step_is_compiled_while_parameters_are_made_and_evaluated(tmp_path, monkeypatch):
    evaluating, compile_step, evaluate = threading.Event(), loop.compile_step, Evaluator.run

    def compile_late(*args, **kwargs):
        assert evaluating.wait(60), "the evaluation at step 0 waits for the step's compilation"
        return compile_step(*args, **kwargs)

    def run(*args, **kwargs):
        evaluating.set()
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(loop, "compile_step", compile_late)
    monkeypatch.setattr(Evaluator, "run", run)
    loop.train(**harness.tiny_run(tmp_path / "run", tmp_path) | {"total_steps": 1})
    assert evaluating.is_set()


def test_an_error_does_not_wait_for_the_compiler(tmp_path, monkeypatch):
    told = threading.Event()

    def compile_long(*args, **kwargs):
        assert told.wait(60), "the error waits"

    def init_base(self):
        raise InputError("no weights")

    monkeypatch.setattr(loop, "compile_step", compile_long)
    monkeypatch.setattr(Session, "init_base", init_base)
    with pytest.raises(InputError, match="no weights"):
        loop.train(**harness.tiny_run(tmp_path / "run", tmp_path))
    assert not told.is_set()
    told.set()
