"""PEFT's soft prompts and prefixes: the same logits in both directions.

The fixtures are made by tests/fixtures/peft_prompts/make.py with PEFT itself; its `export` and
`check` let PEFT load what we save.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from t5x_lite.interop import load_hf
from t5x_lite.interop.peft_prompts import load_prompt, save_prompt
from t5x_lite.models import transformer
from t5x_lite.peft.prefix import PrefixTuning
from t5x_lite.peft.transform import Full
from t5x_lite.types import InputError
from tests.common import FAMILIES, with_stacks

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "peft_prompts"
_spec = importlib.util.spec_from_file_location("make_peft_prompts", FIXTURES / "make.py")
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.fixture(scope="module")
def models():
    return {name: load_hf(str(make.BASES / name / "base")) for name in ("t5", "gpt2")}


def read(folder):
    settings = json.loads((folder / "adapter_config.json").read_text())
    return settings, safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def load(folder, model):
    return load_prompt(str(folder), *read(folder), model)


@pytest.mark.parametrize("name", make.NAMES)
def test_logits_are_pefts(models, name):
    model, params = models[name.split("_")[0]]
    transform, trainable = load(FIXTURES / name, model)
    found = make.our_logits(model, params, name, transform, trainable)
    expected = np.load(FIXTURES / name / "logits.npy")
    real = make.padded(name.split("_")[0])["real"] > 0
    if name.startswith("gpt2"):  # what padding says, nobody reads
        found, expected = found[real], expected[real]
    np.testing.assert_allclose(found, expected, 1e-4, 1e-4)
    # What training makes of the transform has the same leaves.
    names = transformer.axes(model)
    fresh = jax.eval_shape(lambda base: transform.split(base, names, jax.random.key(0)), params)[0]
    assert jax.tree.map(lambda x: x.shape, fresh) == jax.tree.map(np.shape, trainable)


@pytest.mark.parametrize("name", make.NAMES)
def test_ours_come_back_bit_for_bit(models, tmp_path, name):
    model = models[name.split("_")[0]][0]
    transform, trainable = make.ours(model, name)
    save_prompt(str(tmp_path), model, transform, trainable, base="where")
    again, tree = load(tmp_path, model)
    assert again.length == transform.length
    jax.tree.map(np.testing.assert_array_equal, tree, trainable)
    settings, theirs = read(tmp_path)[0], read(FIXTURES / name)[0]
    for key in ("peft_type", "task_type", "num_virtual_tokens", "num_transformer_submodules"):
        assert settings[key] == theirs[key]
    assert settings["base_model_name_or_path"] == "where"


def test_every_number_of_layers_has_a_place_for_each(tmp_path):
    for layers in (1, 2, 3, 4):
        config = with_stacks(FAMILIES["t5_1_0"], num_layers=layers)
        model = transformer.Transformer(config)
        transform, trainable = make.ours(model, "t5_prefix")
        save_prompt(str(tmp_path / str(layers)), model, transform, trainable)
        jax.tree.map(
            np.testing.assert_array_equal, load(tmp_path / str(layers), model)[1], trainable
        )


def test_what_does_not_fit_is_refused(models, tmp_path):
    t5, gpt2 = models["t5"][0], models["gpt2"][0]
    with pytest.raises(InputError, match=r"the model's decoder has 2 layers of 2 heads and 16"):
        load(FIXTURES / "t5_prefix", gpt2)
    settings, tensors = read(FIXTURES / "t5_prompt")
    cut = {key: value[:, :3] for key, value in tensors.items()}
    with pytest.raises(InputError, match=r"has shape \(6, 3\), and the model needs \(6, 16\)"):
        load_prompt("here", settings, cut, t5)
    with pytest.raises(InputError, match="holds prompt_embeddings, score: of a PROMPT_TUNING"):
        load_prompt("here", settings, {**tensors, "score": np.zeros(3)}, t5)
    everywhere = PrefixTuning(length=2, targets=(".*/self_attention/(key|value)/kernel",))
    names = transformer.axes(t5)
    shapes = jax.eval_shape(
        lambda base: everywhere.split(base, names, jax.random.key(0)), transformer.shapes(t5)
    )[0]
    trainable = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    with pytest.raises(InputError, match="no place for encoder/layers/self_attention/key"):
        save_prompt(str(tmp_path), t5, everywhere, trainable)
    with pytest.raises(InputError, match="Full is no prompt"):
        save_prompt(str(tmp_path), t5, Full(), {})
