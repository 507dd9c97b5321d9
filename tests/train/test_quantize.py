"""Folders with quantised weights: asked, tuned beside without the float ones, refused elsewhere."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from t5x_lite import trees
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.models import weights
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.quantise import Quantise
from t5x_lite.peft.quantised import QuantisedWeight
from t5x_lite.peft.transform import Freeze, Full
from t5x_lite.train import logits, loop
from t5x_lite.train import run as runs
from t5x_lite.train.convert import save_run
from t5x_lite.train.opening import open_model
from t5x_lite.train.quantize import quantize
from t5x_lite.types import InputError
from tests.train import harness

NF4 = Quantise(block=8, double_quantisation=True)
QLORA = Compose((LoRA(rank=2), NF4))
HERE = harness.one_device()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run's folder and its quantised one, with what quantize told."""
    root = tmp_path_factory.mktemp("quantised")
    vocabulary = ByteVocabulary()
    run = runs.Run(harness.MODEL, Full(), vocabulary, vocabulary.fingerprint)
    params = jax.device_put(harness.host_params(harness.MODEL))
    save_run(str(root / "base"), run, params, {}, 0)
    sizes = quantize(
        source=str(root / "base"),
        output=str(root / "nf4"),
        block=8,
        double_quantisation=True,
        partitioner=HERE,
    )
    return root, sizes


def test_a_folder_is_smaller_and_answers_alike(folders):
    root, sizes = folders
    assert sizes.memory[1] < 0.7 * sizes.memory[0]  # embeddings and head are most of it
    loaded = open_model(str(root / "nf4"), partitioner=HERE)
    flat = trees.flatten(loaded.params, is_leaf=weights.is_node)
    nodes = {path for path, leaf in flat.items() if isinstance(leaf, QuantisedWeight)}
    assert len(nodes) == 3 * 4 + 2 * 3
    whole = open_model(str(root / "base"), partitioner=HERE)
    change = logits.logit_change(
        logits.answers(whole.model, whole.params, HERE),
        logits.answers(loaded.model, loaded.params, HERE),
    )
    assert change == sizes.change
    assert 0 < change.root_mean_square < 0.5 * change.spread
    assert f"{change.largest:.4g}" in str(change)


@pytest.fixture(scope="module")
def tuned(folders, tmp_path_factory):
    """A run of QLoRA from the quantised folder, in which no weight was made whole."""
    root, _ = folders
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantisedWeight, "dense", None)
        loop.train(
            **harness.tiny_run(
                root / "tuned",
                tmp_path_factory.mktemp("data"),
                transform=QLORA,
                initial=runs.RunCheckpoint(str(root / "nf4")),
                total_steps=2,
                evaluations=[],
                eval_period=None,
                microbatches=1,
            )
        )
        return runs.load(runs.RunCheckpoint(str(root / "tuned")), HERE)


def test_tuning_starts_from_the_codes_themselves(folders, tuned):
    root, _ = folders
    _, trainable, frozen = tuned
    _, stored, _ = runs.load(runs.RunCheckpoint(str(root / "nf4")), HERE)
    jax.tree.map(np.testing.assert_array_equal, frozen, stored)
    assert any(np.any(leaf) for p, leaf in trees.flatten(trainable).items() if p.endswith("/b"))


def test_a_tuned_run_opens_by_itself_and_as_an_adapter(folders, tuned):
    root, _ = folders
    alone = open_model(str(root / "tuned"), partitioner=HERE)
    beside = open_model(str(root / "nf4"), adapter=str(root / "tuned"), partitioner=HERE)
    jax.tree.map(np.testing.assert_array_equal, alone.params, beside.params)
    with pytest.raises(InputError, match="is no adapter: it holds a whole model"):
        open_model(str(root / "base"), adapter=str(root / "nf4"), partitioner=HERE)


@pytest.mark.slow
def test_a_quantised_folder_merges_to_plain_arrays(folders, tuned):
    root, _ = folders
    merged = runs.load_params(runs.RunCheckpoint(str(root / "tuned")), harness.MODEL, HERE)
    base = harness.host_params(harness.MODEL)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(merged) == shapes(base)


def test_what_a_rule_draws_anew_stands_beside_codes(folders):
    root, _ = folders
    rules = (("lm_head/kernel", None),)
    session = runs.Session(harness.MODEL, QLORA, HERE)
    source = runs.RunCheckpoint(str(root / "nf4"), restore=rules)
    base = trees.flatten(runs.load_base(source, session), is_leaf=weights.is_node)
    assert sum(isinstance(leaf, QuantisedWeight) for leaf in base.values()) == 18
    assert not isinstance(base["lm_head/kernel"], QuantisedWeight)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Full(), "are quantised, and Full needs them in full"),
        (LoRA(), "are quantised, and LoRA needs them in full"),
        (Compose((LoRA(), Quantise("int8"))), "make the two alike"),
        (
            Compose((Freeze((".*/query/kernel",)), NF4)),
            "query/kernel' is to be trained, and the weights in '.*' have it quantised",
        ),
    ],
)
def test_a_transform_that_does_not_fit_is_refused(folders, transform, message):
    root, _ = folders
    source = runs.RunCheckpoint(str(root / "nf4"))
    with pytest.raises(InputError, match=message):
        runs.load_base(source, runs.Session(harness.MODEL, transform, HERE))


def test_a_run_that_cannot_take_quantised_weights_leaves_nothing(folders, tmp_path):
    root, _ = folders
    with pytest.raises(InputError, match="Full needs them in full"):
        loop.train(
            **harness.tiny_run(
                tmp_path / "run",
                tmp_path,
                initial=runs.RunCheckpoint(str(root / "nf4")),
            )
        )
    assert not (tmp_path / "run").exists()


def test_quantize_says_what_it_cannot_do(folders, tmp_path):
    root, _ = folders
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    ask = {"source": str(root / "base"), "output": str(tmp_path / "new"), "partitioner": HERE}
    for changes, message in (
        ({"output": str(tmp_path / "full")}, "is not empty"),
        ({"source": str(tmp_path)}, "is of no known format"),
        ({"source": str(root / "nf4")}, "is quantised already"),
        ({}, "blocks of 64 do not divide the 16 inputs"),
        ({"targets": (".*/querry/kernel",)}, "matches no parameter"),
        ({"kind": "int4"}, "Quantise.kind='int4'"),
    ):
        with pytest.raises(InputError, match=message):
            quantize(**{**ask, **changes})
    assert not (tmp_path / "new").exists()


def test_a_run_record_holds_its_transform():
    record = runs.to_record(Compose((LoRA(), NF4)))
    assert runs.from_record(record, runs.CLASSES) == Compose((LoRA(), NF4))
    assert dataclasses.replace(NF4, kind="int8") != NF4
