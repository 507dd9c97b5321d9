"""T5X's checkpoints load to the parameters that were written, whatever the format and layout."""

from __future__ import annotations

import dataclasses
import shutil

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from t5x_lite import trees
from t5x_lite.interop.t5x import load_t5x
from t5x_lite.models.config_heads import LMHead
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError
from tests.common import GPT, T5, build, random_batch, with_stacks
from tests.interop.t5x_writer import t5x_tree, write_native, write_orbax

T5_1_0 = with_stacks(
    dataclasses.replace(T5, head=LMHead(tied=True, scaled=True)), mlp_activations=("relu",)
)


def same(found, wanted):
    found, wanted = trees.flatten(found), trees.flatten(wanted)
    assert list(found) == list(wanted)
    for path, leaf in found.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted[path]), path)


@pytest.fixture(scope="module")
def t5():
    return build(T5)


@pytest.mark.parametrize("scanned", [False, True], ids=["layers", "scanned"])
@pytest.mark.parametrize("write", ["native", "ocdbt", "zarr"])
def test_either_layout_of_each_format_gives_the_same_logits(tmp_path, t5, write, scanned):
    model, params = t5
    tree = t5x_tree(params, scanned=scanned)
    if write == "native":
        write_native(tmp_path / "c", tree)
    else:
        write_orbax(tmp_path / "c", tree, ocdbt=write == "ocdbt")
    found_model, found = load_t5x(str(tmp_path / "c"))
    assert found_model.config == model.config
    same(found, params)
    batch = random_batch(model.config)
    np.testing.assert_array_equal(
        found_model.apply({"params": found}, batch), model.apply({"params": params}, batch)
    )


@pytest.mark.parametrize("scanned", [False, True], ids=["layers", "scanned"])
@pytest.mark.parametrize("config", [GPT, T5_1_0], ids=["decoder-only", "t5-1.0"])
def test_the_model_is_told_from_the_checkpoint(tmp_path, config, scanned):
    # An odd width, so that no axis can be taken for another.
    config = with_stacks(dataclasses.replace(config, embed_dim=24), num_layers=3, mlp_dim=40)
    _, params = build(config)
    write_native(tmp_path / "c", t5x_tree(params, scanned=scanned))
    model, found = load_t5x(str(tmp_path / "c"))
    assert model.config == config
    same(found, params)


@pytest.mark.parametrize("ocdbt", [True, False], ids=["ocdbt", "zarr"])
def test_orbaxs_first_versions_had_a_tree_beside_their_arrays(tmp_path, t5, ocdbt):
    model, params = t5
    tree = t5x_tree(params)
    state = tmp_path / "c" / "state"
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
    with ocp.Checkpointer(handler) as checkpointer:
        named = {"_optimizer": {"target": trees.unflatten(tree)}}
        checkpointer.save(state.absolute(), args=ocp.args.PyTreeSave(named))
    leaves = {
        f"_optimizer/target/{path}": f"PLACEHOLDER://_optimizer.target.{path.replace('/', '.')}"
        for path in tree
    }
    content = flax.serialization.msgpack_serialize(trees.unflatten(leaves))
    (state / "checkpoint").write_bytes(content)
    same(load_t5x(str(tmp_path / "c"), config=model.config)[1], params)


def test_a_damaged_database_is_named(tmp_path, t5):
    model, params = t5
    folder = write_orbax(tmp_path / "c", t5x_tree(params))
    files = [path for path in (folder / "state").rglob("d/*") if path.stat().st_size > 2000]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"missing or damaged|not a readable Orbax checkpoint"):
        load_t5x(str(folder), config=model.config)


def test_split_heads_and_the_first_axis_load_too(tmp_path, t5):
    model, params = t5
    split = t5x_tree(params, scanned=True, joined=False)
    first = {  # param_scan_axis = 0
        path: np.moveaxis(leaf, 1, 0) if path.split("/")[1] == path.split("/")[0] else leaf
        for path, leaf in split.items()
    }
    for name, tree in (("split", split), ("first", first)):
        write_native(tmp_path / name, tree)
        same(load_t5x(str(tmp_path / name), config=model.config)[1], params)


def test_where_sizes_cannot_tell_layers_are_on_axis_1(tmp_path):
    config = dataclasses.replace(T5, embed_dim=4)
    config = with_stacks(config, num_layers=4, num_heads=2, head_dim=2, mlp_dim=4)
    _, params = build(config)
    write_native(tmp_path / "c", t5x_tree(params, scanned=True))
    same(load_t5x(str(tmp_path / "c"), config=config)[1], params)


def test_bfloat16_and_the_latest_of_several(tmp_path, t5):
    model, params = t5
    low = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    write_native(tmp_path / "checkpoint_9", t5x_tree(jax.tree.map(np.zeros_like, params)))
    write_native(tmp_path / "checkpoint_10", t5x_tree(low))
    _, found = load_t5x(str(tmp_path), config=model.config)
    same(found, jax.tree.map(lambda leaf: leaf.astype("float32"), low))


def test_parameters_are_placed_by_the_partitioner(tmp_path, t5):
    params = t5[1]
    write_native(tmp_path / "c", t5x_tree(params))
    partitioner = Partitioner(data=1, fsdp=2, model=-1)
    _, found = load_t5x(str(tmp_path / "c"), partitioner=partitioner)
    query = found["encoder"]["layers"]["self_attention"]["query"]["kernel"]
    assert query.sharding.spec == partitioner.spec(("layers", "embed", "heads", "kv"))
    same(found, params)


def test_a_bias_of_its_own_in_each_layer_is_refused(tmp_path, t5):
    _, params = t5
    tree = t5x_tree(params, scanned=True)
    bias = "encoder/encoder/relpos_bias/rel_embedding"
    tree[bias] = tree[bias].copy()
    tree[bias][:, 1] += 1
    write_native(tmp_path / "c", tree)
    with pytest.raises(InputError, match=rf"{bias}.*\(4, 2, 32\).*every layer"):
        load_t5x(str(tmp_path / "c"))


QUERY = "encoder/layers_1/attention/query/kernel"


def change(tree, *, drop=(), **more):
    return {path: leaf for path, leaf in tree.items() if path not in drop} | more.get("add", {})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"drop": [QUERY]}, "missing encoder/layers/self_attention/query/kernel of layer 1"),
        ({"drop": ["encoder/encoder_norm/scale"]}, "missing encoder/final_norm/scale (32,)"),
        ({"add": {"decoder/router/kernel": np.ones(3)}}, "unknown target/decoder/router/kernel (3"),
        ({"add": {QUERY: np.ones((32, 16), "f4")}}, f"{QUERY} is (32, 16), the model's"),
        ({"add": {QUERY.replace("_1", "_2"): np.ones((32, 32), "f4")}}, "has 3 layers, the model"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, t5, changes, expected):
    model, params = t5
    write_native(tmp_path / "c", change(t5x_tree(params), **changes))
    with pytest.raises(InputError) as caught:
        load_t5x(str(tmp_path / "c"), config=model.config)
    assert expected in str(caught.value)


def test_the_models_own_config_is_checked(tmp_path, t5):
    model, params = t5
    write_native(tmp_path / "c", t5x_tree(params))
    with pytest.raises(InputError, match=r"the model has no lm_head/kernel.*\(32, 96\)"):
        load_t5x(str(tmp_path / "c"), config=dataclasses.replace(model.config, head=T5_1_0.head))


def damage(path, how):
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "gone":
        path.unlink()
    else:
        shutil.rmtree(path.parent)


@pytest.mark.parametrize("how", ["cut", "gone", "folder"])
def test_a_damaged_array_is_named(tmp_path, t5, how):
    model, params = t5
    folder = write_native(tmp_path / "c", t5x_tree(params))
    damage(folder / f"target.{QUERY.replace('/', '.')}" / "1.0", how)
    with pytest.raises(InputError) as caught:
        load_t5x(str(folder), config=model.config)
    message = str(caught.value)
    assert f"target/{QUERY}" in message
    assert "(32, 32)" in message
    assert "missing or damaged" in message
    assert len(message) < 600


def test_damaged_and_foreign_trees_are_refused(tmp_path, t5):
    folder = write_native(tmp_path / "c", t5x_tree(t5[1]))
    file = folder / "checkpoint"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="checkpoint' is not a readable msgpack file"):
        load_t5x(str(folder))
    file.write_bytes(whole.replace(b"\xa7version\x03", b"\xa7version\x01"))
    with pytest.raises(InputError, match="has version 1"):
        load_t5x(str(folder))
    file.write_bytes(whole.replace(b"target.encoder.enc", b"/../er.encoder.enc"))
    with pytest.raises(InputError, match="expected a name inside its folder"):
        load_t5x(str(folder))
    (tmp_path / "empty").mkdir()
    for path, expected in (
        ("gs://t5-data/x", "not a local folder"),
        (str(tmp_path / "none"), "not a folder"),
        (str(tmp_path / "empty"), "no T5X checkpoint"),
    ):
        with pytest.raises(InputError, match=expected):
            load_t5x(path)
