"""Two real processes evaluate as one does: each example once, the same scores, one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import processes

EXAMPLES = 11  # with 8 rows a batch: one full batch and one of 3, which one process has to itself

# Arguments: folder, port, number of processes, index of this one.
PROGRAM = """
import json, sys

import jax
import numpy as np

from t5x_lite import distributed

folder, port, count, index = sys.argv[1], *map(int, sys.argv[2:])
distributed.start(distributed.Process(f"127.0.0.1:{port}", count, index))
assert jax.process_count() == count and jax.device_count() == 4

from t5x_lite.data.objectives import TextToText
from t5x_lite.data.pipeline import EvaluationBatches
from t5x_lite.data.sources import JsonlSource
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.evaluation.metrics import chrf
from t5x_lite.peft.transform import Full
from t5x_lite.sharding import Partitioner
from t5x_lite.train.evaluate import Evaluator, Generate, TeacherForced
from t5x_lite.train.session import Session
from tests import common
from tests.train import harness

vocabulary = ByteVocabulary()
task = Task(
    name="pairs",
    source=JsonlSource(files={"validation": f"{folder}/pairs.jsonl"}),
    vocabulary=vocabulary,
    objective=TextToText(vocabulary),
    lengths={"encoder": 20, "decoder": 18},
    metrics=[chrf],
)
session = Session(harness.MODEL, Full(), Partitioner(data=4))
host = common.host_params(harness.MODEL)
params = jax.tree.map(
    lambda x, struct: jax.make_array_from_callback(x.shape, struct.sharding, lambda i: x[i]),
    host,
    session.base_shapes,
)
batches = EvaluationBatches(task, batch_size=8)
evaluations = [
    TeacherForced(name="held", batches=batches),
    Generate(name="texts", batches=batches, max_tokens=4, resamples=20),
]
path = f"{folder}/{count}-{index}-{{name}}.jsonl"
print(json.dumps(Evaluator(session, evaluations).run(params, {}, predictions=path)))
distributed.finish()
"""


def evaluate(folder: Path, count: int) -> list[dict[str, float]]:
    """What each of `count` processes, with four devices between them, measured."""
    port = str(processes.free_port())
    commands = [["-c", PROGRAM, str(folder), port, str(count), str(i)] for i in range(count)]
    ended = processes.run(commands, folder, devices=4, timeout=300)
    for process in ended:
        assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(process.stdout.splitlines()[-1]) for process in ended]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    words = ["a", "bb", "ccc", "dddd", "é"]
    records = [
        {"inputs": " ".join(words[: i % 5 + 1]), "targets": words[i % 5] * (i % 4 + 1), "id": i}
        for i in range(EXAMPLES)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (alone,) = evaluate(tmp_path, 1)
    first, second = evaluate(tmp_path, 2)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-5)
    assert {"held/loss", "held/bits_per_byte", "texts/chrf", "texts/chrf_low"} <= first.keys()
    one, two = (tmp_path / f"{count}-0-texts.jsonl" for count in (1, 2))
    assert one.read_text() == two.read_text()
    assert [json.loads(line)["id"] for line in two.open()] == list(range(EXAMPLES))
    assert not (tmp_path / "2-1-texts.jsonl").exists()
