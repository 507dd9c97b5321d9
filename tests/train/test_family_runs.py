"""Encoders and decoders alone through the step, the loop, evaluation and infer."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.data.layouts import as_decoder, as_encoder
from t5x_lite.data.objectives import CausalLM, MaskedLM, TextToText
from t5x_lite.data.packing import Pack
from t5x_lite.data.pipeline import Batches, EvaluationBatches
from t5x_lite.data.sources import JsonlSource, TextSource
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import train_byte_level
from t5x_lite.decode.greedy import greedy
from t5x_lite.decode.prompts import pad_left
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Full
from t5x_lite.sharding import Partitioner
from t5x_lite.studies import demo
from t5x_lite.train import asked, checks, infer, loop
from t5x_lite.train.checkpoint import CheckpointPolicy
from t5x_lite.train.evaluate import Evaluator, Generate, TeacherForced
from t5x_lite.train.losses import by_sequence
from t5x_lite.train.optim import AdamW
from t5x_lite.train.session import Session
from t5x_lite.train.step import Loss
from t5x_lite.types import InputError
from tests import common
from tests.train import harness

VOCAB = 320
BERT = dataclasses.replace(common.FAMILIES["bert"], vocab_size=VOCAB, pair_head=None)
GPT = dataclasses.replace(common.FAMILIES["gpt2"], vocab_size=VOCAB)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """RoBERTa's specials, with a mask, over a few words."""
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    return train_byte_level(["alpha beta gamma delta"] * 20, path, vocab_size=280)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta"], (40, 6))
    path.write_text("\n".join(" ".join(line) for line in words) + "\n")
    return TextSource(files={"train": str(path), "validation": str(path)})


def masked_task(vocabulary, texts):
    return Task(
        name="masked",
        source=texts,
        vocabulary=vocabulary,
        objective=MaskedLM(vocabulary, rate=0.3),
        layout=as_encoder,
        lengths={"encoder": 24, "masked": 8},
    )


def causal_task(vocabulary, texts, length=24):
    return Task(
        name="causal",
        source=texts,
        vocabulary=vocabulary,
        objective=CausalLM(vocabulary),
        layout=as_decoder,
        lengths={"decoder": length},
    )


def slots_batch():
    rng = np.random.default_rng(0)
    return {
        types.ENCODER_INPUT_TOKENS: rng.integers(5, 96, (4, 10)).astype(np.int32),
        types.ENCODER_SEGMENT_IDS: np.tile([1, 1, 1, 1, 2, 2, 2, 2, 0, 0], (4, 1)).astype(np.int32),
        types.MASKED_POSITIONS: np.tile([1, 5, 6, 0], (4, 1)).astype(np.int32),
        types.MASKED_TARGET_TOKENS: rng.integers(5, 96, (4, 4)).astype(np.int32),
        types.MASKED_LOSS_WEIGHTS: np.tile([1, 1, 1, 0], (4, 1)).astype(np.float32),
    }


def test_the_loss_is_that_of_the_slots():
    batch = slots_batch()
    logits = np.random.default_rng(1).normal(size=(4, 4, 96)).astype(np.float32)
    entropy = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), batch[types.MASKED_TARGET_TOKENS][..., None], -1
    )[..., 0]
    sums = Loss()(jnp.asarray(logits), batch)
    np.testing.assert_allclose(sums["loss"], entropy[:, :3].sum(), rtol=1e-5)
    assert float(sums["denominator"]) == 12
    assert float(sums["tokens"]) == 32  # of the encoder, padding left out
    # One slot in the first segment of each row, two in the second: each segment counts once.
    sums = Loss(normalisation=by_sequence)(jnp.asarray(logits), batch)
    expected = (entropy[:, 0] + entropy[:, 1:3].mean(1)).sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
    assert float(sums["denominator"]) == 8


def test_segments_without_slots_leave_the_others_theirs():
    """More segments in a row than slots, as whole-word masking may have it."""
    batch = slots_batch() | {
        types.ENCODER_SEGMENT_IDS: np.tile([1, 1, 2, 2, 3, 3, 4, 4, 5, 5], (4, 1)).astype(np.int32),
        types.MASKED_POSITIONS: np.tile([4, 8, 9], (4, 1)).astype(np.int32),
        types.MASKED_TARGET_TOKENS: np.full((4, 3), 7, np.int32),
        types.MASKED_LOSS_WEIGHTS: np.ones((4, 3), np.float32),
    }
    logits = np.random.default_rng(2).normal(size=(4, 3, 96)).astype(np.float32)
    entropy = -np.asarray(jax.nn.log_softmax(logits))[..., 7]
    sums = Loss(normalisation=by_sequence)(jnp.asarray(logits), batch)
    assert float(sums["denominator"]) == 8
    expected = (entropy[:, 0] + entropy[:, 1:].mean(1)).sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_on_slots_moves_what_it_should(microbatches):
    config = dataclasses.replace(common.FAMILIES["bert"], pair_head=None)
    session = Session(config, partitioner=harness.one_device())
    batch = slots_batch()
    transformation = session.optimizer(AdamW(0.01))
    base = harness.host_params(config)
    state, frozen = harness.start(session, transformation, base)
    step = harness.compile_step(session, transformation, state, frozen, batch, microbatches)
    after, sums = step(state, frozen, batch)
    found = {k: float(sums[k]) for k in ("loss", "gradient_norm")}
    expected = _sums_of_one_batch(config, base, batch)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["gradient_norm"], expected["gradient_norm"], rtol=1e-4)
    assert np.abs(after.params["lm_head"]["bias"] - base["lm_head"]["bias"]).max() > 0


def _sums_of_one_batch(config, params, batch):
    model = Session(config).model

    def loss(params):
        sums = Loss()(model.apply({"params": params}, batch), batch)
        return sums["loss"] / sums["denominator"], sums["loss"]

    (_, total), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(grads)))
    return {"loss": float(total), "gradient_norm": norm}


def train(model_dir, model, batches, **changes):
    held = TeacherForced(name="held_out", batches=EvaluationBatches(batches.task, batch_size=8))
    return loop.train(
        **{
            "model_dir": str(model_dir),
            "model": model,
            "batches": batches,
            "optimizer": AdamW(0.01),
            "total_steps": 6,
            "evaluations": [held],
            "checkpoints": CheckpointPolicy(period=3),
            "log_period": 1,
            "partitioner": harness.one_device(),
        }
        | changes
    )


@pytest.fixture(scope="module")
def runs(vocabulary, texts, tmp_path_factory):
    """A trained BERT, packed, and a trained GPT."""
    folder = tmp_path_factory.mktemp("runs")
    packed = Batches(masked_task(vocabulary, texts), batch_size=8, assembly=Pack(16, 12))
    train(folder / "bert", BERT, packed)
    train(folder / "gpt", GPT, Batches(causal_task(vocabulary, texts), batch_size=8))
    return folder


@pytest.mark.parametrize("name", ["bert", "gpt"])
def test_a_run_learns_and_its_fall_is_reported(runs, name, capsys):
    (row,) = demo.report(folder=str(runs / name), fall=0.3)
    assert row.scores["loss"] < 6
    assert "it fell by" in capsys.readouterr().out
    assert (runs / name / "pretraining.png").exists()
    with pytest.raises(InputError, match=r"fell by \d\.\d+, less than the 50"):
        demo.report(folder=str(runs / name), fall=50.0)


def test_a_loss_that_is_not_a_number_has_not_fallen(tmp_path, runs):
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / name).write_text((runs / "bert" / name).read_text())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "held_out/loss": float("nan")}) + "\n")
    with pytest.raises(InputError, match=r"fell by nan, less than the 0\.1"):
        demo.report(folder=f"{tmp_path}/", fall=0.1)


def test_a_run_without_a_second_evaluation_is_not_reported(tmp_path, runs):
    first = (runs / "gpt" / "metrics.jsonl").read_text().splitlines()[0]
    (tmp_path / "run.json").write_text((runs / "gpt" / "run.json").read_text())
    (tmp_path / "metrics.jsonl").write_text(first + "\n")
    with pytest.raises(InputError, match="no evaluation after step 0"):
        demo.report(folder=str(tmp_path))


def test_a_stopped_run_of_slots_ends_as_one_that_was_not(runs, vocabulary, texts, tmp_path):
    packed = Batches(masked_task(vocabulary, texts), batch_size=8, assembly=Pack(16, 12))
    again = tmp_path / "again"
    with pytest.MonkeyPatch.context() as patch:

        class Stop(Exception):
            pass

        def stop():
            raise Stop

        harness.stop_at(4, stop, patch.setattr)
        with pytest.raises(Stop):
            train(again, BERT, packed)
    train(again, BERT, packed)
    assert (again / "metrics.jsonl").read_text() == (runs / "bert/metrics.jsonl").read_text()


def test_infer_asks_each_family_what_it_is_for(runs, tmp_path):
    (tmp_path / "in.txt").write_text("alpha <mask> gamma\nbeta <mask>\n")
    out = tmp_path / "out.jsonl"
    arguments = {"batch_size": 2, "max_input_tokens": 16, "max_tokens": 4}
    arguments["partitioner"] = harness.one_device()
    infer.infer(
        model_dir=str(runs / "bert"),
        input=str(tmp_path / "in.txt"),
        output=str(out),
        candidates=2,
        **arguments,
    )
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["inputs"] for record in records] == ["alpha <mask> gamma", "beta <mask>"]
    assert all(len(record["masks"][0]) == 2 for record in records)
    (tmp_path / "in.txt").write_text("alpha\nbeta gamma\ndelta\n")
    infer.infer(
        model_dir=str(runs / "gpt"),
        input=str(tmp_path / "in.txt"),
        output=str(tmp_path / "gpt.jsonl"),
        **arguments,
    )
    assert len((tmp_path / "gpt.jsonl").read_text().splitlines()) == 3
    (tmp_path / "in.txt").write_text("alpha <mask>\nbeta\n")
    with pytest.raises(InputError, match="input 2: 'beta' has 0 times <mask>"):
        infer.infer(model_dir=str(runs / "bert"), input=str(tmp_path / "in.txt"), **arguments)
    with pytest.raises(InputError, match="mode='infill' is not for an encoder alone"):
        infer.infer(model_dir=str(runs / "bert"), input="-", mode="infill", **arguments)


def test_a_decoders_predictions_are_those_of_each_prompt_alone(vocabulary, tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = [{"inputs": "alpha beta", "targets": "gamma"}, {"inputs": "delta", "targets": "alpha"}]
    pairs.append({"inputs": "beta gamma delta", "targets": "delta delta"})
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    task = Task(
        name="pairs",
        source=JsonlSource(files={"validation": str(path)}),
        vocabulary=vocabulary,
        objective=TextToText(vocabulary),
        layout=as_decoder,
        lengths={"decoder": 20},
        metrics=[lambda targets, predictions: {"size": len(predictions)}],
    )
    session = Session(GPT, partitioner=harness.one_device())
    params = common.build(GPT)[1]
    decode = jax.jit(
        functools.partial(
            greedy,
            session.model,
            max_tokens=5,
            eos_id=vocabulary.eos_id,
            pad_id=vocabulary.pad_id,
        )
    )
    generate = Generate(name="texts", batches=EvaluationBatches(task, batch_size=4), max_tokens=5)
    output = str(tmp_path / "{name}.jsonl")
    Evaluator(session, [generate]).run(params, {}, predictions=output)
    found = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    for pair, record in zip(pairs, found, strict=True):
        example = task.objective(*task.tokens(pair), rng=np.random.default_rng(0))
        inputs = example.inputs[1:] if example.inputs[0] == example.start_id else example.inputs
        prompt = np.concatenate([[example.start_id], inputs]).astype(np.int32)
        ids = decode(params, pad_left([prompt], len(prompt)))
        assert record["prediction"] == vocabulary.decode(ids[0])


def test_streams_that_do_not_fit_the_model_are_refused(vocabulary, texts):
    masked, causal = masked_task(vocabulary, texts), causal_task(vocabulary, texts)
    checks.check_streams(BERT, masked)
    checks.check_streams(GPT, causal)
    with pytest.raises(InputError, match="the model has an encoder, but task 'causal'"):
        checks.check_streams(BERT, causal)
    with pytest.raises(InputError, match="the model has no encoder, but task 'masked'"):
        checks.check_streams(GPT, masked)
    with pytest.raises(InputError, match="33 decoder tokens, but the model learns 32 positions"):
        checks.check_streams(GPT, causal_task(vocabulary, texts, length=33))
    pairs = dataclasses.replace(BERT, pair_head=common.FAMILIES["bert"].pair_head)
    with pytest.raises(InputError, match="does not ask whether two texts follow"):
        checks.check_streams(pairs, masked)


def generating(task, max_tokens=5):
    task = dataclasses.replace(task, metrics=[lambda targets, predictions: {}])
    return Generate(
        name="texts", batches=EvaluationBatches(task, batch_size=8), max_tokens=max_tokens
    )


def pairs_task(vocabulary, texts, length):
    return dataclasses.replace(
        causal_task(vocabulary, texts, length), objective=TextToText(vocabulary)
    )


def test_evaluations_that_do_not_fit_the_model_are_refused(vocabulary, texts):
    masked, pairs = masked_task(vocabulary, texts), pairs_task(vocabulary, texts, 24)
    held = TeacherForced(name="held_out", batches=EvaluationBatches(masked, batch_size=8))
    checks.check_evaluations(BERT, [held])
    checks.check_evaluations(GPT, [generating(pairs)])
    with pytest.raises(InputError, match="'held_out': the model has no encoder"):
        checks.check_evaluations(GPT, [held])
    with pytest.raises(InputError, match="'texts' generates, but the model has no decoder"):
        checks.check_evaluations(BERT, [generating(masked)])
    with pytest.raises(InputError, match="max_tokens=0: expected at least 1"):
        checks.check_evaluations(GPT, [generating(pairs, 0)])
    # 10 tokens of inputs, wrapped in two, behind the start.
    checks.check_evaluations(GPT, [generating(pairs, 20)])
    with pytest.raises(InputError, match=r"21 tokens behind 13, 33 positions in all, .* learns 32"):
        checks.check_evaluations(GPT, [generating(pairs, 21)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", '{"inputs": 5}\n', "line 1: expected a JSON object with a text field"),
        ("in.jsonl", '{"inputs": "a"}\n[]\n', "line 2: expected a JSON object"),
        ("in.txt", "", "is empty: expected one input a line"),
    ],
)
def test_inputs_that_are_no_texts_are_refused(runs, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        infer.infer(
            model_dir=str(runs / "gpt"),
            input=str(tmp_path / name),
            max_input_tokens=16,
            max_tokens=4,
            batch_size=2,
            partitioner=harness.one_device(),
        )


def test_a_line_ends_with_a_line_feed_alone(tmp_path):
    path = tmp_path / "in.jsonl"
    text = "one\u2028line"
    path.write_text(json.dumps({"inputs": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(asked.read_items(str(path))) == [{"inputs": text}]


def lm_batch(config, rows=8):
    """A packed batch for whatever stacks the config has; slots for an encoder alone."""
    batch = common.random_batch(config, rows=rows)
    if config.decoder is None:
        slots = np.tile([1, 3, 0], (rows, 1)).astype(np.int32)
        batch[types.MASKED_POSITIONS] = slots
        batch[types.MASKED_TARGET_TOKENS] = np.take_along_axis(
            batch[types.ENCODER_INPUT_TOKENS], slots, axis=1
        )
        batch[types.MASKED_LOSS_WEIGHTS] = np.tile([1, 1, 0], (rows, 1)).astype(np.float32)
    return batch


@pytest.mark.parametrize(
    "family",
    # T5 and its LoRA are in test_step.py; BART's stacks are placed as its.
    ["bert", "llama", pytest.param("bart", marks=pytest.mark.slow)],
)
def test_eight_devices_compute_what_one_does(family):
    config = dataclasses.replace(common.FAMILIES[family], pair_head=None)
    base, batch = harness.host_params(config), lm_batch(config)
    transform = LoRA(rank=2, targets=(".*/(query|wi_0)/kernel",))
    for tuned in (Full(), transform):
        losses = []
        for partitioner in (harness.one_device(), Partitioner(data=2, fsdp=2, model=2)):
            session = Session(config, tuned, partitioner)
            transformation = session.optimizer(AdamW(0.01))
            state, frozen = harness.start(session, transformation, base)
            put = partitioner.put_batch(batch, 8)
            step = harness.compile_step(session, transformation, state, frozen, put)
            for _ in range(2):
                state, sums = step(state, frozen, put)
                losses.append(float(sums["loss"]))
        np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-5)
        assert losses[0] != losses[1]
