"""Weights keep what they compute through every format, and what can't be done is said at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer

from t5x_lite import trees
from t5x_lite.data.objectives.base import wrap
from t5x_lite.data.vocabularies import (
    ByteVocabulary,
    train_byte_level,
    train_sentencepiece,
    train_wordpiece,
)
from t5x_lite.interop import load_hf, save_hf
from t5x_lite.interop.hf_tokenizers import find_vocabulary
from t5x_lite.models.config_positions import Learned
from t5x_lite.peft.transform import Full
from t5x_lite.sharding import Partitioner
from t5x_lite.train import run as runs
from t5x_lite.train.checkpoint import Checkpointer, find_step
from t5x_lite.train.convert import convert, run_model, run_vocabulary
from t5x_lite.train.optim import Adafactor, AdamW
from t5x_lite.train.session import Session
from t5x_lite.types import InputError
from tests.common import FAMILIES, T5, build, with_stacks
from tests.interop.t5x_writer import adafactor_tree, t5x_tree, write_native

PEFT = Path(__file__).resolve().parents[1] / "fixtures" / "peft"
CONFIG = dataclasses.replace(T5, vocab_size=416)


def parameters(folder):
    run = runs.Run.read(str(folder))
    return run, runs.load_params(runs.RunCheckpoint(str(folder)), run.model, Partitioner())


def same(found, wanted, tolerance=0.0):
    found = trees.flatten(found)
    for path, leaf in trees.flatten(wanted).items():
        np.testing.assert_allclose(found[path], leaf, tolerance, tolerance, err_msg=path)


@pytest.fixture(scope="module")
def t5x(tmp_path_factory):
    """`(folder, params)` of a T5X checkpoint with Adafactor's state of step 7."""
    _, params = build(CONFIG)
    moments = jax.tree.map(lambda x: np.abs(np.asarray(x)) + 0.1, params)
    tree = adafactor_tree(t5x_tree(moments), 7)
    folder = tmp_path_factory.mktemp("t5x") / "checkpoint_7"
    return str(write_native(folder, t5x_tree(params), tree)), params


def test_t5x_to_a_run_to_transformers_and_back(tmp_path, t5x):
    source, params = t5x
    run, hf, again = (str(tmp_path / name) for name in ("run", "hf", "again"))
    convert(source=source, output=run, to="run", vocabulary=ByteVocabulary())
    found, loaded = parameters(run)
    assert found.model == CONFIG
    assert found.vocabulary_fingerprint == ByteVocabulary().fingerprint
    same(loaded, params)
    assert run_model(model_dir=run) == CONFIG
    assert run_vocabulary(model_dir=run) == ByteVocabulary()
    convert(source=run, output=hf, to="hf")
    same(load_hf(hf)[1], params)
    convert(source=hf, output=again, to="run", vocabulary=ByteVocabulary())
    same(parameters(again)[1], params)
    convert(source=source, output=str(tmp_path / "direct"), to="hf")
    same(load_hf(str(tmp_path / "direct"))[1], params)


def test_a_sentencepiece_file_goes_along(tmp_path, t5x):
    spiece = tmp_path / "trained.model"
    vocabulary = train_sentencepiece(TEXTS, spiece, vocab_size=298)
    convert(source=t5x[0], output=str(tmp_path / "run"), to="run", vocabulary=vocabulary)
    convert(source=str(tmp_path / "run"), output=str(tmp_path / "hf"), to="hf")
    assert (tmp_path / "hf/spiece.model").read_bytes() == spiece.read_bytes()
    convert(source=str(tmp_path / "hf"), output=str(tmp_path / "again"), to="run")
    found = runs.Run.read(str(tmp_path / "again"))
    assert found.vocabulary_fingerprint == vocabulary.fingerprint


def test_a_tokenizers_file_goes_along(tmp_path, t5x):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    train_byte_level(
        ["the river and the bread of day 7"] * 9, folder / "tokenizer.json", vocab_size=300
    )
    convert(source=t5x[0], output=str(tmp_path / "hf"), to="hf", tokenizer=str(folder))
    convert(source=str(tmp_path / "hf"), output=str(tmp_path / "run"), to="run")
    convert(source=str(tmp_path / "run"), output=str(tmp_path / "again"), to="hf")
    convert(source=str(tmp_path / "again"), output=str(tmp_path / "last"), to="run")
    first, last = (runs.Run.read(str(tmp_path / name)) for name in ("run", "last"))
    assert first.vocabulary_fingerprint == last.vocabulary_fingerprint
    for name in ("pad_id", "eos_id", "bos_id", "mask_id", "start_id"):
        assert getattr(first.vocabulary, name) == getattr(last.vocabulary, name), name


TEXTS = [f"the river {i} and the bread of day {i * 7}" for i in range(300)]
VOCABULARIES = {  # for a family: what it is trained with here, unlike what it was published with
    "bert": lambda path: train_wordpiece(TEXTS, path, vocab_size=120),
    "gpt2": lambda path: train_byte_level(TEXTS, path, vocab_size=290),
    "llama": lambda path: dataclasses.replace(
        train_sentencepiece(TEXTS, path, vocab_size=298), start_token="</s>"
    ),
    "t5_1_0": lambda path: ByteVocabulary(extra_ids=7),
    "bart": lambda path: train_byte_level(
        TEXTS, path, vocab_size=290, special_tokens=["<pad>", "<mask>", "</s>", "<s>", "<unk>"]
    ),
}


@pytest.mark.parametrize("family", VOCABULARIES)
def test_special_tokens_are_the_vocabularys_own(family, tmp_path):
    vocabulary = VOCABULARIES[family](tmp_path / "trained")
    config = dataclasses.replace(FAMILIES[family], vocab_size=416)
    if family == "bert":
        config = with_stacks(config, positions=Learned(max_length=32))
    run = runs.Run(config, Full(), vocabulary, vocabulary.fingerprint)
    checkpointer = Checkpointer(str(tmp_path / "run"))
    checkpointer.save(0, build(config)[1], {}, {})
    checkpointer.wait()
    checkpointer.close()
    run.write(str(tmp_path / "run"))
    convert(source=str(tmp_path / "run"), output=str(tmp_path / "hf"), to="hf")
    settings = json.loads((tmp_path / "hf/config.json").read_text())
    assert settings["eos_token_id"] == vocabulary.eos_id
    assert settings["pad_token_id"] == vocabulary.pad_id
    if config.decoder is not None:
        key = "bos_token_id" if config.encoder is None else "decoder_start_token_id"
        assert settings[key] == vocabulary.start_id
    found = find_vocabulary(str(tmp_path / "hf"))
    assert found.fingerprint == vocabulary.fingerprint
    for name in ("pad_id", "eos_id", "bos_id", "mask_id", "start_id", "num_sentinels"):
        assert getattr(found, name) == getattr(vocabulary, name), name
    if (tmp_path / "hf/tokenizer.json").exists():  # transformers reads texts as training does
        ids = vocabulary.encode(TEXTS[7])
        expected = wrap(ids, vocabulary) if config.encoder else [vocabulary.start_id, *ids]
        tokenizer = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
        assert tokenizer.encode(TEXTS[7]).ids == list(expected)


def test_a_padding_token_that_moves_positions_is_refused(tmp_path):
    """Hugging Face's RoBERTa counts positions from its padding token's number on."""
    vocabulary = train_byte_level(
        TEXTS, tmp_path / "t.json", vocab_size=290, special_tokens=["<pad>", "<s>", "</s>"]
    )
    roberta = dataclasses.replace(
        FAMILIES["bart"], decoder=None, vocab_size=416, head=FAMILIES["bert"].head
    )
    roberta = dataclasses.replace(
        roberta, encoder=dataclasses.replace(roberta.encoder, num_token_types=1)
    )
    model, params = build(roberta)
    with pytest.raises(
        InputError, match=r"special tokens, roberta would be another model: .*offset"
    ):
        save_hf(str(tmp_path / "hf"), model, params, vocabulary=vocabulary)
    with pytest.raises(InputError, match="300 tokens, and the model 96"):
        save_hf(
            str(tmp_path / "hf"), *build(FAMILIES["gpt2"]), vocabulary=ByteVocabulary(extra_ids=41)
        )


def test_adafactors_state_goes_along_and_a_run_resumes_from_it(tmp_path, t5x):
    source, params = t5x
    run, plain = str(tmp_path / "run"), str(tmp_path / "plain")
    optimizer = Adafactor(learning_rate=1e-3)
    convert(source=source, output=run, to="run", vocabulary=ByteVocabulary(), optimizer=optimizer)
    assert find_step(run) == 7
    session = Session(CONFIG)
    shapes = session.state_shapes(session.optimizer(optimizer))
    checkpointer = Checkpointer(run)
    _, state = checkpointer.restore(7, shapes.params, shapes.opt_state)
    checkpointer.close()
    assert int(state.count) == 7
    norm = params["encoder"]["final_norm"]["scale"]
    found = state.v_row["encoder"]["final_norm"]["scale"]
    np.testing.assert_allclose(found, np.abs(norm) + 0.1, 1e-6)
    with pytest.raises(InputError, match="train with an Adafactor"):
        convert(
            source=source,
            output=plain,
            to="run",
            vocabulary=ByteVocabulary(),
            optimizer=AdamW(learning_rate=1.0),
        )
    convert(source=source, output=plain, to="run", vocabulary=ByteVocabulary())
    checkpointer = Checkpointer(plain)
    with pytest.raises(InputError, match=r"without an optimizer's state: start from it"):
        checkpointer.restore(0, shapes.params, shapes.opt_state)
    checkpointer.close()


@pytest.mark.slow
def test_adapters_go_in_and_out_beside_their_base(tmp_path):
    # A base that bytes fit in: the fixture's is too small for any vocabulary here.
    wide = dataclasses.replace(load_hf(str(PEFT / "t5/base"))[0].config, vocab_size=384)
    params = build(wide)[1]
    write_native(tmp_path / "t5x", t5x_tree(params))
    base, tuned = str(tmp_path / "base"), str(tmp_path / "tuned")
    convert(
        source=str(tmp_path / "t5x"),
        output=base,
        to="run",
        vocabulary=ByteVocabulary(),
        model=wide,
    )
    adapter = str(PEFT / "t5/adapter")
    convert(source=adapter, output=tuned, to="run", base=base)
    run, merged = parameters(tuned)
    assert run.base == runs.RunCheckpoint(base, 0)
    assert run.transform.rank == 3
    before = params["encoder"]["layers"]["self_attention"]["query"]["kernel"]
    after = merged["encoder"]["layers"]["self_attention"]["query"]["kernel"]
    assert np.abs(np.asarray(after) - np.asarray(before)).max() > 0.01
    # Out again: tensor by tensor what PEFT wrote.
    convert(source=tuned, output=str(tmp_path / "peft"), to="peft", base="t5-small")
    name = "adapter_model.safetensors"
    assert (tmp_path / "peft" / name).stat().st_size > 0
    wanted = safetensors.numpy.load_file(PEFT / "t5/adapter" / name)
    found = safetensors.numpy.load_file(tmp_path / "peft" / name)
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, key)
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "t5-small"
    convert(source=adapter, output=str(tmp_path / "merged"), to="hf", base=base)
    same(load_hf(str(tmp_path / "merged"))[1], merged, 1e-6)
    shutil.rmtree(base)
    with pytest.raises(InputError, match="not a run's folder"):
        parameters(tuned)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"source": "nowhere"}, "'nowhere' is not a folder"),
        ({"source": "empty"}, "of no known format: expected one of run.json"),
        ({"to": "gguf"}, r"format 't5x': convert.to='gguf' can be 'run' or 'hf'"),
        ({"to": "peft"}, "can be 'run' or 'hf'"),
        ({"output": "full"}, "'full' is not empty"),
        ({}, "holds no tokenizer's file"),
        ({"vocabulary": ByteVocabulary(extra_ids=400)}, "it is not the model's"),
        ({"source": "adapter"}, "name the model that it belongs to with --base"),
        ({"source": "adapter", "to": "hf", "base": "adapter"}, "expected a whole model"),
        ({"source": "hf", "optimizer": AdamW(learning_rate=1.0)}, "is for a T5X checkpoint"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(tmp_path, monkeypatch, t5x, arguments, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "full/x"):
        Path(name).mkdir(parents=True)
    Path("adapter").symlink_to(PEFT / "t5/adapter")
    if arguments.get("source") == "hf":
        shutil.copytree(PEFT / "t5/base", "hf")
        arguments = {**arguments, "vocabulary": ByteVocabulary()}
    with pytest.raises(InputError, match=expected):
        convert(**{"source": t5x[0], "output": "out", "to": "run", **arguments})
    assert not Path("out/run.json").exists()
