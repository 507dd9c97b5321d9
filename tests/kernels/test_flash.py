"""The flash kernel, interpreted, computes what plain attention computes, or refuses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.kernels import flash
from t5x_lite.kernels.plain import Visibility, dot_product_attention
from t5x_lite.models.config import StackConfig
from t5x_lite.models.config_positions import RelativeBias
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError

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


def arrays(dtype, rows=ROWS):
    rng = np.random.default_rng(0)
    shape = (rows, LENGTH, HEADS, DIM)
    query, key, value = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
    return query / DIM**0.5, key, value


def both(attend, visibility, dtype):
    """The result, and the gradients of some function of it."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, LENGTH, HEADS, DIM)), dtype)

    def loss(*qkv):
        attended = attend(*qkv, visibility)
        return jnp.sum((attended * weights).astype(jnp.float32)), attended

    (_, attended), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
        *arrays(dtype)
    )
    return attended, *grads


def interpreted(query, key, value, visibility):
    return flash.attention(query, key, value, visibility, interpret=True)


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1e-4), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_plain_attentions(name, dtype, most):
    found = both(interpreted, CASES[name], dtype)
    expected = both(dot_product_attention, CASES[name], jnp.float32)
    for one, other in zip(found, expected, strict=True):
        scale = float(jnp.max(jnp.abs(other)))
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=most * scale, rtol=0)


def test_rows_and_heads_on_a_mesh():
    partitioner = Partitioner(data=2, fsdp=2, model=2)
    query, key, value = arrays(jnp.float32, rows=4)
    with partitioner.activate():
        run = jax.jit(lambda *qkv: flash.attention(*qkv, CAUSAL, interpret=True))
        found = run(query, key, value)
    expected = dot_product_attention(query, key, value, CAUSAL)
    np.testing.assert_allclose(found, expected, atol=1e-4)


REFUSED = {
    "a bias": (Visibility(), jnp.zeros((1, HEADS, LENGTH, LENGTH))),
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
    with pytest.raises(InputError, match="takes no bias"):
        StackConfig(
            num_layers=1, num_heads=1, head_dim=8, mlp_dim=8,
            positions=RelativeBias(), attention="flash",
        )  # fmt: skip
