"""Quantised weights: bitsandbytes' codes, errors within bounds, tiles that compute the whole."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.models import weights
from t5x_lite.peft import codes as coding
from t5x_lite.peft import quantised
from t5x_lite.peft.quantise import Quantise
from t5x_lite.peft.quantised import QuantisedWeight, Tiles
from t5x_lite.types import InputError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "quantised.npz"


def numbers(rows, columns):
    """As in fixtures/make_quantised.py."""
    grid = np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)
    noise = sum((grid * step % 1009) / 504 - 1 for step in (7919, 104729, 611953))
    return (noise * (1 + np.arange(rows) % 7)[:, None] / 8).astype(np.float32)


# --- bitsandbytes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs():
    with np.load(FIXTURE) as file:
        return dict(file)


def test_nf4_has_bitsandbytes_book_blocks_and_bytes(theirs):
    np.testing.assert_array_equal(coding.NF4, theirs["book"])
    weight = numbers(12, 128)
    weight[3, 64:] = 0.0
    codes, scales = coding.quantise(weight.T, "nf4", 64)
    # Theirs lie output by output, ours input by input.
    np.testing.assert_array_equal(codes.T.reshape(-1), theirs["codes"])
    np.testing.assert_array_equal(scales.T.reshape(-1), theirs["scales"])
    node = QuantisedWeight(codes, scales, 2, False)
    np.testing.assert_array_equal(node.dense().T[:4], theirs["restored"])


def test_double_quantisation_has_bitsandbytes_map_groups_and_mean(theirs):
    np.testing.assert_allclose(coding.dynamic_map(), theirs["double_map"], rtol=2e-7)
    _, scales = coding.quantise(numbers(80, 320).T, "nf4", 64)
    codes, groups, mean = coding.quantise_scales(scales)
    np.testing.assert_allclose(mean, theirs["double_mean"], rtol=1e-6)
    np.testing.assert_allclose(groups, theirs["double_groups"], rtol=1e-5)
    np.testing.assert_array_equal(codes.T.reshape(-1), theirs["double_scales"])


def test_int8_has_bitsandbytes_codes_of_an_output(theirs):
    weight = numbers(12, 128)
    weight[3, 64:] = 0.0
    weight = weight.astype(np.float16).astype(np.float32)  # theirs takes halves alone
    codes, scales = coding.quantise(weight.T, "int8", 128)
    np.testing.assert_array_equal(codes.T, theirs["int8_codes"])
    np.testing.assert_array_equal(scales[0], theirs["int8_scales"])


# --- one weight ----------------------------------------------------------------------------------

KERNEL = ("embed", "mlp"), (64, 24)
OUT = ("heads", "kv", "embed"), (4, 16, 10)
TABLE = ("vocab", "embed"), (50, 64)
HOWS = {
    "nf4": Quantise(targets=(".*",), block=16),
    "double": Quantise(targets=(".*",), block=16, double_quantisation=True),
    "int8": Quantise("int8", targets=(".*",)),
    "int8_blocks": Quantise("int8", targets=(".*",), block=32),
}


def weight_of(kind, seed=0):
    rng = np.random.default_rng(seed)
    shape = kind[1]
    return (rng.normal(size=shape) * rng.uniform(0.1, 2, shape[-1])).astype(np.float32)


def node_of(quantise, kind, weight):
    """The weight as a node, by way of the transform's own two halves."""
    leaf = "embedding" if kind is TABLE else "kernel"
    where = "encoder/layers" if kind[0][0] == "layers" else "head"
    base, names = {}, {}
    for tree, value in ((base, weight), (names, kind[0])):
        tree[where.split("/")[0]] = {leaf: value}
        if where != "head":
            tree["encoder"] = {"layers": {leaf: value}}
    frozen = quantise.split(base, names, None)[1]
    applied = quantise.apply({}, frozen)
    return (applied["encoder"]["layers"] if where != "head" else applied["head"])[leaf]


def blocks(weight, kind, block):
    """`[blocks, numbers]`, along the inputs of each output."""
    if kind is not TABLE:
        outputs = kind[1][len(kind[1]) - 1]
        weight = np.asarray(weight).reshape(-1, outputs).T
    return np.asarray(weight).reshape(-1, block)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", [KERNEL, OUT, TABLE], ids=["kernel", "out", "table"])
def test_the_round_trip_errs_by_half_a_step_at_most(how, kind):
    weight = weight_of(kind)
    node = node_of(HOWS[how], kind, weight)
    assert node.shape == weight.shape
    dense = np.asarray(node.dense())
    block = node.block
    assert block == {"int8": 64, "int8_blocks": 32}.get(how, 16)
    exact, found = blocks(weight, kind, block), blocks(dense, kind, block)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    # Half of the widest gap between neighbours: 0.304 of NF4's are from -1 to -0.696.
    step = 1 / 127 if node.kind == "int8" else 1 - 0.6961928
    slack = 0.02 * np.abs(largest).max() if how == "double" else 1e-6
    assert np.all(np.abs(found - exact) <= largest * step / 2 + slack)
    if how != "double":  # its largest number is exact, so that it can be quantised again
        np.testing.assert_array_equal(np.abs(found).max(axis=1, keepdims=True), largest)
        again = node_of(HOWS[how], kind, dense)
        np.testing.assert_array_equal(again.codes, node.codes)
        np.testing.assert_array_equal(again.scales, node.scales)


@pytest.mark.parametrize(
    ("how", "tile"), [*((how, 1) for how in HOWS), ("nf4", 2**18)], ids=[*HOWS, "whole"]
)
def test_tiles_compute_what_the_whole_does_and_its_gradient(how, tile, monkeypatch):
    monkeypatch.setattr(quantised, "TILE", tile)
    rng = np.random.default_rng(1)
    inputs, made = {}, {}
    for name, kind, in_axes in (("kernel", KERNEL, 1), ("out", OUT, 2), ("table", TABLE, 1)):
        made[name] = node = node_of(HOWS[how], kind, weight_of(kind))
        assert (Tiles(node).count > 1) == (tile == 1 and Tiles(node).unit != 64)
        inputs[name] = rng.normal(size=(2, 3, *node.shape[:in_axes])).astype(np.float32)
    inputs["states"] = rng.normal(size=(2, 3, 64)).astype(np.float32)
    ids = np.array([[0, 49, 7], [50, 1, 7]])

    def everything(made, inputs):
        def products(inputs):
            return {
                "kernel": weights.project(inputs["kernel"], made["kernel"]),
                "out": weights.project(inputs["out"], made["out"], 2),
                "table": weights.project(inputs["table"], made["table"]),
                "states": weights.attend(inputs["states"], made["table"]),
            }

        found, pull = jax.vjp(products, inputs)
        sums = [weights.square_sums(made[name], 1 + (name == "out")) for name in made]
        rows = weights.lookup(ids, made["table"], jnp.float32)
        return found, pull(jax.tree.map(jnp.cos, found)), sums, rows

    found = jax.jit(everything)(made, inputs)
    dense = {name: node.dense() for name, node in made.items()}
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4),
        found,
        jax.jit(everything)(dense, inputs),
    )


def test_a_stack_is_its_layers():
    kind = ("layers", "heads", "kv", "embed"), (3, 4, 16, 10)
    stack = np.stack([weight_of(OUT, seed) for seed in range(3)])
    node = node_of(HOWS["double"], kind, stack)
    assert node.shape == stack.shape
    for layer, weight in enumerate(stack):
        one = node_of(HOWS["double"], OUT, weight)
        assert one.shape == weight.shape
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], node)
        jax.tree.map(np.testing.assert_array_equal, own, one)
        np.testing.assert_array_equal(node.dense()[layer], one.dense())


def test_half_precision_multiplies_in_half_and_sums_in_full():
    node = node_of(HOWS["nf4"], KERNEL, weight_of(KERNEL))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 64)), jnp.bfloat16)
    y = weights.project(x, node)
    assert y.dtype == jnp.bfloat16
    exact = weights.project(x.astype(jnp.float32), node.dense())
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.02, atol=0.2)


def test_zeros_stay_zeros():
    for how in HOWS.values():
        node = node_of(how, KERNEL, np.zeros(KERNEL[1], np.float32))
        np.testing.assert_array_equal(node.dense(), 0.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Quantise("int4"), "Quantise.kind='int4': expected 'nf4' or 'int8'"),
        (lambda: Quantise(targets=()), "Quantise.targets is empty"),
        (lambda: Quantise(block=3), "Quantise.block=3: expected an even number"),
        (
            lambda: node_of(Quantise(targets=(".*",)), OUT, np.zeros((3, 6, 10))),
            r"blocks of 64 do not divide the 18 inputs \(3 x 6\) of 'head/kernel'",
        ),
        (
            lambda: node_of(Quantise(targets=(".*",), block=6), OUT, np.zeros((2, 3, 10))),
            r"\(2 x 3\) of 'head/kernel'",
        ),
        (
            lambda: node_of(Quantise(targets=(".*",)), (("embed",), (64,)), np.zeros(64)),
            "is not a matrix",
        ),
    ],
)
def test_what_cannot_be_quantised_is_named(build, message):
    with pytest.raises(InputError, match=message):
        build()
