"""Hugging Face's models in and out, on tiny models that transformers made; no torch is needed.

The fixtures hold what transformers computed: `python tests/fixtures/make_hf.py` makes them anew
where a model is added, and its `--check` compares in the other direction.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t5x_lite import configure, trees, types
from t5x_lite.decode.greedy import greedy
from t5x_lite.interop import load_hf, safetensors_files, save_hf
from t5x_lite.models import transformer
from t5x_lite.models.config_heads import EmbeddingHead
from t5x_lite.sharding import Partitioner
from t5x_lite.train.inspect import inspect_params
from t5x_lite.types import InputError
from tests.interop import common

GREEDY = [name for name in common.NAMES if "greedy_tokens" in common.expected(name)]


@functools.cache
def loaded(name: str, scratch: Path):
    directory = str(common.directory(name, scratch))
    return load_hf(directory, architectures=common.architectures())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


# Values


@pytest.mark.parametrize("name", common.NAMES)
def test_outputs_are_those_of_transformers(name, scratch):
    model, params = loaded(name, scratch)
    arrays = common.expected(name)
    batch = {key: value for key, value in arrays.items() if key in types.BATCH_KEYS}
    types.check_batch(batch)
    found, expected = jax.jit(model.apply)({"params": params}, batch), arrays["outputs"]
    found = np.asarray(found)
    assert found.shape == expected.shape
    counted = np.isfinite(expected)  # a pair's logits are as wide as its two labels
    if found.shape[1] > 3:  # an answer a token: not where there is padding
        stream = "encoder" if model.config.decoder is None else "decoder"
        counted &= batch[f"{stream}_segment_ids"][..., None] > 0
    np.testing.assert_allclose(found[counted], expected[counted], rtol=0, atol=1e-4)
    assert expected[counted].std() > 0.1


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_decoding_is_that_of_transformers(name, scratch):
    model, params = loaded(name, scratch)
    arrays = {
        key.removeprefix("greedy_"): value
        for key, value in common.expected(name).items()
        if key.startswith("greedy_")
    }
    batch = {key: value for key, value in arrays.items() if key in types.BATCH_KEYS}
    decode = functools.partial(
        greedy,
        model,
        max_tokens=arrays["tokens"].shape[1],
        eos_id=int(arrays["eos"]),
        pad_id=0,
        start_id=int(arrays["start"]),
    )
    np.testing.assert_array_equal(jax.jit(decode)(params, batch), arrays["tokens"])


# Files


@pytest.mark.parametrize("name", common.NAMES)
def test_saving_gives_back_the_same_bytes_and_model(name, scratch, tmp_path):
    source = common.directory(name, scratch)
    model, params = loaded(name, scratch)
    save_hf(str(tmp_path / "out"), model, params, architectures=common.architectures())
    before, after = tensors(source), tensors(tmp_path / "out")
    if isinstance(model.config.head, EmbeddingHead):
        before = {key: value for key, value in before.items() if "pooler" not in key}
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        np.testing.assert_array_equal(value, after[key], err_msg=key)
    again, _ = load_hf(str(tmp_path / "out"), architectures=common.architectures())
    assert again.config == model.config
    settings = {
        folder: json.loads((folder / "config.json").read_text())
        for folder in (source, tmp_path / "out")
    }
    assert settings[source]["architectures"] == settings[tmp_path / "out"]["architectures"]


def test_several_files_with_an_index(tmp_path, scratch):
    assert len(list((common.FOLDER / "llama").glob("*.safetensors"))) > 1
    model, params = loaded("llama", scratch)
    save_hf(str(tmp_path / "out"), model, params, file_bytes=3000)
    written = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert written[0] == f"model-00001-of-{len(written):05}.safetensors"
    assert len(written) > 3
    assert all(
        sum(x.nbytes for x in load_file(tmp_path / "out" / name).values()) <= 3000
        for name in written
    )
    _, again = load_hf(str(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_names_of_published_files(tmp_path):
    """GPT-2's lack the class's prefix, old BERT's norms have gamma and beta, causal masks stay."""
    for name, change in (
        ("gpt2", lambda key: key.removeprefix("transformer.")),
        ("bert_mlm", lambda key: re.sub("Norm.weight", "Norm.gamma", key)),
        ("llama_tied", lambda key: key.replace("model.embed_tokens", "lm_head")),
    ):
        folder = tmp_path / name
        shutil.copytree(common.FOLDER / name, folder)
        changed = {change(key): x for key, x in load_file(folder / "model.safetensors").items()}
        if name == "gpt2":
            changed |= {"h.0.attn.bias": np.tril(np.ones((1, 1, 24, 24), np.float32))}
        assert changed.keys() != load_file(folder / "model.safetensors").keys()
        save_file(changed, folder / "model.safetensors")
        _, params = load_hf(str(folder))
        jax.tree.map(np.testing.assert_array_equal, params, load_hf(str(common.FOLDER / name))[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path, dtype):
    """Files of any dtype are read; parameters, and what is saved, have the dtype asked for."""
    source, target = tmp_path / "in", tmp_path / "out"
    shutil.copytree(common.FOLDER / "gpt2", source)
    halves = {
        key: x.astype(jax.numpy.dtype(dtype))
        for key, x in load_file(source / "model.safetensors").items()
    }
    save_file(halves, source / "model.safetensors")
    _, params = load_hf(str(source))
    table = params["token_embedding"]["embedding"]
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, halves["transformer.wte.weight"].astype(np.float32))
    model, params = load_hf(str(source), param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jax.numpy.dtype("bfloat16")}
    save_hf(str(target), model, params)
    written = safetensors_files.open_tensors(str(target))
    for key, x in halves.items():
        np.testing.assert_array_equal(written[key], x.astype(jax.numpy.bfloat16))
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_settings_of_transformers_4_and_5_mean_the_same(tmp_path, scratch):
    for name in ("llama_yarn", "llama_linear", "llama"):
        source = common.directory(name, scratch)
        settings = json.loads((source / "config.json").read_text())
        rope = settings.pop("rope_parameters")
        settings["rope_theta"] = rope.pop("rope_theta")
        settings["rope_scaling"] = None
        if rope["rope_type"] != "default":
            settings["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        shutil.copytree(source, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        assert load_hf(str(tmp_path / name))[0].config == loaded(name, scratch)[0].config


def test_a_tokenizer_comes_along(tmp_path, scratch):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("[PAD]\n")
    (tokenizer / "notes.txt").write_text("not of a tokenizer")
    names = {"0": "bad", "1": "fair", "2": "good"}
    special = {"model_type": "bert", "id2label": names, "hidden_size": 1, "eos_token_id": 9}
    (tokenizer / "config.json").write_text(json.dumps(special))
    save_hf(str(tmp_path / "out"), *loaded("bert_classifier", scratch), tokenizer=str(tokenizer))
    assert (tmp_path / "out" / "vocab.txt").read_text() == "[PAD]\n"
    assert not (tmp_path / "out" / "notes.txt").exists()
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["id2label"], settings["eos_token_id"]) == (names, 9)
    assert settings["hidden_size"] == 8


@pytest.mark.parametrize(
    "head", [EmbeddingHead(pooling="first"), EmbeddingHead(pooling="last", normalise=False)]
)
def test_pooling_is_kept_as_sentence_transformers_does(tmp_path, scratch, head):
    model, params = loaded("bert", scratch)
    config = dataclasses.replace(model.config, head=head)
    save_hf(str(tmp_path / "out"), transformer.Transformer(config), params)
    assert load_hf(str(tmp_path / "out"))[0].config == config
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    modules.append({"path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "out" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match="'Dense'"):
        load_hf(str(tmp_path / "out"))


# Where parameters go


def test_every_leaf_has_its_sharding(scratch):
    partitioner = Partitioner(data=2, fsdp=2, model=2)
    for name in ("t5_classifier", "gpt2_classifier", "llama_classifier"):
        folder = common.FOLDER / name
        _, whole = loaded(name, scratch)
        model, params = load_hf(str(folder), partitioner=partitioner)
        shapes = jax.eval_shape(functools.partial(transformer.init, model), jax.random.key(0))
        shardings = partitioner.tree_shardings(shapes, transformer.axes(model))
        split = 0
        for path, leaf in trees.flatten(params).items():
            assert leaf.sharding == trees.flatten(shardings)[path], path
            split += not leaf.sharding.is_fully_replicated
        assert split > 5
        jax.tree.map(np.testing.assert_array_equal, params, whole)


@pytest.mark.parametrize("partitioner", [None, Partitioner(data=2, fsdp=2, model=2)])
def test_the_host_holds_one_leaf_at_a_time(tmp_path, partitioner):
    """What numpy allocates beyond the parameters themselves is never more than the largest leaf.

    jax may keep such an allocation as the parameter, on CPUs; then it is counted before and after.
    """
    folder = wide_gpt2(tmp_path)
    load_hf(str(folder), partitioner=partitioner)  # caches are filled
    tracemalloc.start()
    try:
        _, params = load_hf(str(folder), partitioner=partitioner)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    total = trees.nbytes(params)
    assert total > 5 * largest
    assert peak - kept < 1.2 * largest
    assert peak < 1.2 * total


def test_saving_holds_one_file_at_a_time(tmp_path):
    model, params = load_hf(str(wide_gpt2(tmp_path)))
    save_hf(str(tmp_path / "once"), model, params)  # caches are filled
    tracemalloc.start()
    try:
        save_hf(str(tmp_path / "out"), model, params, file_bytes=500_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 < trees.nbytes(params) / 4


def wide_gpt2(tmp_path: Path) -> Path:
    """A folder with a GPT-2 of 6 MB, of zeros."""
    settings = json.loads((common.FOLDER / "gpt2" / "config.json").read_text())
    settings |= {"n_embd": 128, "n_inner": 128, "n_layer": 12, "vocab_size": 40, "n_positions": 64}
    width, layers = 128, range(12)
    arrays: dict[str, tuple[int, ...]] = {"wte.weight": (40, width), "wpe.weight": (64, width)}
    for norm in ("ln_f", *(f"h.{i}.ln_{n}" for i in layers for n in (1, 2))):
        arrays |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in layers:
        for name, out in (
            ("attn.c_attn", 3),
            ("attn.c_proj", 1),
            ("mlp.c_fc", 1),
            ("mlp.c_proj", 1),
        ):
            arrays[f"h.{i}.{name}.weight"] = (width, out * width)
            arrays[f"h.{i}.{name}.bias"] = (out * width,)
    folder = tmp_path / "wide"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    zeros = {f"transformer.{key}": np.zeros(shape, np.float32) for key, shape in arrays.items()}
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Errors


def broken(tmp_path: Path, name: str = "gpt2", settings=None, change=None) -> str:
    """The message on a fixture whose settings or tensors were changed."""
    folder = tmp_path / "broken"
    shutil.copytree(common.FOLDER / name, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **(settings or {})}))
    if change is not None:
        arrays = load_file(folder / "model.safetensors")
        change(arrays)
        save_file(arrays, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        load_hf(str(folder))
    return str(error.value)


def test_an_unknown_architecture_is_named(tmp_path):
    text = broken(tmp_path, settings={"model_type": "mistral", "architectures": ["MistralX"]})
    assert "mistral" in text
    assert "MistralX" in text
    assert "t5, bert, roberta, gpt2, llama, bart" in text


def test_a_class_that_is_not_known_is_named(tmp_path):
    text = broken(tmp_path, settings={"architectures": ["GPT2DoubleHeadsModel"]})
    assert "GPT2DoubleHeadsModel" in text
    assert "GPT2LMHeadModel" in text


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "mish"}, "mish"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "lacks the setting 'factor'"),
        ("gpt2", {"n_head": 0}, "a setting that makes no gpt2: "),
        ("gpt2", {"n_embd": "x"}, "a setting that makes no gpt2: "),
        ("roberta", {"pad_token_id": None}, "a setting that makes no roberta: "),
    ],
)
def test_settings_that_are_not_computed_are_refused(tmp_path, name, settings, expected):
    assert expected in broken(tmp_path, name, settings)


def test_all_wrong_tensors_are_named_in_one_message(tmp_path):
    def change(arrays):
        del arrays["transformer.h.1.ln_1.bias"]
        arrays["transformer.h.1.extra.weight"] = np.zeros(1, np.float32)
        arrays["transformer.wte.weight"] = arrays["transformer.wte.weight"][:-1]

    text = broken(tmp_path, change=change)
    assert "no tensor 'transformer.h.1.ln_1.bias'" in text
    assert "decoder/layers/self_attention_norm/bias" in text
    assert "unexpected tensor 'transformer.h.1.extra.weight'" in text
    assert "'transformer.wte.weight' has shape (41, 8), expected (42, 8)" in text


def test_more_layers_than_the_config_says_are_an_error(tmp_path):
    assert "unexpected tensor 'transformer.h.1" in broken(tmp_path, settings={"n_layer": 1})


def test_tied_tensors_that_differ_are_an_error(tmp_path):
    def change(arrays):
        arrays["lm_head.weight"] = arrays["transformer.wte.weight"] + 1.0

    assert "'lm_head.weight' differs from 'transformer.wte.weight'" in broken(
        tmp_path, change=change
    )


def test_a_file_that_is_cut_short_is_named(tmp_path):
    shutil.copytree(common.FOLDER / "llama", tmp_path / "cut")
    part = tmp_path / "cut" / "model-00002-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors' is damaged or cut"):
        load_hf(str(tmp_path / "cut"))
    part.unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors' is not there"):
        load_hf(str(tmp_path / "cut"))


def test_directories_without_a_config_or_weights(tmp_path):
    with pytest.raises(InputError, match="is not a directory"):
        load_hf(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"can't read '.*config\.json'"):
        load_hf(str(tmp_path))
    shutil.copyfile(common.FOLDER / "gpt2" / "config.json", tmp_path / "config.json")
    with pytest.raises(InputError, match=r"has no weights: expected model\.safetensors"):
        load_hf(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*not read"):
        load_hf(str(tmp_path))


def test_what_cannot_be_saved(tmp_path, scratch):
    model, params = loaded("llama", scratch)
    save_hf(str(tmp_path / "out"), model, params)
    with pytest.raises(InputError, match="holds a model already"):
        save_hf(str(tmp_path / "out"), model, params)
    with pytest.raises(InputError, match="lm_head/kernel is None"):
        save_hf(str(tmp_path / "a"), model, {k: v for k, v in params.items() if k != "lm_head"})
    with pytest.raises(InputError, match="holds no tokenizer"):
        save_hf(str(tmp_path / "b"), model, params, tokenizer=str(tmp_path))
    model, params = load_hf(str(common.FOLDER / "gpt_neox"), architectures=common.architectures())
    with pytest.raises(InputError) as error:
        save_hf(str(tmp_path / "c"), model, params)
    assert "gpt2: positions=Rotary" in str(error.value)
    assert "llama: " in str(error.value)
    assert "decoder.residual='parallel', not 'pre'" in str(error.value)


# docs/add_a_model.md


def test_the_page_adds_a_model_of_the_published_size(tmp_path):
    (tmp_path / "pythia_70m.gin").write_text(common.block("gin"))
    with configure.isolated():
        configure.register()
        binding = "inspect_params.model = %MODEL"
        configure.parse([str(tmp_path / "pythia_70m.gin")], [binding])
        built = configure.arguments(inspect_params)["model"]
    model = transformer.Transformer(built)
    shapes = jax.eval_shape(functools.partial(transformer.init, model), jax.random.key(0))
    assert trees.count(shapes) == 70_426_624
    *_, gpt_neox = common.architectures()
    assert gpt_neox.read(gpt_neox.write(built), {}).decoder == built.decoder
    lines = (common.block("gin") + common.block("python")).splitlines()
    assert sum(bool(line.strip()) for line in lines) < 60
