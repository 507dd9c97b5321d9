"""A low-rank update joined with its base in one product: the same sums, and where it is done."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import sharding
from t5x_lite.peft import joined
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.leaves import LowRank
from t5x_lite.peft.lora import DoRA, LoRA
from t5x_lite.peft.quantise import Quantise
from t5x_lite.sharding import DEFAULT_RULES, Partitioner
from t5x_lite.train.optim import AdamW
from t5x_lite.train.session import Session
from tests import common
from tests.train import harness

SHAPES = {
    "query": ((8,), (2, 4)),
    "wi": ((8,), (12,)),
    "out": ((2, 4), (8,)),
    "two": ((2, 4), (3, 5)),
}


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES.values(), ids=SHAPES)
def test_the_product_and_its_gradients_are_those_of_two(inputs, outputs):
    keys = jax.random.split(jax.random.key(0), 5)
    x, w, a, b, g = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            keys,
            ((3, 6, *inputs), (*inputs, *outputs), (*inputs, 2), (2, *outputs), (3, 6, *outputs)),
            strict=True,
        )
    )

    def plain(x, w, a, b):
        low = jnp.tensordot(x, a, axes=len(inputs))
        return jnp.tensordot(x, w, axes=len(inputs)) + jnp.tensordot(low, b, axes=1)

    found, pull = jax.vjp(lambda *args: joined.project(len(inputs), *args), x, w, a, b)
    expected, pull_plain = jax.vjp(plain, x, w, a, b)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
        pull(g),
        pull_plain(g),
    )


@pytest.fixture
def tpu(monkeypatch):
    """As if for TPUs; the list has the shapes of x that were multiplied jointly."""
    found = []
    project = joined.project

    def spy(in_axes, x, *parts):
        found.append(x.shape)
        return project(in_axes, x, *parts)

    monkeypatch.setattr(joined, "project", spy)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    return found


def step(transform, partitioner):
    session = Session(harness.MODEL, transform, partitioner)
    optimizer = session.optimizer(AdamW(0.01))
    state, frozen = harness.start(session, optimizer, common.host_params(harness.MODEL))
    batch = partitioner.put_batch(harness.uneven_batch(harness.MODEL, rows=8), 8)
    compiled = harness.compile_step(session, optimizer, state, frozen, batch)
    for _ in range(2):
        state, metrics = compiled(state, frozen, batch)
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize("transform", [LoRA(rank=2, targets=(".*/kernel",)), DoRA(rank=2)])
@pytest.mark.parametrize("sizes", [(8, 1), (2, 4)], ids=["data", "fsdp"])
def test_steps_on_any_mesh_are_those_of_two_products(transform, sizes, request):
    partitioner = Partitioner(data=sizes[0], fsdp=sizes[1])
    apart = step(transform, partitioner)
    shapes = request.getfixturevalue("tpu")
    together = step(transform, partitioner)
    assert shapes
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5),
        together,
        apart,
    )


def test_what_would_lose_by_it_is_multiplied_apart(tpu):
    step(LoRA(rank=2), Partitioner(data=4, model=2))
    over_fsdp = (("batch", "data"), ("embed", None), ("mlp", "fsdp"), *DEFAULT_RULES)
    step(LoRA(rank=2), Partitioner(data=4, fsdp=2, rules=over_fsdp))
    step(LoRA(rank=2, dropout=0.1), Partitioner(data=8))
    step(Compose((LoRA(rank=2), Quantise(kind="int8"))), Partitioner(data=8))
    node = LowRank(jnp.ones((4, 6)), jnp.ones((4, 2)), jnp.ones((2, 6)), 1.0)
    node.project(jnp.ones((3, 1, 4)), 1)  # a step of decoding
    node.project(jnp.ones(4), 1)
    assert tpu == []
    node.project(jnp.ones((3, 2, 4)), 1)
    assert tpu == [(3, 2, 4)]
