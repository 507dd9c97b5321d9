"""Two real processes train as one does: the demo's runs, shortened, over gloo on loopback.

Each process has four virtual devices. What is compared are the losses of every step and of the
evaluations in between, with one process of eight devices and with one device.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from t5x_lite.data.vocabularies import train_byte_level
from tests import xla
from tests.train.test_processes import ROOT, free_port

MESH = ("--gin.Partitioner.data=2", "--gin.Partitioner.fsdp=2", "--gin.Partitioner.model=2")
SLICES = (*MESH, "--gin.Partitioner.num_slices=2")  # a process each
DATA = ("--gin.Partitioner.data=8",)
ONE = ("--gin.Partitioner.data=1",)
STEPS = 4

# The demo's run of a family, on a few lines of text and with a smaller model.
GIN = """
include 'runs/demo_%(family)s.gin'
STEPS = 4
PERIOD = 2
VOCABULARY_FILE = 'vocabulary.json'
bible_text/Task.source = @TextSource()
TextSource.files = {'train': 'train.txt', 'test': 'test.txt'}
Chunks.window = 8
held_out/EvaluationBatches.limit = 21
import recorded
train.batches = @train/Recorded()
train/Recorded.task = %%BIBLE_TEXT
train/Recorded.batch_size = 16
ModelConfig.vocab_size = 384
ModelConfig.embed_dim = 32
StackConfig.num_layers = 1
StackConfig.mlp_dim = 64
FactorSchedule.warmup_steps = 1
CheckpointPolicy.keep = 2
train.log_period = 1
"""
# Writes down which rows of a batch a process loads.
RECORDED = """
import dataclasses

import jax

from t5x_lite import configure
from t5x_lite.data.pipeline import ALL_ROWS, Batches


@dataclasses.dataclass(frozen=True)
class Recorded(Batches):
    def batch(self, step, rows=ALL_ROWS):
        with open(f"rows-{jax.process_index()}", "a") as file:
            file.write(f"{rows.start}:{rows.stop} ")
        return super().batch(step, rows)


configure.register([Recorded])
"""
BYTES = "VOCABULARY = @ByteVocabulary()\n"  # which has T5's sentinels, and no file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("process_runs")
    rng = np.random.default_rng(0)
    words = ["light", "water", "word", "hand", "king", "house", "river", "stone", "bread", "day"]
    for name, lines in (("train", 200), ("test", 20)):
        drawn = rng.choice(words, (lines, 12))
        (path / f"{name}.txt").write_text("\n".join(" ".join(line) for line in drawn) + "\n")
    (path / "recorded.py").write_text(RECORDED)
    train_byte_level([" ".join(words)] * 20, path / "vocabulary.json", vocab_size=300)
    for family in ("bert", "gpt", "t5"):
        text = GIN % {"family": family} + (BYTES if family == "t5" else "")
        (path / f"{family}.gin").write_text(text)
    return path


def train(folder, family, run, *flags, processes=1, devices=8):
    """The records of the run's metrics; `devices` are those of all processes."""
    port = free_port()
    for file in folder.glob("rows-*"):
        file.unlink()
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(devices // processes),
    }
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"--gin_file={family}.gin"]
    command += [f"--model_dir={run}", *flags]
    several = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
    started = [
        subprocess.Popen(
            [*command, *([*several, f"--process_id={index}"] if processes > 1 else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=folder,
        )
        for index in range(processes)
    ]
    try:
        ended = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    for index, (process, (_, stderr)) in enumerate(zip(started, ended, strict=True)):
        assert process.returncode == 0, f"process {index}: {stderr[-3000:]}"
        assert (f"Done: {run}" in stderr) == (index == 0), "process 0 alone says what happens"
        rows = 16 // processes
        # All read the first row, to check that the parts fit.
        asked = set((folder / f"rows-{index}").read_text().split()) - {"0:1"}
        assert asked == {f"{index * rows}:{(index + 1) * rows}"}, "each loads its own rows alone"
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same(found, expected):
    """Every loss of training and evaluation to 1e-5, and not because there are none."""
    assert [record.keys() for record in found] == [record.keys() for record in expected]
    losses = [
        [(record["step"], record.get("loss", record.get("held_out/loss"))) for record in records]
        for records in (found, expected)
    ]
    assert [step for step, _ in losses[0]] == [0, 1, 2, 2, 3, 4, 4]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt", "t5"])
@pytest.mark.slow
def test_two_processes_train_as_one_does(folder, family):
    one = train(folder, family, f"{family}/one", *ONE, devices=1)
    assert one[-1]["held_out/loss"] < one[0]["held_out/loss"]
    assert_same(train(folder, family, f"{family}/eight", *MESH), one)
    assert_same(train(folder, family, f"{family}/two", *SLICES, processes=2), one)
    # One device goes on from the middle of what the two processes wrote.
    source, again = folder / family / "two", folder / family / "again"
    shutil.copytree(source, again)
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    assert [path.name for path in (again / "checkpoints").iterdir()] == ["2"]
    assert_same(train(folder, family, f"{family}/again", *ONE, devices=1), one)


@pytest.mark.slow
def test_two_processes_go_on_from_what_one_wrote(folder):
    one = train(folder, "gpt", "gpt/whole", *ONE, devices=1)
    shutil.rmtree(folder / "gpt" / "whole" / "checkpoints" / str(STEPS))
    assert_same(train(folder, "gpt", "gpt/whole", *DATA, processes=2), one)


# One process fails by itself, while the other waits for it in a collective.
FAILS = """
import numpy as np
from jax.experimental.multihost_utils import process_allgather

import jax
from t5x_lite import configure
from t5x_lite.types import InputError


def fail(*, foreseen: bool):
    process_allgather(np.ones(3))
    if jax.process_index() == 1:
        raise InputError("only here") if foreseen else ValueError("only here")
    process_allgather(np.ones(4))


if __name__ == "__main__":
    configure.main(fail)
"""


@pytest.mark.parametrize(("foreseen", "code"), [("True", 2), ("False", 1)])
@pytest.mark.slow
def test_when_one_process_fails_the_others_end_soon(tmp_path, foreseen, code):
    (tmp_path / "fail.py").write_text(FAILS)
    command = [sys.executable, "fail.py", f"--gin.fail.foreseen={foreseen}", "--num_processes=2"]
    command += [f"--coordinator=127.0.0.1:{free_port()}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    zero, one = (
        subprocess.Popen(
            [*command, f"--process_id={index}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=tmp_path,
        )
        for index in range(2)
    )
    try:
        _, said = one.communicate(timeout=120)
        zero.communicate(timeout=200)  # jax by itself: 300 seconds
    finally:
        for process in (zero, one):
            process.kill()
    assert one.returncode == code
    assert "only here" in said
    assert zero.returncode not in (0, None)


def test_a_host_that_does_not_come_is_waited_for_so_long(folder):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--gin_file=gpt.gin"]
    command += [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=0"]
    done = subprocess.run(
        [*command, "--process_timeout=1"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
            "JAX_PLATFORMS": "cpu",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: 2 processes were expected, 1 came in 1 seconds: missing 1 ")
