"""Evaluation counts every example once, and what it generated can be read beside its score."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.data.objectives import TextToText
from t5x_lite.data.pipeline import EvaluationBatches
from t5x_lite.data.sources import JsonlSource
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.decode.sampling import Sampling
from t5x_lite.peft.lora import LoRA
from t5x_lite.sharding import Partitioner
from t5x_lite.train import evaluate
from t5x_lite.train.evaluate import Evaluator, Generate, TeacherForced
from t5x_lite.train.session import Session
from t5x_lite.types import InputError
from tests.train import harness

EXAMPLES = 11  # with 8 rows a batch: one full batch, and one of 3


def overlap(targets, predictions):
    """A metric that every pair of texts changes."""
    pairs = zip(targets, predictions, strict=True)
    return {"size": float(sum((i + 1) * (len(t) + len(p)) for i, (t, p) in enumerate(pairs)))}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = ["a", "bb", "ccc", "dddd", "é"]
    records = [
        {"inputs": " ".join(words[: i % 5 + 1]), "targets": words[i % 5] * (i % 4 + 1), "id": i}
        for i in range(EXAMPLES)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    vocabulary = ByteVocabulary()
    return Task(
        name="pairs",
        source=JsonlSource(files={"validation": str(path)}),
        vocabulary=vocabulary,
        objective=TextToText(vocabulary),
        lengths={"encoder": 20, "decoder": 18},
        metrics=[overlap],
        postprocess=lambda text: text.strip().upper(),
    )


def task_records(task):
    records = task.open("validation")
    return [records[i] for i in range(len(records))]


@pytest.fixture(scope="module")
def evaluated(task, tmp_path_factory):
    """`(metrics, predictions, trainable, frozen, session)` of both evaluations, on 2x2x2."""
    session = Session(harness.MODEL, LoRA(rank=2), Partitioner(data=2, fsdp=2, model=2))
    rng = np.random.default_rng(0)
    trainable, frozen = jax.tree.map(
        lambda x: jax.device_put((0.3 * rng.normal(size=x.shape)).astype(x.dtype), x.sharding),
        session.split_shapes,
    )
    batches = EvaluationBatches(task, batch_size=8)
    evaluations = [
        TeacherForced(name="held", batches=batches),
        Generate(name="texts", batches=batches, max_tokens=6, strategy=Sampling(top_p=0.9)),
    ]
    traces = []
    with pytest.MonkeyPatch.context() as patch:
        generate = evaluate.generate
        patch.setattr(
            evaluate, "generate", lambda *a, **k: (traces.append(1), generate(*a, **k))[1]
        )
        evaluator = Evaluator(session, evaluations)
        path = str(tmp_path_factory.mktemp("run") / "predictions" / "{name}-7.jsonl")
        metrics = evaluator.run(trainable, frozen, predictions=path)
        again = evaluator.run(trainable, frozen, which=evaluations[1:])
    assert again == {key: value for key, value in metrics.items() if key.startswith("texts/")}
    assert len(traces) == 1  # one program for every batch and evaluation
    with open(path.format(name="texts"), encoding="utf-8") as file:
        predictions = [json.loads(line) for line in file]
    return metrics, predictions, trainable, frozen, session


def test_teacher_forcing_counts_each_example_once(evaluated, task):
    metrics, _, trainable, frozen, session = evaluated
    everything = EvaluationBatches(task, batch_size=EXAMPLES).batch(0)
    params = session.transform.merge(*jax.device_get((trainable, frozen)))
    logits = np.asarray(
        jax.jit(lambda p: session.model.apply({"params": p}, everything))(params), np.float64
    )
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    targets = everything[types.DECODER_TARGET_TOKENS]
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    weights = everything[types.DECODER_LOSS_WEIGHTS]
    counts = weights.sum(1)
    assert len(set(counts.tolist())) > 3  # a mean of batch means would be another number
    expected = (weights * (log_z - picked)).sum() / weights.sum()
    np.testing.assert_allclose(metrics["held/loss"], expected, rtol=1e-5)
    hits = (weights * (logits.argmax(-1) == targets)).sum() / weights.sum()
    np.testing.assert_allclose(metrics["held/accuracy"], hits, atol=1e-6)
    np.testing.assert_allclose(metrics["held/perplexity"], np.exp(expected), rtol=1e-4)
    # A byte is a token, and each text's eos is one that is paid for.
    nbytes = sum(len(record["targets"].encode()) for record in task_records(task))
    assert nbytes == weights.sum() - EXAMPLES
    bits = (weights * (log_z - picked)).sum() / np.log(2)
    np.testing.assert_allclose(metrics["held/bits_per_byte"], bits / nbytes, rtol=1e-5)
    assert {key for key in metrics if key.startswith("held/")} == {
        "held/loss",
        "held/accuracy",
        "held/perplexity",
        "held/bits_per_byte",
    }


@pytest.mark.parametrize("resamples", [0, 9])
def test_what_will_be_measured_is_known_before(evaluated, task, resamples):
    batches = EvaluationBatches(task, batch_size=8)
    found = evaluate.metric_names(TeacherForced(name="held", batches=batches))
    assert {f"held/{name}" for name in found} | {
        "texts/size",
        "texts/size_low",
        "texts/size_high",
    } == set(evaluated[0])
    texts = Generate(name="texts", batches=batches, resamples=resamples)
    expected = {"size", "size_low", "size_high"} if resamples else {"size"}
    assert evaluate.metric_names(texts) == expected

    def choosy(targets, predictions):
        raise ZeroDivisionError

    odd = EvaluationBatches(dataclasses.replace(task, metrics=[choosy]), batch_size=8)
    assert evaluate.metric_names(Generate(name="texts", batches=odd)) is None


def test_generation_writes_a_line_an_example(evaluated, task):
    metrics, predictions, *_ = evaluated
    assert [record["id"] for record in predictions] == list(range(EXAMPLES))
    assert [record["inputs"] for record in predictions][:3] == ["a", "a bb", "a bb ccc"]
    assert len({record["prediction"] for record in predictions}) > 1
    clean = task.postprocess
    scored = overlap(
        [clean(record["targets"]) for record in predictions],
        [clean(record["prediction"]) for record in predictions],
    )
    assert metrics["texts/size"] == scored["size"]
    assert set(metrics) >= {"texts/size", "texts/size_low", "texts/size_high"}
    assert metrics["texts/size_low"] < metrics["texts/size_high"]


def test_references_stand_in_for_targets(task):
    seen = []

    def keep(targets, predictions):
        seen.append((targets, predictions))
        return {"kept": 1.0}

    one = dataclasses.replace(task, metrics=[keep])
    records = [
        {"targets": "a ", "prediction": " b"},
        {"targets": "a", "references": ["c", " d"], "prediction": "e"},
        {"targets": "a", "references": {"question": 3}, "prediction": "f"},
    ]
    assert evaluate.score_records(one, records) == {"kept": 1.0}
    assert seen == [(["A", ["C", "D"], {"question": 3}], ["B", "E", "F"])]
    with_limits = evaluate.score_records(one, records, resamples=3)
    assert with_limits == {"kept": 1.0, "kept_low": 1.0, "kept_high": 1.0}
    assert len(seen) == 1 + 1 + 3


def test_evaluations_need_names_and_metrics(task, tmp_path):
    held = TeacherForced(name="x", batches=EvaluationBatches(task, batch_size=8))
    with pytest.raises(InputError, match="two evaluations have one name: x, x"):
        Evaluator(Session(harness.MODEL), [held, held])
    bare = EvaluationBatches(harness.tiny_task(tmp_path), batch_size=8)
    with pytest.raises(InputError, match="'texts' generates, but task 'tiny' has no metrics"):
        Generate(name="texts", batches=bare)
