"""PEFT's adapters: the same logits in both directions, and nothing lost on the way.

The fixtures are made by tests/fixtures/peft/make.py with PEFT itself; its `export` and `check` let
PEFT load what we save.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors.flax import save_file

from t5x_lite import trees
from t5x_lite.interop import load_hf
from t5x_lite.interop.peft_adapters import load_peft, save_peft
from t5x_lite.models import transformer
from t5x_lite.models.config_positions import Learned
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.ia3 import IA3
from t5x_lite.peft.lora import DoRA, LoRA
from t5x_lite.peft.transform import Full
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError
from tests.common import FAMILIES, with_stacks

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "peft"
KINDS = ["adapter", "rslora", "dora", "ia3"]
ADAPTERS = [f"{name}/{kind}" for name in ("t5", "gpt2") for kind in KINDS] + ["t5/patterns"]
APPLIED = ["t5/adapter", "gpt2/dora", "gpt2/ia3"]  # to be compiled: the others are merged
_spec = importlib.util.spec_from_file_location("make_peft_fixtures", FIXTURES / "make.py")
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.fixture(scope="module")
def models():
    return {name: load_hf(str(FIXTURES / name / "base")) for name in ("t5", "gpt2")}


@functools.cache
def merged_apply(model):
    return jax.jit(model.apply)


def logits(models, name, transform, trainable):
    """Of the merged weights: one compilation for all adapters of a model."""
    model, params = models[name]
    batch = {f"{key}_input_tokens": np.int32(x) for key, x in make.inputs(name).items()}
    return merged_apply(model)({"params": transform.merge(trainable, params)}, batch)


def tensors(folder):
    found = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return {key: value for key, value in found.items() if "base_layer" not in key}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logits_with_an_adapter_are_pefts(models, adapter):
    name = adapter.split("/")[0]
    model, params = models[name]
    transform, trainable = load_peft(str(FIXTURES / adapter), model)
    expected = np.load(FIXTURES / adapter / "logits.npy")
    np.testing.assert_allclose(logits(models, name, transform, trainable), expected, 1e-4, 1e-4)
    if adapter in APPLIED:
        batch = {f"{key}_input_tokens": np.int32(x) for key, x in make.inputs(name).items()}
        found = jax.jit(model.apply)({"params": transform.apply(trainable, params)}, batch)
        np.testing.assert_allclose(found, expected, 1e-4, 1e-4)
    # What training makes of the transform has the same leaves.
    split = functools.partial(transform.split, params, transformer.axes(model))
    fresh, _ = jax.eval_shape(split, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, trainable)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_saving_gives_back_what_peft_wrote(tmp_path, models, adapter):
    name = adapter.split("/")[0]
    transform, trainable = load_peft(str(FIXTURES / adapter), models[name][0])
    save_peft(str(tmp_path / "out"), models[name][0], transform, trainable, base="where")
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    theirs = json.loads((FIXTURES / adapter / "adapter_config.json").read_text())
    same = ["peft_type", "task_type", "fan_in_fan_out", "modules_to_save"]
    if settings["peft_type"] == "LORA":
        same += ["bias", "r", "lora_alpha", "use_rslora", "use_dora"]
    for key in same:
        assert settings[key] == theirs[key], key
    assert settings["base_model_name_or_path"] == "where"
    wanted, found = tensors(FIXTURES / adapter), tensors(tmp_path / "out")
    if adapter == "t5/patterns":  # layers without an adapter have one of zeros
        assert wanted.keys() < found.keys()
        assert settings["rank_pattern"] == {"lm_head": 4}
        assert set(settings["alpha_pattern"].values()) == {7}
    else:
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(found[key], value, key)
    again, tree = load_peft(str(tmp_path / "out"), models[name][0])
    np.testing.assert_allclose(
        logits(models, name, again, tree), logits(models, name, transform, trainable), 1e-5, 1e-5
    )


def ours(models, name, *targets, seed=2):
    model, params = models[name]
    transform = LoRA(rank=3, alpha=4.0, targets=targets)
    trainable, _ = transform.split(params, transformer.axes(model), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return transform, jax.tree.map(
        lambda x: x + rng.normal(0, 0.3, x.shape).astype("f4"), trainable
    )


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("t5", [".*/(query|value|wi_1)/kernel", "lm_head/kernel"]),
        ("gpt2", [".*/(query|key|value|out|wo)/kernel"]),
        ("gpt2", [".*/(query|value)/kernel"]),
    ],
)
def test_ours_come_back_computing_the_same(tmp_path, models, name, targets):
    transform, trainable = ours(models, name, *targets)
    save_peft(str(tmp_path / "out"), models[name][0], transform, trainable)
    again, tree = load_peft(str(tmp_path / "out"), models[name][0])
    np.testing.assert_allclose(
        logits(models, name, again, tree), logits(models, name, transform, trainable), 1e-4, 1e-4
    )
    if name == "gpt2":  # an A for each: blocks in PEFT's one
        count = 3 if "key" in targets[0] else 2
        settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
        fused = "transformer.h.0.attn.c_attn"
        assert settings["rank_pattern"][fused] == 3 * count
        assert settings["alpha_pattern"][fused] == 4 * count
        saved = tensors(tmp_path / "out")
        assert saved[f"base_model.model.{fused}.lora_A.weight"].shape == (3 * count, 16)
        b = saved[f"base_model.model.{fused}.lora_B.weight"]
        assert b.shape == (48, 3 * count)
        assert not b[:16, 3:].any()  # the query's rows see its own block alone
        assert b[:16, :3].all()


BERT = with_stacks(FAMILIES["bert"], positions=Learned(max_length=32))
ONES = {
    "bert": (BERT, "bert.encoder.layer.1.attention.self.query"),
    "llama": (FAMILIES["llama"], "model.layers.1.self_attn.k_proj"),
    "bart": (FAMILIES["bart"], "model.decoder.layers.1.encoder_attn.v_proj"),
    "t5": (FAMILIES["t5_1_0"], "decoder.block.1.layer.2.DenseReluDense.wi"),
}


@pytest.mark.parametrize("name", ONES)
def test_adapters_of_every_architecture_come_back(tmp_path, name):
    config, module = ONES[name]
    model = transformer.Transformer(config)
    transform = LoRA(rank=2, alpha=3.0, targets=(".*layers/.*/kernel",))
    structs = jax.eval_shape(lambda key: transformer.init(model, key), jax.random.key(0))
    shapes = jax.eval_shape(
        lambda base: transform.split(base, transformer.axes(model), jax.random.key(0))[0], structs
    )
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), shapes)
    save_peft(str(tmp_path / "out"), model, transform, trainable)
    assert f"base_model.model.{module}.lora_A.weight" in tensors(tmp_path / "out")
    again, found = load_peft(str(tmp_path / "out"), model)
    assert (again.rank, again.alpha) == (2, 3.0)
    assert len(trees.flatten(found)) == len(trees.flatten(trainable))
    for path, leaf in trees.flatten(found).items():
        np.testing.assert_array_equal(leaf, trees.flatten(trainable)[path], path)


def test_bfloat16_and_placement(tmp_path, models):
    folder = tmp_path / "low"
    shutil.copytree(FIXTURES / "t5/adapter", folder)
    low = {key: jnp.asarray(x, "bfloat16") for key, x in tensors(folder).items()}
    save_file(low, folder / "adapter_model.safetensors", {"format": "pt"})
    partitioner = Partitioner(data=-1, fsdp=2, model=2)
    _, trainable = load_peft(str(folder), models["t5"][0], partitioner=partitioner)
    _, wanted = load_peft(str(FIXTURES / "t5/adapter"), models["t5"][0])
    flat = trees.flatten(trainable)
    for path, leaf in trees.flatten(wanted).items():
        np.testing.assert_allclose(flat[path], leaf, 1e-2, err_msg=path)
    a = flat["encoder/layers/self_attention/query/kernel/a"]
    assert a.sharding.spec == partitioner.spec(("layers", "embed", "rank"))


def changed(folder, drop=(), add=None, **settings):
    shutil.copytree(FIXTURES / "t5/adapter", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    kept = {key: value for key, value in tensors(folder).items() if key not in drop}
    safetensors.numpy.save_file(kept | (add or {}), folder / "adapter_model.safetensors")
    return str(folder)


KEY = "base_model.model.encoder.block.1.layer.0.SelfAttention.q.lora_{}.weight"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_dora": True}, "SelfAttention.q' lacks its lora_magnitude_vector"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA': expected one of LORA, IA3, PROMPT"),
        ({"peft_type": "IA3"}, "weight' (3, 16) is no ia3_l of a linear module"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save=['classifier']"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"drop": [KEY.format("B")]}, "SelfAttention.q' lacks its lora_B"),
        ({"add": {KEY.format("A"): np.ones((3, 5), "f4")}}, "shape (3, 5), expected (3, 16)"),
        (
            {"add": {"base_model.model.decoder.block.7.q.lora_A.weight": np.ones((3, 5), "f4")}},
            "no module 'decoder.block.7.q'",
        ),
        ({"add": {"base_model.model.shared.weight": np.ones((3, 5), "f4")}}, "shared.weight' (3, "),
    ],
)
def test_what_is_not_lora_or_does_not_fit_is_named(tmp_path, models, changes, expected):
    with pytest.raises(InputError) as caught:
        load_peft(changed(tmp_path / "x", **changes), models["t5"][0])
    assert expected in str(caught.value)


def test_missing_and_damaged_files_are_named(tmp_path, models):
    model = models["t5"][0]
    with pytest.raises(InputError, match="no PEFT adapter"):
        load_peft(str(tmp_path), model)
    folder = Path(changed(tmp_path / "x"))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"adapter_model.safetensors' is damaged or cut short"):
        load_peft(str(folder), model)
    file.unlink()
    with pytest.raises(InputError, match="pickles"):
        load_peft(str(folder), model)


def test_pissa_is_saved_as_what_it_adds(tmp_path, models):
    model, params = models["t5"]
    names = transformer.axes(model)
    for kind in (LoRA, DoRA):
        pissa = kind(rank=2, alpha=4.0, targets=("decoder/.*/query/kernel",), init="pissa")
        trainable, frozen = pissa.split(params, names, jax.random.key(0))
        rng = np.random.default_rng(0)
        trainable = jax.tree.map(
            lambda x, rng=rng: x * (1 + 0.3 * rng.normal(size=x.shape).astype("f4")), trainable
        )
        folder = tmp_path / kind.__name__
        with pytest.raises(InputError, match="save_peft needs the base's `params`"):
            save_peft(str(folder), model, pissa, trainable)
        save_peft(str(folder), model, pissa, trainable, params=params)
        plain, tree = load_peft(str(folder), model)
        assert (type(plain), plain.rank, plain.init) == (kind, 4, "lora")
        found = trees.flatten(plain.merge(tree, params))
        for path, leaf in trees.flatten(pissa.merge(trainable, frozen)).items():
            np.testing.assert_allclose(found[path], leaf, 1e-4, 1e-5, err_msg=path)


def test_ranks_and_alphas_of_paths_come_back(tmp_path, models):
    model, params = models["gpt2"]
    rules = {
        "rank_rules": ((".*/key/kernel", 1), (".*/out/kernel", 3)),
        "alpha_rules": ((".*/value/kernel", 7.0),),
    }
    targets = (".*/(query|key|value|out)/kernel",)
    for stabilised in (False, True):
        lora = LoRA(rank=2, alpha=4.0, targets=targets, rank_stabilised=stabilised, **rules)
        shapes = jax.eval_shape(
            lambda base, lora=lora: lora.split(base, transformer.axes(model), jax.random.key(0))[0],
            params,
        )
        rng = np.random.default_rng(0)
        tree = jax.tree.map(lambda x, rng=rng: rng.normal(size=x.shape).astype("f4"), shapes)
        folder = tmp_path / str(stabilised)
        save_peft(str(folder), model, lora, tree)
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["rank_pattern"]["transformer.h.1.attn.c_attn"] == 2 + 1 + 2
        assert settings["use_rslora"] == stabilised
        again, found = load_peft(str(folder), model)
        assert again.rank_stabilised == stabilised
        found = trees.flatten(again.merge(found, params))
        for path, leaf in trees.flatten(lora.merge(tree, params)).items():
            np.testing.assert_allclose(found[path], leaf, 1e-4, 1e-4, err_msg=path)


def test_what_peft_has_no_place_for_is_refused(tmp_path, models):
    model = models["gpt2"][0]
    parts = {"decoder": {"layers": {"self_attention": {}}}}
    shape = {"a": (2, 16, 1), "b": (2, 1, 2, 8), "magnitude": (2, 2, 8), "multiplier": (2, 16)}
    leaf = lambda *names: {"kernel": {name: np.ones(shape[name], "f4") for name in names}}
    parts["decoder"]["layers"]["self_attention"]["query"] = leaf("a", "b", "magnitude")
    with pytest.raises(InputError, match=r"one magnitude for all of 'transformer.h.0.attn.c_attn'"):
        save_peft(str(tmp_path / "out"), model, DoRA(rank=1), parts)
    parts["decoder"]["layers"]["self_attention"]["query"] = leaf("multiplier")
    at_inputs = IA3(outputs=(), inputs=(".*query/kernel",))
    with pytest.raises(InputError, match=r"multiplies the inputs of 'transformer.h.0.attn.c_attn'"):
        save_peft(str(tmp_path / "out"), model, at_inputs, parts)
    both = Compose((LoRA(rank=1), IA3()))
    parts["decoder"]["layers"]["self_attention"]["query"] = leaf("a", "b", "multiplier")
    with pytest.raises(InputError, match="PEFT has no adapter that is LoRA and IA3 at once"):
        save_peft(str(tmp_path / "out"), model, both, parts)
    with pytest.raises(InputError, match="no Full of ours"):
        save_peft(str(tmp_path / "out"), model, Full(), {})
    transform, trainable = ours(models, "gpt2", "token_embedding/embedding")
    with pytest.raises(InputError, match="no linear module for the adapted token_embedding"):
        save_peft(str(tmp_path / "out"), model, transform, trainable)
    assert not (tmp_path / "out").exists()
