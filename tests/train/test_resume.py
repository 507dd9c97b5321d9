"""A run that is stopped and started again ends as one that never was, to the bit."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t5x_lite import trees
from t5x_lite.sharding import Partitioner
from t5x_lite.train import evaluate, loop
from t5x_lite.train import run as runs
from t5x_lite.train import step as steps
from t5x_lite.train.checkpoint import CheckpointPolicy
from t5x_lite.train.writers import read_jsonl
from t5x_lite.types import InputError
from tests import common
from tests.train import harness

ROOT = Path(__file__).parents[2]


class Stop(Exception):
    pass


def stop():
    raise Stop


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """`(folder, results, traces of each function)` of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    traces = {"train_step": 0, "eval_step": 0}

    def counted(name, function):
        @functools.wraps(function)  # its name is part of the cache's key
        def call(*args, **kwargs):
            traces[name] += 1
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "train_step", counted("train_step", steps.train_step))
        patch.setattr(evaluate, "eval_step", counted("eval_step", evaluate.eval_step))
        results = loop.train(**harness.tiny_run(folder, data_dir))
    return folder, results, traces


def everything(folder, step=harness.TOTAL_STEPS):
    """Bytes by path of the parameters and the optimizer state of a checkpoint."""
    found = loop.Checkpointer(str(folder))
    restored = found._manager.restore(step)
    found.close()
    flat = trees.flatten({name: restored[name] for name in ("params", "optimizer")})
    return {path: np.asarray(leaf).tobytes() for path, leaf in flat.items()}


def assert_same(folder, whole):
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert everything(folder) == everything(whole)


def test_a_whole_run_leaves_what_it_says(whole):
    folder, results, _ = whole
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [record["step"] for record in records if "loss" in record]
    measured = [record["step"] for record in records if "held/loss" in record]
    assert logged == [2, 4, 6, 8, 10]
    assert measured == [0, 4, 8, 10]
    assert records[-1]["held/loss"] == results["held/loss"]
    assert results["held/loss"] < records[0]["held/loss"] - 0.3
    assert sorted(os.listdir(folder / "checkpoints")) == ["10", "3", "6", "9"]
    assert len(everything(folder)) > 3 * 20


def test_a_run_compiles_its_step_once(whole):
    """Evaluations and checkpoints between the steps included."""
    assert whole[2] == {"train_step": 1, "eval_step": 1}


def test_stopped_again_and_again(whole, data_dir, tmp_path, monkeypatch):
    """Before the first checkpoint (3), with one under way, between two, near the end."""
    starts = []
    for step in (2, 3, 5, 8):
        with monkeypatch.context() as patch:
            harness.stop_at(step, stop, lambda *args: patch.setattr(*args))
            with pytest.raises(Stop):
                loop.train(**harness.tiny_run(tmp_path, data_dir))
        checkpoints = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
        starts.append(max(checkpoints, default=0))
    assert starts == [0, 3, 3, 6]
    results = loop.train(**harness.tiny_run(tmp_path, data_dir))
    assert_same(tmp_path, whole[0])
    assert results == whole[1]


def test_a_finished_run_started_again_changes_nothing(whole, data_dir, tmp_path):
    folder, _, _ = whole
    before = (folder / "metrics.jsonl").read_bytes(), everything(folder)
    loop.train(**harness.tiny_run(folder, data_dir))
    assert ((folder / "metrics.jsonl").read_bytes(), everything(folder)) == before


@pytest.mark.slow
def test_resumes_on_another_mesh(whole, data_dir, tmp_path):
    """From step 6 on, optimizer state and dropout included: the same but for rounding."""
    target = tmp_path / "run"
    shutil.copytree(whole[0], target)
    for name in ("9", "10"):
        shutil.rmtree(target / "checkpoints" / name)
    cube = Partitioner(data=2, fsdp=2, model=2)
    loop.train(**harness.tiny_run(target, data_dir, partitioner=cube, evaluations=()))

    def losses(folder):
        records = read_jsonl(folder / "metrics.jsonl")
        return {r["step"]: (r["loss"], r["gradient_norm"]) for r in records if "loss" in r}

    found, expected = losses(target), losses(whole[0])
    assert found.keys() == expected.keys()
    assert found[6] == expected[6]
    for step in (8, 10):
        np.testing.assert_allclose(found[step], expected[step], rtol=1e-5)


def test_another_configuration_does_not_resume(whole, data_dir):
    folder, _, _ = whole
    with pytest.raises(InputError, match="holds checkpoints of another run: its seed was"):
        loop.train(**harness.tiny_run(folder, data_dir, seed=6))


def program(folder, data_dir, kill, cache):
    """Runs `harness.main` in a process of its own; returns its exit code."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = json.dumps({"model_dir": str(folder), "data_dir": str(data_dir), "kill": kill})
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.harness", arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.slow
def test_killed_with_sigkill(data_dir, tmp_path):
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "cache"
    assert program(whole, data_dir, None, cache) == 0
    unfinished = 0
    for kill in (2, 5, "writing", 8):
        assert program(killed, data_dir, kill, cache) == -signal.SIGKILL
        names = os.listdir(killed / "checkpoints")
        torn = [name for name in names if not name.isdigit()]
        if kill == "writing":
            assert torn
            assert "6" not in names
        unfinished += len(torn)
    assert unfinished
    assert program(killed, data_dir, None, cache) == 0
    assert all(name.isdigit() for name in os.listdir(killed / "checkpoints"))
    assert_same(killed, whole)
    assert runs.Run.read(str(killed)) == runs.Run.read(str(whole))


def test_another_dtype_or_rematerialisation_does_resume(whole, data_dir, tmp_path):
    """A run moves to other hardware, whose preset sets them; its parameters are the same."""
    shutil.copytree(whole[0], tmp_path / "run")
    arguments = harness.tiny_run(tmp_path / "run", data_dir)
    moved = common.with_stacks(arguments["model"], remat="full", unroll=2)
    moved = dataclasses.replace(moved, dtype="bfloat16")
    assert loop.train(**(arguments | {"model": moved})) == {}  # nothing was left to do
    wider = dataclasses.replace(moved, embed_dim=2 * moved.embed_dim)
    with pytest.raises(InputError, match="holds checkpoints of another run: its model was"):
        loop.train(**(arguments | {"model": wider}))


@pytest.mark.parametrize(
    ("metric", "period", "message"),
    [
        ("other/loss", 4, "of no evaluation"),
        ("held/loss", 3, "every 3 steps and 'held' every 4"),
        ("held/chrf", 4, "'held' measures accuracy, bits_per_byte, loss, perplexity, and nothing"),
        ("held", 4, "nothing called ''"),
    ],
)
def test_the_best_metric_must_be_measured_at_every_checkpoint(
    metric, period, message, data_dir, tmp_path
):
    policy = CheckpointPolicy(period=period, best_metric=metric)
    with pytest.raises(InputError, match=message):
        loop.train(**harness.tiny_run(tmp_path, data_dir, checkpoints=policy))
