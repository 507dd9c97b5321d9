"""A run's folder: written and read back, its vocabulary with it, and the base of its adapters."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import trees
from t5x_lite.data.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizersVocabulary,
    train_byte_level,
    train_sentencepiece,
    train_wordpiece,
)
from t5x_lite.decode.asking import Asking
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Freeze, Full
from t5x_lite.sharding import Partitioner
from t5x_lite.train.checkpoint import Checkpointer
from t5x_lite.train.run import Run, RunCheckpoint, load, load_params
from t5x_lite.train.session import Session, shardings
from t5x_lite.types import InputError
from tests import common
from tests.train import harness

LORA = LoRA(rank=2, targets=(".*/query/kernel", "lm_head/kernel"))
BYTES = ByteVocabulary()
MODEL = common.GPT
CUBE = Partitioner(data=2, fsdp=2, model=2)


def run_of(vocabulary=BYTES, transform=Full(), **changes):
    return Run(MODEL, transform, vocabulary, vocabulary.fingerprint, **changes)


@pytest.mark.parametrize(
    "run",
    [
        run_of(),
        run_of(ByteVocabulary(extra_ids=7), LORA, base=RunCheckpoint("x", 3), base_fingerprint="f"),
        run_of(transform=Freeze(trainable=("decoder/.*",)), base=RunCheckpoint("y"), seed=4),
        Run(common.with_stacks(common.T5, dropout=0.1, unroll=2), Full(), BYTES, "0"),
        run_of(labels=("bad", "good"), asking=Asking("wrapped", "middle", (7, 8, 9))),
    ],
    ids=["full", "lora", "freeze", "t5", "told"],
)
def test_a_run_comes_back_as_it_was_written(tmp_path, run):
    run.write(str(tmp_path / "new"))
    assert Run.read(str(tmp_path / "new")) == run


def test_a_run_of_before_says_neither_labels_nor_how_it_is_asked(tmp_path):
    run_of(labels=("bad", "good"), asking=Asking("wrapped")).write(str(tmp_path))
    record = json.loads((tmp_path / "run.json").read_text())
    del record["labels"], record["asking"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert Run.read(str(tmp_path)) == run_of()


TEXTS = [f"the lazy fox jumps over {i} quick brown dogs" for i in range(300)]


@pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece", "byte-level", "bart", "vocab.txt"])
def test_the_vocabulary_travels_with_the_run(kind, tmp_path):
    source = tmp_path / "elsewhere" / "v.model"
    source.parent.mkdir()
    if kind == "sentencepiece":
        train_sentencepiece(TEXTS, str(source), vocab_size=300)
        vocabulary = SentencePieceVocabulary(str(source), extra_ids=9)
    elif kind == "wordpiece":
        train_wordpiece(TEXTS, source, vocab_size=100)
        vocabulary = TokenizersVocabulary(str(source), extra_ids=9, mask_token="")
    elif kind == "vocab.txt":  # with what is said beside it
        source.write_text("[UNK]\n<end>\nlazy\nfox\nLazy\n")
        config = {"do_lower_case": False, "eos_token": "<end>", "bos_token": None}
        (source.parent / "tokenizer_config.json").write_text(json.dumps(config))
        vocabulary = TokenizersVocabulary(str(source))
    else:
        train_byte_level(TEXTS, source, vocab_size=300)
        vocabulary = TokenizersVocabulary(
            str(source), start_token="</s>" if kind == "bart" else None
        )
    folder = tmp_path / "run"
    run_of(vocabulary).write(str(folder))
    shutil.rmtree(source.parent)
    moved = folder.rename(tmp_path / "moved")  # nothing in it knows where it was
    found = Run.read(str(moved))
    assert found.vocabulary.path == str(moved / "vocabulary.model")
    assert found.vocabulary.fingerprint == found.vocabulary_fingerprint == vocabulary.fingerprint
    assert found.vocabulary.decode(found.vocabulary.encode("lazy fox")) == "lazy fox"
    for name in ("size", "pad_id", "eos_id", "unk_id", "bos_id", "mask_id", "start_id"):
        assert getattr(found.vocabulary, name) == getattr(vocabulary, name), name
    found.write(str(moved))  # over itself
    assert Run.read(str(moved)) == found


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match=r"is not a run's folder: it has no run.json"):
        Run.read(str(tmp_path))
    (tmp_path / "run.json").write_text('{"model": ')
    with pytest.raises(InputError, match=r"run.json' is not readable JSON"):
        Run.read(str(tmp_path))
    (tmp_path / "run.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"run.json' is not readable JSON"):
        Run.read(str(tmp_path))
    run_of().write(str(tmp_path))
    record = json.loads((tmp_path / "run.json").read_text())
    del record["vocabulary"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"run.json' is not the record of a run .*'vocabulary'"):
        Run.read(str(tmp_path))
    run_of().write(str(tmp_path))
    text = (tmp_path / "run.json").read_text().replace("ModelConfig", "ModelSettings")
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"record of class 'ModelSettings': expected one of"):
        Run.read(str(tmp_path))


# --- loading -------------------------------------------------------------------------------------


def store(folder, session, trainable, **fields):
    """A run's folder with one checkpoint, of step 1."""
    run_of(transform=session.transform, seed=session.seed, **fields).write(str(folder))
    checkpointer = Checkpointer(str(folder))
    checkpointer.save(1, trainable, {"count": jnp.int32(1)}, {})
    checkpointer.wait()
    checkpointer.close()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """`(folder of the base, folder of adapters on it, base, adapters)`, written on 8x1x1."""
    base_dir, lora_dir = (tmp_path_factory.mktemp(name) for name in ("base", "lora"))
    session = Session(MODEL, Full(), Partitioner())
    base = jax.device_put(harness.host_params(MODEL), shardings(session.base_shapes))
    store(base_dir, session, base)
    lora = Session(MODEL, LORA, Partitioner())
    adapters, frozen = lora.split(base)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: jax.device_put((0.1 * rng.normal(size=x.shape)).astype(np.float32), x.sharding),
        adapters,
    )
    fields = {
        "base": RunCheckpoint(str(base_dir), 1),
        "base_fingerprint": trees.fingerprint(frozen),
    }
    store(lora_dir, lora, adapters, **fields)
    return base_dir, lora_dir, base, adapters


def test_parameters_load_onto_another_mesh(tuned):
    base_dir, _, base, _ = tuned
    session, found, frozen = load(RunCheckpoint(str(base_dir)), CUBE)
    assert frozen == {}
    assert session.config == MODEL
    jax.tree.map(np.testing.assert_array_equal, found, base)
    kernel = found["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 32)


def test_restored_adapters_compute_what_they_computed(tuned):
    _, lora_dir, base, adapters = tuned
    batch = common.random_batch(MODEL)
    session, found, frozen = load(RunCheckpoint(str(lora_dir)), Partitioner())
    assert session.transform == LORA
    jax.tree.map(np.testing.assert_array_equal, (found, frozen), (adapters, base))
    logits = jax.jit(lambda params: session.model.apply({"params": params}, batch))
    expected = logits(LORA.apply(adapters, base))
    np.testing.assert_array_equal(logits(session.transform.apply(found, frozen)), expected)
    merged = load_params(RunCheckpoint(str(lora_dir)), MODEL, Partitioner())
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(merged) / scale, expected / scale, rtol=1e-5, atol=1e-5)


def test_adapters_refuse_another_base(tuned, tmp_path):
    _, lora_dir, base, _ = tuned
    kernel = trees.flatten(base)["decoder/layers/mlp/wi_0/kernel"]
    changed = trees.flatten(base) | {
        "decoder/layers/mlp/wi_0/kernel": kernel.at[1, 2, 3].set(
            jnp.nextafter(kernel[1, 2, 3], 9.0)
        )
    }
    store(tmp_path / "other", Session(MODEL), trees.unflatten(changed))
    shutil.copytree(lora_dir, tmp_path / "lora")
    run = Run.read(str(tmp_path / "lora"))
    run = dataclasses.replace(run, base=RunCheckpoint(str(tmp_path / "other"), 1))
    run.write(str(tmp_path / "lora"))
    with pytest.raises(InputError, match=r"the frozen weights from '.*other' have fingerprint .*"):
        load(RunCheckpoint(str(tmp_path / "lora")), Partitioner())
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(InputError, match=r"other' is not a run's folder"):
        load(RunCheckpoint(str(tmp_path / "lora")), Partitioner())


def test_a_model_of_other_shapes_does_not_load(tuned):
    wider = common.with_stacks(MODEL, mlp_dim=128)
    with pytest.raises(InputError, match=r"of another model .* decoder.mlp_dim=64, not 128"):
        load_params(RunCheckpoint(str(tuned[0])), wider, Partitioner())
    with pytest.raises(InputError, match=r"has no checkpoint of step 5"):
        load_params(RunCheckpoint(str(tuned[0]), 5), MODEL, Partitioner())


def test_weights_of_a_model_that_computes_something_else_do_not_load(tuned):
    other = common.with_stacks(MODEL, norm_epsilon=0.1)
    with pytest.raises(InputError, match=r"of another model than this one: .*norm_epsilon"):
        load_params(RunCheckpoint(str(tuned[0])), other, Partitioner())
