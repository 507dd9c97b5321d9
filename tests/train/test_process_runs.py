"""Two real processes train as one does: the demo's runs, shortened, over gloo on loopback.

Each process has four virtual devices. What is compared are the losses of every step and of the
evaluations in between, with one process of eight devices and with one device.
"""

from __future__ import annotations

import json
import shutil
import signal

import numpy as np
import pytest

from t5x_lite.data.vocabularies import train_byte_level
from tests import processes

MESH = ("--gin.Partitioner.data=2", "--gin.Partitioner.fsdp=2", "--gin.Partitioner.model=2")
SLICES = (*MESH, "--gin.Partitioner.num_slices=2")  # a process each
DATA = ("--gin.Partitioner.data=8",)
ONE = ("--gin.Partitioner.data=1",)
TRAIN = str(processes.ROOT / "scripts" / "train.py")
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


def train(folder, family, run, *flags, count=1, devices=8):
    """The records of the run's metrics; `devices` are those of all its `count` processes."""
    for file in folder.glob("rows-*"):
        file.unlink()
    command = [TRAIN, f"--gin_file={family}.gin", f"--model_dir={run}", *flags]
    port = processes.free_port()
    commands = [[*command, *processes.flags(port, count, index)] for index in range(count)]
    for index, process in enumerate(processes.run(commands, folder, devices)):
        assert process.returncode == 0, f"process {index}: {process.stderr[-3000:]}"
        said = f"Done: {run}" in process.stderr
        assert said == (index == 0), "process 0 alone says what happens"
        rows = 16 // count
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
    assert_same(train(folder, family, f"{family}/two", *SLICES, count=2), one)
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
    assert_same(train(folder, "gpt", "gpt/whole", *DATA, count=2), one)


# One process ends by itself, while the others wait for it: in a collective, or at their own end.
ENDS = """
import os, signal, time

import numpy as np
from jax.experimental.multihost_utils import process_allgather

import jax
from t5x_lite import configure
from t5x_lite.types import InputError


def end(*, how: str, which: int):
    process_allgather(np.ones(3))
    if jax.process_index() == which:
        if how == "bad input":
            raise InputError("only here")
        if how == "exception":
            raise ValueError("only here")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2)
        raise InputError("only here")
    if how != "late":
        process_allgather(np.ones(4))


if __name__ == "__main__":
    configure.main(end)
"""


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("how", "code", "word"),
    [
        ("bad input", 2, "has failed"),
        ("exception", 1, "has failed"),
        ("killed", -signal.SIGKILL, "has gone"),
        ("late", 2, "has failed"),
    ],
)
@pytest.mark.slow
def test_when_one_process_ends_the_others_do(tmp_path, how, code, word, which):
    (tmp_path / "end.py").write_text(ENDS)
    command = ["end.py", f"--gin.end.how={how}", f"--gin.end.which={which}"]
    port = processes.free_port()
    commands = [[*command, *processes.flags(port, 3, index)] for index in range(3)]
    with processes.started(commands, tmp_path, devices=3) as running:
        first = running.pop(which)
        _, said = first.communicate(timeout=120)
        others = [process.communicate(timeout=30)[1] for process in running]  # jax: 100 seconds
    assert first.returncode == code
    assert ("only here" in said) == (how != "killed")
    for process, said in zip(running, others, strict=True):
        assert process.returncode == 1
        # Without process 0 jax may be quicker to end the others, and says why itself.
        by_jax = how == "killed" and which == 0 and "coordination service" in said
        assert f"process {which} of 3 {word}" in said or by_jax


def test_a_host_that_does_not_come_is_waited_for_so_long(folder):
    several = [*processes.flags(processes.free_port(), 2, 0), "--process_timeout=1"]
    command = [TRAIN, "--gin_file=gpt.gin", *several]
    (done,) = processes.run([command], folder, devices=1, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: 2 processes were expected, 1 came in 1 seconds: missing 1 ")
