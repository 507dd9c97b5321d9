"""Adapters handed on alone: every transform comes back, and on another base nothing is opened."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from t5x_lite import trees
from t5x_lite.interop import load_hf, read_hf_config
from t5x_lite.models import weights
from t5x_lite.peft.bottleneck import Bottleneck
from t5x_lite.peft.combining import Concatenation, Ties
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.ia3 import IA3
from t5x_lite.peft.lora import DoRA, LoRA
from t5x_lite.peft.prefix import PrefixTuning
from t5x_lite.peft.prompt import PromptTuning
from t5x_lite.peft.quantise import Quantise
from t5x_lite.peft.transform import BitFit, Freeze, Full
from t5x_lite.train import run as runs
from t5x_lite.train.adapters import Adapter, Base, attach, read_adapter, save_adapter
from t5x_lite.train.convert import convert
from t5x_lite.train.merging import combine_adapters, logit_change, merge_adapter
from t5x_lite.train.opening import open_model
from t5x_lite.train.session import Session
from t5x_lite.types import InputError
from tests import folders
from tests.train import harness

PEFT = folders.FIXTURES / "peft" / "gpt2"
TRANSFORMS = {
    "lora": LoRA(rank=2, rank_rules=((".*/query/kernel", 1),), dropout=0.1),
    "pissa": LoRA(rank=2, init="pissa"),
    "dora": DoRA(rank=2, rank_stabilised=True),
    "ia3": IA3(),
    "bottleneck": Bottleneck(size=3),
    "biases": BitFit(),
    "prompt": PromptTuning(length=3),
    "prefix": PrefixTuning(length=3),
    "quantised": Compose((LoRA(rank=1), Quantise(kind="int8"))),
    "composed": Compose((LoRA(rank=1), IA3(outputs=()), Freeze((".*_norm/scale",)))),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return folders.hugging_face("peft/gpt2/base", tmp_path_factory.mktemp("gpt2"))


ONE = {"partitioner": harness.one_device()}
QUICK = {**ONE, "length": 8}


def under(path):
    return Base(str(path), partitioner=harness.one_device())


def tuned(base, transform, folder, seed=0):
    """An adapter's folder, as after some training, and what it holds."""
    config = read_hf_config(str(base))
    session = Session(config, transform, harness.one_device())
    params = load_hf(str(base), partitioner=session.partitioner)[1]
    rng = np.random.default_rng(seed)
    trainable = jax.tree.map(
        lambda x: x * 1.1 + rng.normal(0, 0.1, x.shape).astype(x.dtype), session.split(params)[0]
    )
    adapter = Adapter(
        config, transform, session.fingerprint(params), runs.RunCheckpoint(str(base)), seed=3
    )
    save_adapter(str(folder), adapter, trainable)
    return folder, adapter, trainable


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    return tuned(base, LoRA(rank=2), tmp_path_factory.mktemp("lora") / "adapter")[0]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_comes_back(base, tmp_path, name):
    folder, adapter, trainable = tuned(base, TRANSFORMS[name], tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert read_adapter(str(moved)) == adapter
    found = attach(str(moved), under(base))
    assert found.session.transform == TRANSFORMS[name]
    flat = trees.flatten(found.trainable)
    assert flat.keys() == trees.flatten(trainable).keys()
    for path, leaf in trees.flatten(trainable).items():
        np.testing.assert_array_equal(flat[path], leaf, path)


def test_another_base_is_refused_whatever_the_adapter_came_as(base, lora, tmp_path):
    run = tmp_path / "run"
    convert(source=str(lora), base=str(base), output=str(run), to="run", **ONE)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    some = next(iter(tensors))
    tensors[some] = tensors[some] + np.float32(1e-6)
    safetensors.numpy.save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for adapter in (lora, run):
        attach(str(adapter), under(base))
        message = rf"adapter '{adapter}' was tuned on weights of fingerprint .* '{other}' have"
        with pytest.raises(InputError, match=message):
            attach(str(adapter), under(other))
        with pytest.raises(InputError, match=message):
            open_model(str(other), adapter=str(adapter), partitioner=harness.one_device())
        output = str(tmp_path / "merged")
        with pytest.raises(InputError, match=message):
            merge_adapter(**QUICK, base=str(other), adapter=str(adapter), output=output)
        with pytest.raises(InputError, match="was tuned on weights of fingerprint"):
            convert(source=str(lora), base=str(other), output=output, to="peft", **ONE)
    llama = folders.hugging_face("llama", tmp_path)
    with pytest.raises(InputError, match=rf"adapter '{lora}' does not go on '{llama}'"):
        attach(str(lora), under(llama))


def test_a_run_its_adapter_and_pefts_are_one_model(base, lora, tmp_path):
    """Out of a folder into a run, out of that into a folder, and through PEFT's format."""
    run, again, peft = (str(tmp_path / name) for name in ("run", "again", "peft"))
    convert(source=str(lora), base=str(base), output=run, to="run", **ONE)
    convert(source=run, output=again, to="adapter", **ONE)
    convert(source=again, base=str(base), output=peft, to="peft", **ONE)
    expected = attach(str(lora), under(base)).merged()
    for adapter in (run, again, peft):
        found = open_model(str(base), adapter=adapter, partitioner=harness.one_device())
        dense = jax.tree.map(weights.dense, found.params, is_leaf=weights.is_node)
        flat = trees.flatten(dense)
        for path, leaf in trees.flatten(expected).items():
            np.testing.assert_allclose(flat[path], leaf, 1e-6, 1e-6, err_msg=f"{adapter} {path}")
    assert runs.Run.read(run).vocabulary.encode("alpha").tolist() == [2]


def test_merging_adds_the_adapter_and_says_what_rounding_changes(base, tmp_path, capsys):
    folder, _, _ = tuned(base, TRANSFORMS["lora"], tmp_path / "adapter")
    found = merge_adapter(**QUICK, base=str(base), adapter=str(folder), output=str(tmp_path / "hf"))
    assert 0 < found["largest_change"] < 1e-5 * found["largest_logit"]
    assert "Largest change of a logit on 4 rows of random tokens" in capsys.readouterr().out
    params = load_hf(str(tmp_path / "hf"))[1]
    attached = attach(str(folder), under(base))
    expected = trees.flatten(attached.merged())
    for path, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(leaf, expected[path], path)
    assert (tmp_path / "hf/tokenizer.json").exists()
    # The number is the difference of logits, and not of something else.
    wrong = jax.tree.map(lambda x: x * 1.01, attached.merged())
    assert logit_change(attached, wrong)[0] > 1e-3
    run = str(tmp_path / "run")
    merge_adapter(**QUICK, base=str(base), adapter=str(folder), output=run, to="run")
    opened = open_model(run, partitioner=harness.one_device())
    flat = trees.flatten(opened.params)
    for path, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(flat[path], leaf, path)
    assert runs.Run.read(run).transform == Full()


@pytest.mark.slow
def test_several_adapters_become_one_that_goes_anywhere(base, lora, tmp_path):
    other = tuned(base, TRANSFORMS["pissa"], tmp_path / "other", seed=1)[0]
    both = f"{lora},{other},{PEFT / 'adapter'}"
    arguments = {"base": str(base), "weights": (0.5, 1.0, -0.5), "method": Concatenation()}
    arguments["partitioner"] = harness.one_device()
    for to in ("adapter", "peft", "run"):
        combine_adapters(**arguments, adapters=both, output=str(tmp_path / to), to=to)
    parts = [attach(path, under(base)) for path in both.split(",")]
    merged = [trees.flatten(part.merged()) for part in parts]
    expected = {
        path: leaf
        + sum(w * (m[path] - leaf) for w, m in zip((0.5, 1.0, -0.5), merged, strict=True))
        for path, leaf in trees.flatten(jax.device_get(parts[0].params)).items()
    }
    merge_adapter(**arguments, adapter=both, output=str(tmp_path / "merged"), length=8)
    found = {to: attach(str(tmp_path / to), under(base)).merged() for to in ("adapter", "peft")}
    found["merged"] = load_hf(str(tmp_path / "merged"))[1]
    run = open_model(str(tmp_path / "run"), partitioner=harness.one_device())
    for to, params in found.items():
        flat = trees.flatten(params)
        for path, leaf in expected.items():
            np.testing.assert_allclose(flat[path], leaf, 1e-4, 1e-4, err_msg=f"{to} {path}")
    assert runs.Run.read(str(tmp_path / "run")).transform.rank == 2 + 4 + 3
    assert run.model.config == read_hf_config(str(base))


def test_what_cannot_be_merged_or_combined_is_said_first(base, lora, tmp_path):
    output = str(tmp_path / "out")
    same = {"base": str(base), "output": output, "partitioner": harness.one_device()}
    behind = tuned(base, TRANSFORMS["bottleneck"], tmp_path / "bottleneck")[0]
    ia3 = PEFT / "ia3"
    cases = [
        (lambda: merge_adapter(**same, adapter=str(behind)), "Bottleneck is no linear map"),
        (lambda: merge_adapter(**same, adapter=f"{lora},{ia3}"), "2 adapters and 0 weights"),
        (  # which is what gin makes of (0.7)
            lambda: combine_adapters(**same, adapters=f"{lora},{ia3}", weights=0.7),
            "2 adapters and 1 weights",
        ),
        (
            lambda: combine_adapters(**same, adapters=f"{lora},{ia3}", weights=(1.0, 1.0)),
            "ia3' is IA3, no sum of low-rank updates",
        ),
        (
            lambda: combine_adapters(
                **same, adapters=f"{lora},{PEFT / 'adapter'}", weights=(1.0, 1.0), method=Ties()
            ),
            r"have ranks \[2, 3\], and Ties mixes",
        ),
        (lambda: merge_adapter(**same, adapter=" , "), "no adapter is named"),
        (lambda: merge_adapter(**same, adapter=str(lora), to="peft"), "to='peft': expected one"),
        (
            lambda: merge_adapter(base=str(base), adapter=str(lora), output=str(lora)),
            "is not empty: name a new folder",
        ),
        (lambda: attach(str(base), under(base)), "is no adapter; expected PEFT's with"),
        (
            lambda: convert(source=str(lora), output=output, to="run"),
            "is an adapter: name the model that it belongs to",
        ),
    ]
    for run, message in cases:
        with pytest.raises(InputError, match=message):
            run()
    assert not (tmp_path / "out").exists()


def test_damaged_folders_are_one_message(base, lora, tmp_path):
    def changed(name, change):
        folder = tmp_path / name
        shutil.copytree(lora, folder)
        change(folder)
        return folder

    def cut(folder):
        file = folder / "adapter.safetensors"
        file.write_bytes(file.read_bytes()[:-9])

    def other_rank(folder):
        record = json.loads((folder / "adapter.json").read_text())
        record["transform"]["rank"] = 3
        (folder / "adapter.json").write_text(json.dumps(record))

    cases = {
        "cut": (cut, r"adapter.safetensors' is damaged or cut short"),
        "half": (lambda f: (f / "adapter.json").write_text("{"), "is not the record of an adapter"),
        "empty": (lambda f: (f / "adapter.json").write_text("{}"), "record of an adapter: KeyErr"),
        "rank": (other_rank, r"kernel/a is \(2, 16, 2\), the transform's is \(2, 16, 3\)"),
    }
    for name, (change, message) in cases.items():
        with pytest.raises(InputError, match=message):
            attach(str(changed(name, change)), under(base))
    with pytest.raises(InputError, match="is no adapter: it holds a whole model"):
        Adapter.of_run(dataclasses.replace(_run(base), transform=Full()), "there")


def _run(base):
    return Adapter(read_hf_config(str(base)), LoRA(), None).run(
        under(base).vocabulary(), runs.RunCheckpoint(str(base))
    )
