"""LoRA: a no-op at first, adapters alone are trained, merging computes the same, shards follow."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import trees, types
from t5x_lite.models import transformer
from t5x_lite.peft.leaves import LowRank, merge_low_rank
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Freeze, Full
from t5x_lite.sharding import Partitioner
from t5x_lite.train.session import Session
from tests import common
from tests.train import harness

EVERYTHING = LoRA(
    rank=4,
    alpha=12.0,
    targets=(
        ".*/(query|value|out)/kernel",
        ".*/(wi_0|wi_1)/kernel",
        "token_embedding/embedding",
        "lm_head/kernel",
        ".*/relative_bias/embedding",
    ),
)
TIED = dataclasses.replace(common.BERT, encoder=dataclasses.replace(common.STACK, unroll=2))
CASES = {
    "scanned": (common.T5, EVERYTHING),
    "unrolled": (common.with_stacks(common.T5, unroll=2), EVERYTHING),
    "remat": (common.with_stacks(common.T5, remat="full"), EVERYTHING),
    "tied": (TIED, LoRA(rank=4, targets=("token_embedding/embedding", ".*/wo/kernel"))),
}


@functools.cache
def base_of(config):
    return harness.host_params(config)


@functools.cache
def adapters_of(config, lora):
    base, names = base_of(config), transformer.axes(transformer.Transformer(config))
    split = jax.jit(lambda base: lora.split(base, names, jax.random.key(5))[0])
    return jax.device_get(harness.compile_quickly(split.lower(base))(base))


def split(case):
    """`(logits function, base, names, adapters at their start)`."""
    config, lora = CASES[case]
    model = transformer.Transformer(config)
    stored = TIED if case == "tied" else common.T5  # the others have its parameters
    batch = common.random_batch(config)
    jitted, compiled = jax.jit(lambda params: model.apply({"params": params}, batch)), {}

    def logits(params):
        key = jax.tree.structure(params)  # with adapters or without
        if key not in compiled:
            compiled[key] = harness.compile_quickly(jitted.lower(params))
        return compiled[key](params)

    return (
        logits,
        base_of(stored),
        transformer.axes(model),
        adapters_of(stored, lora),
    )


def moved(adapters):
    """Adapters after some training: nowhere zero."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), adapters)


@pytest.mark.parametrize("case", CASES)
def test_starts_as_its_base_and_merges_to_what_it_applies(case):
    logits, base, _, adapters = split(case)
    lora = CASES[case][1]
    expected = logits(base)
    at_start = logits(lora.apply(adapters, base))
    np.testing.assert_array_equal(at_start, expected)
    merge = harness.compile_quickly(jax.jit(lora.merge).lower(adapters, base))
    jax.tree.map(np.testing.assert_array_equal, merge(adapters, base), base)

    tuned = moved(adapters)
    applied, merged = lora.apply(tuned, base), merge(tuned, base)
    found = logits(applied)
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() > 0.05 * scale  # the adapters do something
    np.testing.assert_allclose(found / scale, logits(merged) / scale, rtol=1e-5, atol=1e-5)
    targeted = {path.rsplit("/", 1)[0] for path in trees.flatten(adapters)}
    for path, leaf in trees.flatten(merged).items():
        same = np.array_equal(leaf, trees.flatten(base)[path])
        assert same == (path not in targeted), path
        assert (leaf.shape, leaf.dtype) == (trees.flatten(base)[path].shape, np.float32)


def test_apply_does_no_arithmetic():
    _, base, names, adapters = split("scanned")
    frozen = jax.eval_shape(lambda: EVERYTHING.split(base, names, jax.random.key(5))[1])
    assert trees.flatten(frozen).keys() == trees.flatten(base).keys()
    applied = EVERYTHING.apply(adapters, base)
    leaves = {id(leaf) for leaf in jax.tree.leaves((adapters, base))}
    assert {id(leaf) for leaf in jax.tree.leaves(applied)} == leaves
    node = applied["encoder"]["layers"]["self_attention"]["query"]["kernel"]
    assert isinstance(node, LowRank)
    assert node.scale == 3.0


def test_every_target_has_one_pair_of_its_own_shape():
    _, _, names, adapters = split("scanned")
    flat = trees.flatten(adapters)
    kernel = "{}/layers/{}/kernel/{}"
    assert flat[kernel.format("encoder", "self_attention/query", "a")].shape == (2, 32, 4)
    assert flat[kernel.format("encoder", "self_attention/query", "b")].shape == (2, 4, 4, 8)
    assert flat[kernel.format("decoder", "cross_attention/out", "a")].shape == (2, 4, 8, 4)
    assert flat[kernel.format("decoder", "cross_attention/out", "b")].shape == (2, 4, 32)
    assert flat["token_embedding/embedding/a"].shape == (96, 4)
    assert flat["lm_head/kernel/b"].shape == (4, 96)
    targets = 3 * 3 + 2 * 2 + 4  # three attentions, two MLPs, embedding and head, two biases
    assert len(flat) == 2 * targets
    axes = EVERYTHING.split_names(names)[0]
    flat_axes = trees.flatten(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert list(flat_axes) == list(flat)
    assert all(len(flat_axes[path]) == flat[path].ndim for path in flat)
    # What is drawn: `a` uniform within 1/sqrt(fan_in), `b` zero.
    assert all(not np.any(leaf) for path, leaf in flat.items() if path.endswith("/b"))
    out = flat[kernel.format("decoder", "cross_attention/out", "a")]
    np.testing.assert_allclose(np.abs(out).max(), 32**-0.5, rtol=0.02)
    np.testing.assert_allclose(np.std(out), (32 * 3) ** -0.5, rtol=0.1)


def test_an_adapters_start_does_not_depend_on_the_other_targets():
    _, base, names, adapters = split("scanned")
    alone, _ = LoRA(rank=4, targets=("lm_head/kernel",)).split(base, names, jax.random.key(5))
    np.testing.assert_allclose(
        alone["lm_head"]["kernel"]["a"], adapters["lm_head"]["kernel"]["a"], rtol=1e-4, atol=1e-6
    )
    a = trees.flatten(adapters)
    query, value = (a[f"encoder/layers/self_attention/{n}/kernel/a"] for n in ("query", "value"))
    assert np.abs(query - value).max() > 0.1


def test_merging_is_the_definition():
    rng = np.random.default_rng(0)
    w, a, b = (
        rng.normal(size=s).astype(np.float32) for s in ((3, 4, 5, 6), (3, 4, 5, 2), (3, 2, 6))
    )
    expected = w + 0.5 * np.einsum("lhkr,lre->lhke", a, b)
    np.testing.assert_allclose(merge_low_rank(w, a, b, 0.5), expected, rtol=1e-5, atol=1e-5)
    single = merge_low_rank(w[0], a[0], b[0], 0.5)
    np.testing.assert_allclose(single, expected[0], rtol=1e-5, atol=1e-5)
    half = merge_low_rank(jnp.asarray(w, jnp.bfloat16), a, b, 0.5)
    assert half.dtype == jnp.bfloat16


def test_adapters_are_sharded_by_the_base_weights_rules():
    session = Session(common.T5, EVERYTHING, Partitioner(data=2, fsdp=2, model=2))
    adapters, base = (trees.flatten(tree) for tree in session.split_shapes)
    for path, weight in base.items():
        if f"{path}/a" not in adapters:
            continue
        a, b = (tuple(adapters[f"{path}/{leaf}"].sharding.spec) for leaf in "ab")
        whole = tuple(weight.sharding.spec)
        layers = 1 if "/layers/" in path else 0
        inputs = len(a) - 1 - layers
        assert a == (*whole[: layers + inputs], None), path
        assert b == (*whole[:layers], None, *whole[layers + inputs :]), path
    assert any("model" in (leaf.sharding.spec or ()) for leaf in adapters.values())
    assert any("fsdp" in (leaf.sharding.spec or ()) for leaf in adapters.values())


def test_freezing_trains_what_it_names_and_keeps_the_rest():
    _, base, names, _ = split("scanned")
    freeze = Freeze(trainable=("decoder/.*", "lm_head/kernel"))
    trainable, frozen = freeze.split(base, names, jax.random.key(0))
    paths = set(trees.flatten(trainable))
    assert paths == {p for p in trees.flatten(base) if p.startswith(("decoder/", "lm_head/"))}
    assert not paths & set(trees.flatten(frozen))
    for together in (freeze.apply(trainable, frozen), freeze.merge(trainable, frozen)):
        assert trees.flatten(together).keys() == trees.flatten(base).keys()
        assert all(trees.flatten(together)[p] is leaf for p, leaf in trees.flatten(base).items())
    is_axes = lambda leaf: isinstance(leaf, tuple)
    axes = [trees.flatten(tree, is_leaf=is_axes) for tree in freeze.split_names(names)]
    assert [set(tree) for tree in axes] == [paths, set(trees.flatten(frozen))]
    everything, nothing = Full().split(base, names, jax.random.key(0))
    assert everything is base
    assert nothing == {}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoRA(rank=0), "LoRA.rank=0: expected at least 1"),
        (lambda: LoRA(targets=()), "LoRA.targets is empty"),
        (
            lambda: Session(common.T5, LoRA(targets=(".*/querry/kernel",))).split_shapes,
            "LoRA target '.*/querry/kernel' matches no parameter",
        ),
        (
            lambda: Session(common.T5, LoRA(targets=(".*/query/kernel", "query"))).split_shapes,
            "LoRA target 'query' matches no parameter",
        ),
        (
            lambda: Session(common.T5, LoRA(targets=(".*_norm/scale",))).split_shapes,
            "is not a matrix",
        ),
        (
            lambda: Session(common.FAMILIES["bert"], LoRA(targets=(".*/query/bias",))).split_shapes,
            "'encoder/layers/self_attention/query/bias' .* is not a matrix",
        ),
        (lambda: LoRA(targets=("(",)).split_names({"a": ("embed",)}), "not a regular expression"),
        (lambda: Freeze(trainable=()).split_names({"a": ("embed",)}), "trainable is empty"),
        (
            lambda: Session(common.T5, Freeze(trainable=("encoder",))).split_shapes,
            "Freeze.trainable pattern 'encoder' matches no parameter",
        ),
    ],
)
def test_what_cannot_be_tuned_is_named(build, message):
    with pytest.raises(types.InputError, match=message.replace("'.*/querry", "'\\.\\*/querry")):
        build()
