"""The flash kernel, interpreted, computes what plain attention computes, or refuses."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.kernels import flash, relative
from t5x_lite.kernels.plain import ByDistance, Visibility, dot_product_attention
from t5x_lite.models.transformer import Transformer
from t5x_lite.sharding import Partitioner
from t5x_lite.train.step import Loss
from t5x_lite.types import InputError
from tests import common

ROWS, LENGTH, HEADS, DIM = 2, 256, 2, 64
PLACES = jnp.arange(LENGTH, dtype=jnp.int32)
# Three texts and padding in each row, their ends anywhere.
SEGMENTS = jnp.asarray(
    [np.repeat([1, 2, 3, 0], counts) for counts in ((100, 60, 50, 46), (1, 200, 30, 25))],
    jnp.int32,
)
CAUSAL = Visibility(query_places=PLACES, key_places=PLACES, in_order=True)
PACKED = Visibility(SEGMENTS, SEGMENTS)
CASES = {
    "bidirectional": Visibility(),
    "causal": CAUSAL,
    "packed": PACKED,
    "packed, causal": dataclasses.replace(CAUSAL, query_segments=SEGMENTS, key_segments=SEGMENTS),
    "a window": dataclasses.replace(CAUSAL, window=40),
}


BY_DISTANCE = jnp.asarray(np.random.default_rng(2).normal(size=(HEADS, 2 * LENGTH)), jnp.float32)


def arrays(dtype, rows=ROWS):
    rng = np.random.default_rng(0)
    shape = (rows, LENGTH, HEADS, DIM)
    query, key, value = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
    return query / DIM**0.5, key, value


def both(attend, visibility, dtype, *more):
    """The result, and the gradients of some function of it: of the arrays, and of what is more."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, LENGTH, HEADS, DIM)), dtype)

    def loss(query, key, value, *more):
        attended = attend(query, key, value, visibility, *more)
        return jnp.sum((attended * weights).astype(jnp.float32)), attended

    differentiated = tuple(range(3 + len(more)))
    (_, attended), grads = jax.jit(jax.value_and_grad(loss, argnums=differentiated, has_aux=True))(
        *arrays(dtype), *more
    )
    return attended, *grads


def interpreted(query, key, value, visibility, by_distance=None):
    bias = None if by_distance is None else ByDistance(by_distance)
    return flash.attention(query, key, value, visibility, bias, interpret=True)


def plain(query, key, value, visibility, by_distance):
    bias = ByDistance(by_distance).dense()
    return dot_product_attention(query, key, value, visibility, bias)


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1e-4), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_plain_attentions(name, dtype, most):
    found = both(interpreted, CASES[name], dtype)
    expected = both(dot_product_attention, CASES[name], dtype)
    for one, other in zip(found, expected, strict=True):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        scale = float(jnp.max(jnp.abs(other)))
        np.testing.assert_allclose(one, other, atol=most * scale, rtol=0)


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1e-4), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", ["bidirectional", "causal", "packed", "packed, causal"])
@pytest.mark.parametrize("tile", [128, 256])
def test_a_bias_by_distance_and_its_gradient(monkeypatch, name, dtype, most, tile):
    """In one tile of the row, and in four, of which a causal query sees three."""
    monkeypatch.setattr(relative, "_TILES", (tile,))
    found = both(interpreted, CASES[name], dtype, BY_DISTANCE)
    expected = both(plain, CASES[name], dtype, BY_DISTANCE)
    for one, other in zip(found, expected, strict=True):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        scale = float(jnp.max(jnp.abs(other)))
        np.testing.assert_allclose(one, other, atol=most * scale, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
def test_rows_and_heads_on_a_mesh(biased):
    partitioner = Partitioner(data=2, fsdp=2, model=2)
    qkv, bias = arrays(jnp.float32, rows=4), (BY_DISTANCE,) if biased else ()
    with partitioner.activate():
        found = jax.jit(lambda *all_: interpreted(*all_[:3], CAUSAL, *all_[3:]))(*qkv, *bias)
    expected = (plain if biased else dot_product_attention)(*qkv, CAUSAL, *bias)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_model_computes_the_same(monkeypatch, family):
    """With two texts in a row, loss and all gradients, the bias's table among them."""
    config = common.T5 if family == "t5" else common.FAMILIES[family]
    params = jax.tree.map(jnp.asarray, common.host_params(config))
    batch = common.random_batch(config, rows=2, encoder=128, decoder=128)
    monkeypatch.setattr(flash, "attention", functools.partial(flash.attention, interpret=True))

    def run(attention):
        model = Transformer(common.with_stacks(config, attention=attention))

        def loss(params):
            sums = Loss().of(model, params, batch)
            return sums["loss"] / sums["weight"]

        return jax.jit(jax.value_and_grad(loss))(params)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-3),
        run("flash"),
        run("plain"),
    )


REFUSED = {
    "not by distance": (Visibility(), jnp.zeros((1, HEADS, LENGTH, LENGTH))),
    "a bias with a window": (dataclasses.replace(CAUSAL, window=3), ByDistance(BY_DISTANCE)),
    "seen from everywhere": (dataclasses.replace(CAUSAL, key_prefix=SEGMENTS), None),
    "ahead of the row": (Visibility(ahead=3), None),
    "one by one": (Visibility(allowed=jnp.ones((ROWS, LENGTH, LENGTH), bool)), None),
    "out of order": (Visibility(query_places=PLACES, key_places=PLACES), None),
    "without causality": (Visibility(window=3), None),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_do_it_refuses(what):
    visibility, bias = REFUSED[what]
    with pytest.raises(InputError, match=what):
        flash.attention(*arrays(jnp.float32), visibility, bias, interpret=True)


def test_other_machines_and_lengths_are_refused():
    with pytest.raises(InputError, match="for TPUs, and this is cpu"):
        flash.attention(*arrays(jnp.float32), CAUSAL)
    short = (x[:, :100] for x in arrays(jnp.float32))
    with pytest.raises(InputError, match="a multiple of 128 tokens, not 100"):
        flash.attention(*short, Visibility(), interpret=True)


def test_the_backward_pass_of_long_rows(monkeypatch):
    """Two kernels in place of the fused one."""
    monkeypatch.setattr(flash, "_FUSED", 128)
    found = both(interpreted, CASES["packed, causal"], jnp.float32)
    expected = both(dot_product_attention, CASES["packed, causal"], jnp.float32)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.max(jnp.abs(other))))
