"""Folders of models, opened: what comes with them, and each half of a folder as one message."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from t5x_lite import trees
from t5x_lite.interop import load_hf, load_peft
from t5x_lite.models import transformer
from t5x_lite.peft.lora import LoRA
from t5x_lite.train import convert
from t5x_lite.train import run as runs
from t5x_lite.train.checkpoint import Checkpointer
from t5x_lite.train.opening import open_model
from t5x_lite.train.session import Session
from t5x_lite.types import InputError
from tests import folders
from tests.train import harness

PEFT = str(folders.FIXTURES / "peft" / "gpt2" / "adapter")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A directory of Hugging Face's, and a run with the same weights."""
    folder = tmp_path_factory.mktemp("gpt2")
    made = folders.hugging_face("peft/gpt2/base", folder)
    run = folder / "run"
    convert.convert(source=str(made), output=str(run), to="run", partitioner=one_device())
    return made, run


def one_device():
    return harness.one_device()


def opened(path, **arguments):
    return open_model(str(path), partitioner=one_device(), **arguments)


def tune(base, folder, transform, step=1):
    """A run's folder with an adapter that was never trained, but is not the base."""
    under = runs.Run.read(str(base))
    checkpoint = runs.RunCheckpoint(str(base), 0)
    params = runs.load_params(checkpoint, under.model, one_device())
    session = Session(under.model, transform, one_device())
    trainable, frozen = session.split(params)
    trainable = jax.tree.map(lambda x: x + 0.5, trainable)
    checkpointer = Checkpointer(str(folder))
    checkpointer.save(step, trainable, {}, {})
    checkpointer.wait()
    checkpointer.close()
    run = dataclasses.replace(
        under, transform=transform, base=checkpoint, base_fingerprint=trees.fingerprint(frozen)
    )
    run.write(str(folder))
    return folder


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params):
    return model.apply({"params": params}, transformer.dummy_batch(model.config))


@pytest.fixture(scope="module")
def tuned(gpt2, tmp_path_factory):
    return tune(gpt2[1], tmp_path_factory.mktemp("tuned") / "run", LoRA(rank=2))


def logits(loaded):
    return np.asarray(apply(loaded.model, loaded.params))


def test_a_directory_of_hugging_faces_and_a_run_are_the_same_model(gpt2):
    theirs, ours = (opened(folder) for folder in gpt2)
    np.testing.assert_array_equal(logits(theirs), logits(ours))
    assert (
        theirs.vocabulary.encode("alpha gamma").tolist()
        == [2, 4]
        == [*ours.vocabulary.encode("alpha gamma")]
    )
    assert theirs.model.config == ours.model.config


@pytest.mark.slow
def test_an_adapter_of_pefts_goes_on_either(gpt2):
    model, base = load_hf(str(gpt2[0]))
    transform, trainable = load_peft(PEFT, model)
    expected = apply(model, transform.apply(trainable, base))
    assert np.abs(apply(model, base) - expected).max() > 1e-3
    for folder in gpt2:
        np.testing.assert_allclose(logits(opened(folder, adapter=PEFT)), expected, atol=1e-5)


def test_a_tuned_run_goes_on_its_base_wherever_that_is(gpt2, tuned, tmp_path):
    alone = logits(opened(tuned))
    moved = tmp_path / "moved"
    shutil.copytree(gpt2[1], moved)
    for base in (gpt2[0], moved):
        np.testing.assert_array_equal(logits(opened(base, adapter=str(tuned))), alone)
    # An adapter of PEFT's on a tuned run: the run's own is merged first.
    both = opened(tuned, adapter=PEFT)
    assert np.abs(logits(both) - alone).max() > 1e-3


def test_an_adapter_of_another_base_is_refused(gpt2, tuned, tmp_path):
    other = folders.hugging_face("llama", tmp_path)
    with pytest.raises(InputError, match=r"the adapter .* does not go on .*llama"):
        opened(other, adapter=str(tuned))
    with pytest.raises(InputError, match="the model has no module"):
        opened(other, adapter=PEFT)
    wrong = tmp_path / "wrong"
    shutil.copytree(tuned, wrong)
    record = json.loads((tuned / "run.json").read_text())
    record["base_fingerprint"] = "0" * 16
    (wrong / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="was tuned on weights of fingerprint 0000000000000000"):
        opened(gpt2[0], adapter=str(wrong))
    with pytest.raises(InputError, match="is no adapter: it holds a whole model"):
        opened(gpt2[0], adapter=str(gpt2[1]))


def test_what_a_config_says_of_its_tokens_and_labels_counts(tmp_path):
    made = folders.hugging_face("bert_tagger", tmp_path)
    settings = json.loads((made / "config.json").read_text())
    settings["id2label"] = {"0": "O", "2": "B-LOC", "1": "B-PER"}
    (made / "config.json").write_text(json.dumps(settings))
    assert opened(made).labels == ("O", "B-PER", "B-LOC")
    run = tmp_path / "run"
    convert.convert(source=str(made), output=str(run), to="run", partitioner=one_device())
    assert opened(run).labels == ("O", "B-PER", "B-LOC")
    made = folders.hugging_face("gpt2", tmp_path)  # its tokenizer's files say 0, its config 5
    loaded = opened(made)
    assert loaded.ends == (5,)
    assert loaded.vocabulary.start_id == 5
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3, 999]}))
    loaded = opened(made)
    assert loaded.ends == (7, 3)
    assert loaded.text([2, 3, 2, 0]) == "alpha"
    assert opened(folders.hugging_face("bart", tmp_path)).vocabulary.start_id == 2


def half(gpt2, tmp_path, which):
    """Folders that somebody left half-written, and what is said about each."""
    made = tmp_path / "half"
    shutil.copytree(gpt2[1] if which.startswith("run") else gpt2[0], made)
    match which:
        case "run without a checkpoint":
            shutil.rmtree(made / "checkpoints")
        case "run without a finished checkpoint":
            shutil.move(made / "checkpoints" / "0", made / "checkpoints" / "0.tmp")
        case "run with half a record":
            (made / "run.json").write_text((made / "run.json").read_text()[:100])
        case "run without its vocabulary":
            (made / "vocabulary.model").unlink()
        case "hf without weights":
            (made / "model.safetensors").unlink()
        case "hf with half of its weights":
            weights = (made / "model.safetensors").read_bytes()
            (made / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        case "hf without a tokenizer":
            (made / "tokenizer.json").unlink()
        case "hf without its config":
            (made / "config.json").unlink()
        case "hf with half a config":
            (made / "config.json").write_text("{")
    return made


HALVES = {
    "run without a checkpoint": "has no 'checkpoints' folder",
    "run without a finished checkpoint": "holds no finished checkpoint yet",
    "run with half a record": "is not readable JSON",
    "run without its vocabulary": "vocabulary.model' cannot be read",
    "hf without weights": "has no weights: expected model.safetensors",
    "hf with half of its weights": "is damaged or cut short",
    "hf without a tokenizer": "holds no tokenizer's file",
    "hf without its config": "its weights are there, but the copy is not whole",
    "hf with half a config": "config.json' is not JSON",
}


@pytest.mark.parametrize("which", HALVES)
def test_a_half_written_folder_is_one_message(gpt2, tmp_path, which):
    with pytest.raises(InputError, match=HALVES[which]) as raised:
        opened(half(gpt2, tmp_path, which))
    assert str(tmp_path / "half") in str(raised.value)


def test_folders_that_are_no_models_are_refused(gpt2, tmp_path):
    with pytest.raises(InputError, match="no such folder: '/nowhere'; expected one with a model"):
        opened("/nowhere")
    with pytest.raises(InputError, match=r"holds no model: expected a run's run\.json or"):
        opened(tmp_path)
    with pytest.raises(InputError, match="is an adapter: name its model's folder"):
        opened(PEFT)
    with pytest.raises(InputError, match="no such folder: '/nowhere'; expected PEFT's with"):
        opened(gpt2[0], adapter="/nowhere")
    with pytest.raises(InputError, match="is no adapter; expected PEFT's with"):
        opened(gpt2[1], adapter=str(tmp_path))
    with pytest.raises(InputError, match="step=3 is for a run's checkpoints"):
        opened(gpt2[0], step=3)
    with pytest.raises(InputError, match="has no checkpoint of step 3; it has"):
        opened(gpt2[1], step=3)
    adapter = tmp_path / "adapter"
    shutil.copytree(PEFT, adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(InputError, match="is damaged or cut short"):
        opened(gpt2[0], adapter=str(adapter))
