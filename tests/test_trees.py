"""Path dicts, the one matching rule, partition and merge, and fingerprints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_lite import trees
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError

TREE = {"a": {"b": {"kernel": 1, "bias": 2}, "c": {"kernel": 3}}, "d": 4}
FLAT = {"a/b/bias": 2, "a/b/kernel": 1, "a/c/kernel": 3, "d": 4}


def test_flatten_and_unflatten_are_inverse():
    assert trees.flatten(TREE) == FLAT
    assert list(trees.flatten(TREE)) == sorted(FLAT)  # the order of jax.tree.leaves
    assert trees.unflatten(FLAT) == TREE
    assert trees.unflatten({}) == {}
    names = trees.flatten({"x": {"y": ("embed", "mlp")}}, is_leaf=lambda x: isinstance(x, tuple))
    assert names == {"x/y": ("embed", "mlp")}


def test_paths_reach_into_lists_and_tuples():
    assert trees.flatten({"a": [{"b": 1}, 2], "c": (3,)}) == {"a/0/b": 1, "a/1": 2, "c/0": 3}


def test_map_with_path():
    found = trees.map_with_path(lambda path, x, y: f"{path}={x + y}", TREE, TREE)
    assert found["a"]["b"]["kernel"] == "a/b/kernel=2"
    assert jax.tree.structure(found) == jax.tree.structure(TREE)


def test_the_first_full_match_wins():
    rules = ((".*/b/.*", "first"), (".*kernel", "second"))
    found = trees.match_first(rules, FLAT, default="none")
    assert found == {
        "a/b/bias": "first",
        "a/b/kernel": "first",
        "a/c/kernel": "second",
        "d": "none",
    }


def test_a_rule_takes_whole_paths_only():
    paths = ["x/kernel", "x/kernel/a", "y/x/kernel"]
    found = trees.match_first((("x/kernel", 1),), paths, default=0)
    assert found == {"x/kernel": 1, "x/kernel/a": 0, "y/x/kernel": 0}


def test_a_rule_in_the_shadow_of_others_counts_as_matching():
    found = trees.match_first(((".*", 1), ("d", 2)), FLAT)
    assert set(found.values()) == {1}


@pytest.mark.parametrize("pattern", ["kernel", "a/b", "A/.*", "a/b/kernel/"])
def test_a_rule_that_matches_no_whole_path_is_an_error(pattern):
    with pytest.raises(InputError, match=f"freeze '{pattern}' matches no parameter") as error:
        trees.match_first(((".*bias", 1), (pattern, 2)), FLAT, what="freeze")
    assert "a/c/kernel" in str(error.value)


def test_what_is_no_regular_expression_is_an_error():
    with pytest.raises(InputError, match=r"rule '\(a' is not a regular expression"):
        trees.match_first((("(a", 1),), FLAT)


@pytest.mark.parametrize("pattern", ["kernel", "b", "^d", "nothing"])
def test_partition_and_merge_are_inverse(pattern):
    taken, rest = trees.partition(TREE, lambda path: pattern in path)
    assert all(pattern in path for path in trees.flatten(taken))
    assert not any(pattern in path for path in trees.flatten(rest))
    assert trees.merge(taken, rest) == trees.merge(rest, taken) == TREE


def test_merge_refuses_what_is_there_twice():
    with pytest.raises(ValueError, match="two trees hold the path 'd'"):
        trees.merge(TREE, {"d": 5})


def test_counts():
    tree = {"x": jnp.zeros((3, 4)), "y": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}
    assert trees.count(tree) == 17
    assert trees.nbytes(tree) == 58


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a": {"kernel": rng.normal(size=(4, 8, 2)).astype(np.float32)},
        "b": {"kernel": rng.normal(size=(4, 8, 2)).astype(np.float32)},
        "half": np.asarray(rng.normal(size=(6, 8)), jnp.bfloat16),
        "small": rng.integers(-9, 9, (16,)).astype(np.int8),
        "step": np.int32(3),
    }


@pytest.mark.parametrize("path", ["a/kernel", "half", "small", "step"])
def test_a_fingerprint_changes_with_every_bit(path):
    seen = {trees.fingerprint(arrays())}
    flat = trees.flatten(arrays())
    value = np.asarray(flat[path])
    bits = value.size * value.itemsize * 8
    chosen = np.random.default_rng(1).permutation(bits)[:24]
    for bit in chosen:
        raw = bytearray(value.tobytes())
        raw[bit // 8] ^= 1 << (bit % 8)
        changed = np.frombuffer(bytes(raw), value.dtype).reshape(value.shape)
        seen.add(trees.fingerprint(trees.unflatten(flat | {path: changed})))
    assert len(seen) == 1 + len(chosen)


def test_a_fingerprint_changes_with_places_paths_shapes_and_dtypes():
    flat = trees.flatten(arrays())
    a, b = flat["a/kernel"], flat["b/kernel"]
    swapped = a.copy()
    swapped[0, 0, 0], swapped[3, 5, 1] = a[3, 5, 1], a[0, 0, 0]
    variants = [
        flat,
        flat | {"a/kernel": b, "b/kernel": a},
        flat | {"a/kernel": swapped},
        flat | {"a/kernel": a[:, ::-1]},
        flat | {"a/kernel": -a},
        flat | {"a/kernel": a * np.where(np.arange(2) > 0, 1, -1).astype(np.float32)},
        flat | {"small": flat["small"].reshape(8, 2)[:, ::-1].reshape(16)},
        flat | {"a/kernel": a.reshape(8, 4, 2)},
        flat | {"a/kernel": a.view(np.int32)},
        flat | {"c": np.zeros(0, np.float32)},
        {path: leaf for path, leaf in flat.items() if path != "step"},
        {path.replace("half", "hald"): leaf for path, leaf in flat.items()},
        flat | {"small": np.zeros(16, np.int8)},
        flat | {"small": np.zeros(17, np.int8)},
    ]
    found = {trees.fingerprint(trees.unflatten(variant)) for variant in variants}
    assert len(found) == len(variants)
    assert all(len(digest) == 16 for digest in found)


def test_a_fingerprint_is_the_same_on_every_mesh():
    flat = trees.flatten(arrays())
    mesh = Partitioner(data=2, fsdp=2, model=2).mesh
    specs = {
        "a/kernel": P(("data", "fsdp"), None, "model"),
        "b/kernel": P(None, "fsdp", "model"),
        "half": P("model", ("data", "fsdp")),
        "small": P(("data", "fsdp", "model")),
        "step": P(),
    }
    placed = {
        path: jax.device_put(leaf, jax.sharding.NamedSharding(mesh, specs[path]))
        for path, leaf in flat.items()
    }
    assert placed["a/kernel"].addressable_shards[0].data.shape == (1, 8, 1)
    assert trees.fingerprint(trees.unflatten(placed)) == trees.fingerprint(arrays())
