"""What a run compiles, and when: its step once, and nothing in the course of its steps."""

from __future__ import annotations

import contextlib

import jax

from t5x_lite.train import loop
from tests.train import harness

FIRST_BATCH = "the first batch"


@contextlib.contextmanager
def compiled():
    """Names of the programs that XLA is asked for inside, in order."""
    names: list[str] = []

    def listen(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


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
