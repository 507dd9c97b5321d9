"""Labels through loss, loop and evaluation: packed as alone, by hand, from published weights."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import trees, types
from t5x_lite.data.layouts import as_encoder
from t5x_lite.data.objectives import Classify, MaskedLM, Regress, SpanAnswer, Tag
from t5x_lite.data.packing import Pack, Pad
from t5x_lite.data.pipeline import Batches, EvaluationBatches
from t5x_lite.data.sources import JsonlSource
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.evaluation import label_metrics, text_metrics
from t5x_lite.interop import read_hf_config
from t5x_lite.models import transformer
from t5x_lite.models.config_heads import EmbeddingHead, LMHead, SequenceHead, TokenHead
from t5x_lite.peft.transform import Full
from t5x_lite.train import checks, convert, initial, loop, losses, offline
from t5x_lite.train import run as runs
from t5x_lite.train.evaluate import Evaluator, TeacherForced, metric_names
from t5x_lite.train.label_evaluation import Label
from t5x_lite.train.optim import AdamW
from t5x_lite.train.session import Session
from t5x_lite.train.step import Loss, asked
from t5x_lite.types import InputError
from tests import common, folders
from tests.data.toy import BERT as TOY
from tests.train import harness

MOODS = ("bad", "good")
KINDS = ("O", "B-x", "I-x")
BERT = dataclasses.replace(common.FAMILIES["bert"], vocab_size=400, pair_head=None)
OBJECTIVES = {
    "sequence": Classify(vocabulary=TOY, labels=MOODS),
    "value": Regress(vocabulary=TOY),
    "token": Tag(vocabulary=TOY, labels=KINDS),
    "span": SpanAnswer(vocabulary=TOY, max_question=2),
}
HEADS = {
    "sequence": SequenceHead(num_labels=2),
    "value": SequenceHead(num_labels=1, pooling="mean"),
    "token": TokenHead(num_labels=3),
    "span": TokenHead(num_labels=2),
}


def task(objective, path="none", **settings) -> Task:
    return Task(
        name="t",
        source=JsonlSource({"train": str(path), "test": str(path)}),
        vocabulary=objective.vocabulary,
        objective=objective,
        layout=as_encoder,
        lengths={"encoder": 24, "masked": 16},
        **settings,
    )


def record(index: int) -> dict:
    """What each of the objectives asks; the labels follow from the text."""
    rng = np.random.default_rng(index)
    words = [str(word) for word in rng.integers(10, 90, rng.integers(2, 6))]
    text = " ".join(words)
    return {
        "text": text,
        "label": int(words[0]) % 2,
        "tokens": words,
        "tags": [int(word) % 3 for word in words],
        "question": "15",
        "context": text,
        "answers": {"text": [words[1]], "answer_start": [len(words[0]) + 1]},
    }


def by_example(logits: np.ndarray, batch: types.Batch) -> list[np.ndarray]:
    """Each example's scores at its slots."""
    used, slots = batch[types.MASKED_LOSS_WEIGHTS] > 0, batch[types.MASKED_POSITIONS]
    segments = np.where(used, np.take_along_axis(batch[types.ENCODER_SEGMENT_IDS], slots, 1), 0)
    return [
        row[own == segment]
        for row, own in zip(logits, segments, strict=True)
        for segment in range(1, own.max() + 1)
    ]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_packed_example_is_answered_and_counted_as_alone(kind):
    """The same scores at its slots, and the same sums of the loss, as in a row of its own."""
    one = task(OBJECTIVES[kind])
    examples = [one.streams(one.tokens(record(i)), np.random.default_rng(0)) for i in range(6)]
    packed = Pack(6, 6)(examples, one.lengths)  # some rows stay empty: one shape, one program
    assert not packed.dropped
    padded = Pad()(examples, one.lengths).rows
    config = dataclasses.replace(BERT, head=HEADS[kind])
    model = transformer.Transformer(config)
    params = harness.host_params(config)
    apply = harness.compile_quickly(
        jax.jit(lambda batch: model.apply({"params": params}, batch)).lower(padded)
    )
    sums, scores = [], []
    for batch in (padded, packed.rows):
        logits = np.asarray(apply(batch))
        sums.append(Loss()(jnp.asarray(logits), batch))
        scores.append(by_example(logits, batch))
    for total in sums[0]:
        if total != "tokens":
            np.testing.assert_allclose(sums[0][total], sums[1][total], rtol=1e-5)
    assert len(scores[0]) == len(scores[1]) == 6
    for alone in scores[0]:
        assert any(
            alone.shape == other.shape and np.allclose(alone, other, rtol=1e-4, atol=1e-5)
            for other in scores[1]
        )


def test_squared_error_by_hand():
    predicted = np.array([[[1.0], [5.0]], [[2.0], [9.0]]], np.float32)
    batch = {
        types.MASKED_TARGET_VALUES: np.array([[3.0, 0.0], [2.5, 0.0]], np.float32),
        types.MASKED_LOSS_WEIGHTS: np.array([[1.0, 0.0], [1.0, 0.0]], np.float32),
        types.MASKED_POSITIONS: np.zeros((2, 2), np.int32),
    }
    sums = Loss()(jnp.asarray(predicted), batch)
    assert sums["loss"] == sums["squared_error"] == 4.25
    assert sums["weight"] == sums["denominator"] == 2.0
    with pytest.raises(InputError, match="a SequenceHead with one label"):
        Loss()(jnp.zeros((2, 2, 3)), batch)


def test_span_cross_entropy_by_hand():
    """Two packed examples of three and two candidates, a padding slot, and one without weight."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 7, 2)).astype(np.float32)
    logits[0, 5:] = 50.0  # no candidates, however high
    segments = np.array([[1, 1, 1, 2, 2, 2, 0]], np.int32)
    weights = np.array([[1, 1, 1, 1, 1, 0, 0]], np.float32)
    targets = np.array([[0, 1, 2, 3, 0, 0, 0]], np.int32)
    nll = lambda scores, true: np.log(np.exp(scores).sum()) - scores[true]
    x = logits[0].astype(np.float64)
    ends = [nll(x[:3, 0], 1), nll(x[:3, 1], 2), nll(x[3:5, 0], 0), nll(x[3:5, 1], 0)]
    best = [x[:3, 0].argmax() == 1, x[:3, 1].argmax() == 2, x[3, 0] > x[4, 0], x[3, 1] > x[4, 1]]

    def loss(scores, count, segment_ids=None):
        sums = losses.span_cross_entropy(
            scores, targets[:, :count], weights[:, :count], segment_ids
        )
        return sums["loss"], sums

    (found, sums), gradient = jax.jit(
        jax.value_and_grad(lambda scores: loss(scores, 7, segments), has_aux=True)
    )(logits)
    np.testing.assert_allclose(found, sum(ends), rtol=1e-5)
    assert sums["weight"] == 4.0
    assert sums["accuracy"] == sum(best)
    assert not np.any(gradient[0, 5:])
    np.testing.assert_allclose(np.sum(gradient[0, :3], axis=0), 0, atol=1e-6)
    one_a_row, _ = jax.jit(lambda scores: loss(scores, 3))(logits[:, :3])
    np.testing.assert_allclose(one_a_row, ends[0] + ends[1], rtol=1e-5)


def test_a_head_that_does_not_answer_is_refused():
    tokens = MaskedLM(TOY, rate=0.15)
    for kind, objective in OBJECTIVES.items():
        one = task(objective)
        for other, head in {**HEADS, "lm": LMHead(), "vector": EmbeddingHead()}.items():
            model = dataclasses.replace(BERT, head=head)
            if kind == other:
                checks.check_streams(model, one)
                continue
            with pytest.raises(InputError, match=f"{type(objective).__name__} asks a .*Head"):
                checks.check_streams(model, one)
    roberta = dataclasses.replace(
        BERT,
        encoder=dataclasses.replace(BERT.encoder, num_token_types=1),
        head=HEADS["span"],
    )
    with pytest.raises(InputError, match="has one type, as RoBERTa: set the objective's between=2"):
        checks.check_streams(roberta, task(OBJECTIVES["span"]))
    masked = dataclasses.replace(task(tokens), lengths={"encoder": 24, "masked": 4})
    checks.check_streams(BERT, masked)
    for head in (*HEADS.values(), EmbeddingHead()):
        with pytest.raises(InputError, match="asks for tokens, but the model has a"):
            checks.check_streams(dataclasses.replace(BERT, head=head), masked)


def test_regularisers_that_mean_nothing_are_refused():
    smooth = Loss(label_smoothing=0.1)
    pairs = dataclasses.replace(BERT, pair_head=SequenceHead(num_labels=2))
    with pytest.raises(InputError, match="pair_head has two labels"):
        checks.check_loss(pairs, smooth, {})
    checks.check_loss(pairs, Loss(z_loss=1e-4), {})
    for key in (types.MASKED_TARGET_VALUES, types.MASKED_TARGET_SPANS):
        with pytest.raises(InputError, match=f"asks for '{key}'"):
            checks.check_loss(BERT, smooth, {key: np.zeros((1, 1))})
    checks.check_loss(BERT, smooth, {types.MASKED_TARGET_TOKENS: np.zeros((1, 1))})


def test_asked_segments_of_spans_are_those_of_their_examples():
    one = task(OBJECTIVES["span"])
    examples = [one.streams(one.tokens(record(i)), np.random.default_rng(0)) for i in range(4)]
    rows = Pack(4, 2)(examples, one.lengths).rows
    _, weights, segments = asked(rows)
    for row in range(2):
        used = weights[row] > 0
        _, sizes = np.unique(np.asarray(segments[row])[used], return_counts=True)
        assert sum(sizes) == used.sum()
        assert len(sizes) == rows[types.ENCODER_SEGMENT_IDS][row].max()


# --- restoring in part ---------------------------------------------------------------------------


def test_rules_say_where_parameters_are_found():
    paths = {"head/out/kernel": 0, "encoder/a/kernel": 0, "encoder/b/kernel": 0}
    rules = (("head/.*", None), ("encoder/a/(.*)", r"decoder/c/\1"))
    assert initial.find_sources(paths, rules) == {
        "head/out/kernel": None,
        "encoder/a/kernel": "decoder/c/kernel",
        "encoder/b/kernel": "encoder/b/kernel",
    }
    with pytest.raises(InputError, match=r"restore 'decoder/\.\*' matches no parameter"):
        initial.find_sources(paths, (("decoder/.*", None),))
    with pytest.raises(InputError, match="can't be filled from 'head"):
        initial.find_sources(paths, (("head/.*", r"\1"),))


WORDS = ("alpha", "beta", "gamma", "delta")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hugging Face directory of an encoder without a head, and labelled texts and words."""
    folder = tmp_path_factory.mktemp("published")
    made = folders.hugging_face("bert", folder)
    rng = np.random.default_rng(0)
    records = []
    for index in range(11):
        words = rng.choice(WORDS, 4).tolist()
        tags = ["B-x" if word == "beta" else "O" for word in words]
        record = {"text": " ".join(words), "label": MOODS["alpha" in words], "tokens": words}
        records.append({**record, "tags": tags, "id": index})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return made, path


def labelled_task(made, path, objective, **settings) -> Task:
    vocabulary = convert.run_vocabulary(model_dir=str(made))
    one = task(objective(vocabulary), path, **settings)
    return dataclasses.replace(one, lengths={"encoder": 14, "masked": 14})  # positions are learned


@pytest.mark.slow
def test_a_published_encoder_learns_labels_and_goes_out_again(published, tmp_path):
    """Restored but for its head; labels, predictions and scores are written; out and in again."""
    made, path = published
    moods = lambda vocabulary: Classify(vocabulary=vocabulary, labels=MOODS)
    one = labelled_task(made, path, moods, metrics=[label_metrics.accuracy])
    model = convert.run_model(model_dir=str(made), head=SequenceHead(num_labels=2))
    batches = EvaluationBatches(one, "test", batch_size=8)
    run = tmp_path / "run"
    start = runs.RunCheckpoint(str(made), restore=(("sequence_head/.*", None),))
    arguments = {
        "model_dir": str(run),
        "model": model,
        "batches": Batches(one, batch_size=4, assembly=Pack(8, 4)),
        "optimizer": AdamW(learning_rate=3e-3),
        "total_steps": 30,
        "partitioner": harness.one_device(),
        "evaluations": [
            TeacherForced(name="loss", batches=batches),
            Label(name="moods", batches=batches, resamples=20),
        ],
    }
    found = loop.train(**arguments, initial=start)
    assert found["moods/accuracy_low"] <= found["moods/accuracy"] <= found["moods/accuracy_high"]
    assert found["moods/accuracy"] == pytest.approx(100 * found["loss/accuracy"])
    began = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert found["loss/loss"] < began["loss/loss"] - 0.05
    assert "loss/perplexity" not in found
    lines = (run / "predictions" / "moods-30.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert [line["id"] for line in written] == list(range(11))
    right = [line["target"] == line["prediction"] for line in written]
    assert 100 * np.mean(right) == pytest.approx(found["moods/accuracy"])
    assert runs.Run.read(str(run)).labels == MOODS
    assert runs.Run.read(str(run)).base == start

    out = tmp_path / "out"
    convert.convert(source=str(run), output=str(out), to="hf", partitioner=harness.one_device())
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    assert read_hf_config(str(out)).head == SequenceHead(num_labels=2)
    convert.convert(
        source=str(out), output=str(tmp_path / "in"), to="run", partitioner=harness.one_device()
    )
    assert runs.Run.read(str(tmp_path / "in")).labels == MOODS

    renamed = labelled_task(made, path, lambda v: Classify(vocabulary=v, labels=("good", "bad")))
    with pytest.raises(InputError, match="its labels was\n"):
        loop.train(**{**arguments, "batches": Batches(renamed), "evaluations": ()})


def test_what_is_restored_is_the_published_and_the_rest_is_drawn(published):
    made, _ = published
    model = convert.run_model(model_dir=str(made), head=TokenHead(num_labels=3))
    source = runs.RunCheckpoint(str(made), restore=[["token_head/.*", None]])
    partitioner = harness.one_device()
    params = trees.flatten(runs.load_params(source, model, partitioner, seed=5))
    drawn = trees.flatten(Session(model, partitioner=partitioner, seed=5).init_base())
    whole = runs.load_params(runs.RunCheckpoint(str(made)), read_hf_config(str(made)), partitioner)
    for path, value in params.items():
        wanted = drawn if path.startswith("token_head/") else trees.flatten(whole)
        np.testing.assert_array_equal(value, wanted[path], err_msg=path)
    with pytest.raises(InputError, match=r"head=EmbeddingHead.* not TokenHead.*restore"):
        runs.load_params(runs.RunCheckpoint(str(made)), model, partitioner)
    partly = runs.RunCheckpoint(str(made), restore=[["token_head/out/bias", None]])
    with pytest.raises(InputError, match=r"token_head/out/kernel \(8, 3\) is not there"):
        runs.load_params(partly, model, partitioner)


def test_a_start_of_another_vocabulary_or_step_is_refused(published):
    made, _ = published
    start = runs.RunCheckpoint(str(made))
    assert checks.pin(start, convert.run_vocabulary(model_dir=str(made))) == start
    with pytest.raises(InputError, match="is not that of the weights in"):
        checks.pin(start, TOY)
    with pytest.raises(InputError, match="it has no steps"):
        checks.pin(runs.RunCheckpoint(str(made), 3), TOY)


@pytest.mark.parametrize("kind", ["token", "span", "value"])
def test_each_kind_is_evaluated(published, tmp_path, kind):
    """Every example once, in order, whatever the last batch lacks."""
    made, path = published
    if kind == "span":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path = tmp_path / "spans.jsonl"
        for line in lines:
            word = line["tokens"][2]
            at = len(" ".join(line["tokens"][:2])) + 1
            line |= {"question": "alpha", "context": line["text"]}
            line["answers"] = {"text": [word], "answer_start": [at]}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    objective, metric = {
        "token": (lambda v: Tag(vocabulary=v, labels=KINDS), label_metrics.entities),
        "span": (lambda v: SpanAnswer(vocabulary=v, max_question=2), text_metrics.squad),
        "value": (lambda v: Regress(vocabulary=v, label="id"), label_metrics.pearson),
    }[kind]
    one = labelled_task(made, path, objective, metrics=[metric])
    model = convert.run_model(model_dir=str(made), head=HEADS[kind])
    session = Session(model, partitioner=harness.one_device())
    params = jax.device_put(harness.host_params(model), jax.devices()[0])
    evaluation = Label(name="l", batches=EvaluationBatches(one, "test", batch_size=8), resamples=0)
    evaluator = Evaluator(session, [evaluation])
    scores = evaluator.run(params, {}, predictions=str(tmp_path / "{name}.jsonl"))
    assert (
        set(scores)
        == {
            "token": {"l/f1", "l/precision", "l/recall"},
            "span": {"l/em", "l/f1"},
            "value": {"l/pearson"},
        }[kind]
    )
    assert metric_names(evaluation) == {name.removeprefix("l/") for name in scores}
    forced = TeacherForced(name="f", batches=evaluation.batches)
    assert metric_names(forced) == ({"loss"} if kind == "value" else {"loss", "accuracy"})
    written = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [line["id"] for line in written] == list(range(11))
    for line in written:
        if kind == "token":
            assert len(line["prediction"]) == len(line["target"]) == 4
        elif kind == "span":
            assert line["prediction"] in line["context"]
            assert line["target"] == [line["tokens"][2]]
        else:
            assert line["target"] == line["id"]


def test_label_asks_for_labels_and_metrics(published):
    made, path = published
    moods = labelled_task(made, path, lambda v: Classify(vocabulary=v, labels=MOODS))
    with pytest.raises(InputError, match="has no metrics"):
        Label(name="l", batches=EvaluationBatches(moods, "test"))
    masked = labelled_task(made, path, lambda v: MaskedLM(v, rate=0.15))
    with pytest.raises(InputError, match="MaskedLM of task 't' asks for tokens"):
        Label(name="l", batches=EvaluationBatches(masked, "test"))


def test_a_run_is_not_evaluated_by_labels_in_another_order(tmp_path):
    objective = OBJECTIVES["sequence"]
    model = dataclasses.replace(BERT, head=HEADS["sequence"])
    named = {"labels": MOODS[::-1], "vocabulary_fingerprint": TOY.fingerprint}
    runs.Run(model=model, transform=Full(), vocabulary=ByteVocabulary(), **named).write(tmp_path)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps(record(0)) + "\n")
    one = task(objective, texts, metrics=[label_metrics.accuracy])
    held = Label(name="held_out", batches=EvaluationBatches(one, split="test", batch_size=8))
    with pytest.raises(InputError, match=r"labels \('bad', 'good'\), but .* \('good', 'bad'\)"):
        offline.evaluate_run(model_dir=str(tmp_path), evaluations=[held])
