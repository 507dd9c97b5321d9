"""Plain attention's written-out gradient is that of its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.kernels.plain import HIDDEN, Visibility, dot_product_attention

ROWS, QUERIES, KEYS, HEADS, DIM = 2, 5, 7, 3, 4
QUERY_SEGMENTS = jnp.asarray([[1, 1, 2, 2, 9], [1, 2, 2, 2, 2]], jnp.int32)
KEY_SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 0, 0]], jnp.int32)
CASES = {
    "all is visible": Visibility(),
    "causal": Visibility(query_places=jnp.arange(QUERIES), key_places=jnp.arange(KEYS)),
    "packed; the first row's last query sees nothing": Visibility(QUERY_SEGMENTS, KEY_SEGMENTS),
}


def defined(query, key, value, visibility, bias):
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    if bias is not None:
        logits = logits + bias
    mask = visibility.mask()
    if mask is not None:
        logits = jnp.where(mask, logits, HIDDEN)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)


@pytest.mark.parametrize(
    ("dtype", "relative", "most"), [(jnp.float32, 1e-5, 2e-6), (jnp.bfloat16, 1e-2, 4e-2)]
)
@pytest.mark.parametrize("biases", [0, 1, ROWS])
@pytest.mark.parametrize("name", CASES)
def test_the_result_and_its_gradients(name, biases, dtype, relative, most):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    query, weights = (draw(ROWS, QUERIES, HEADS, DIM) for _ in range(2))
    key, value = (draw(ROWS, KEYS, HEADS, DIM) for _ in range(2))
    bias = draw(biases, HEADS, QUERIES, KEYS) if biases else None

    def both(attend, kind):
        """In `kind`, of the numbers that are drawn in `dtype`."""
        drawn = jax.tree.map(lambda x: x.astype(kind), (query, key, value, bias))
        loss = lambda *arrays: jnp.sum(weights * attend(*arrays[:3], CASES[name], *arrays[3:]))
        grads = jax.grad(loss, (0, 1, 2, 3) if biases else (0, 1, 2))(*drawn)
        return attend(*drawn[:3], CASES[name], drawn[3]), *grads

    for one, other in zip(
        both(dot_product_attention, dtype), both(defined, "float32"), strict=True
    ):
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=relative, atol=most)
