"""The step gives the same losses on every mesh and for every number of microbatches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import trees, types
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Full
from t5x_lite.sharding import Partitioner
from t5x_lite.train import losses
from t5x_lite.train.optim import Adafactor, AdamW
from t5x_lite.train.session import Session
from t5x_lite.train.step import Loss, check_trainable_batch, count_tokens
from tests import common
from tests.train import harness

MESHES = {
    "1": harness.one_device,
    "8x1x1": lambda: Partitioner(data=8),
    "1x8x1": lambda: Partitioner(data=1, fsdp=8),
    "2x2x2": lambda: Partitioner(data=2, fsdp=2, model=2),
    "2 slices of 2x2x1": lambda: Partitioner(data=4, fsdp=2, num_slices=2),
}
STEPS, ROWS = 5, 32
DROPPING = common.with_stacks(common.T5, dropout=0.2)
LORA = LoRA(rank=4, targets=(".*/(query|value|wi_0)/kernel", "token_embedding/embedding"))
ADAMW = AdamW(0.01, weight_decay=0.1)
ADAFACTOR = Adafactor(0.05, min_dim_size_to_factor=8)


@pytest.fixture(scope="module")
def base():
    """Parameters on the host."""
    return jax.device_get(session("1").init_base())


@functools.cache
def session(mesh, transform=Full(), config=common.T5):
    return Session(config, transform, MESHES[mesh]())


def put(session, seed):
    return session.partitioner.put_batch(harness.uneven_batch(common.T5, ROWS, seed), ROWS)


COMPILED: dict = {}


def compiled_step(session, optimizer, state, frozen, microbatches, loss):
    key = (session, session.partitioner.mesh, optimizer, microbatches, loss)
    if key not in COMPILED:
        COMPILED[key] = harness.compile_step(
            session,
            session.optimizer(optimizer),
            state,
            frozen,
            put(session, 0),
            microbatches,
            loss,
        )
    return COMPILED[key]


def run(session, optimizer, base, microbatches, loss=Loss()):
    """Loss and gradient norm of each step, and the state and frozen parameters at the end."""
    state, frozen = harness.start(session, session.optimizer(optimizer), base)
    step = compiled_step(session, optimizer, state, frozen, microbatches, loss)
    records = []
    for seed in range(STEPS):
        state, metrics = step(state, frozen, put(session, seed))
        records.append(jax.device_get(metrics))
    values = np.array([(m["loss"] / m["denominator"], m["gradient_norm"]) for m in records])
    return values, state, frozen


@pytest.fixture(scope="module")
def expected(base):
    """On one device, whole batches."""
    return run(session("1"), ADAMW, base, 1)[0]


def assert_same(found, expected):
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-4)


# Each mesh and each number at once; the other pairs, which compile as much again, with the slow.
SLICES = ("2 slices of 2x2x1", 1)
FEW = {("8x1x1", 1), ("1x8x1", 4), ("2x2x2", 2), SLICES}
PAIRS = [(mesh, microbatches) for mesh in ("8x1x1", "1x8x1", "2x2x2") for microbatches in (1, 2, 4)]
PAIRS.append(SLICES)


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [pytest.param(*pair, marks=() if pair in FEW else pytest.mark.slow) for pair in PAIRS],
)
def test_losses_are_those_of_one_device(base, expected, mesh, microbatches):
    found, _, _ = run(session(mesh), ADAMW, base, microbatches)
    assert_same(found, expected)
    assert np.abs(np.diff(found[:, 0])).min() > 1e-3  # the steps do something


def test_microbatches_on_one_device(base, expected):
    assert_same(run(session("1"), ADAMW, base, 4)[0], expected)


def shard(tree, path):
    """Shape of one device's part of a leaf, with the leaf's own."""
    leaf = trees.flatten(tree)[path]
    return leaf.addressable_shards[0].data.shape, leaf.shape


def test_adafactor_on_a_mesh(base):
    expected, _, _ = run(session("1"), ADAFACTOR, base, 1)
    found, state, _ = run(session("2x2x2"), ADAFACTOR, base, 2)
    assert_same(found, expected)
    path = "encoder/layers/self_attention/query/kernel"
    assert shard(state.params, path) == ((2, 16, 2, 8), (2, 32, 4, 8))
    # The mean over the column is whole there and split along heads; the row's the other way round.
    assert shard(state.opt_state, f"v_row/{path}") == ((2, 1, 2, 8), (2, 1, 4, 8))
    assert shard(state.opt_state, f"v_col/{path}") == ((2, 16, 1, 1), (2, 32, 1, 1))


def test_lora_on_a_mesh_with_dropout(base):
    """With the same microbatches, dropout too draws the same numbers on every mesh."""
    loss = Loss(z_loss=1e-3, label_smoothing=0.1, normalisation=losses.by_sequence)
    expected, _, _ = run(session("1", LORA, DROPPING), ADAMW, base, 2, loss)
    found, state, frozen = run(session("2x2x2", LORA, DROPPING), ADAMW, base, 2, loss)
    assert_same(found, expected)
    path = "decoder/layers/self_attention/query/kernel"
    assert shard(frozen, path) == ((2, 16, 2, 8), (2, 32, 4, 8))
    assert shard(state.params, f"{path}/a") == ((2, 16, 4), (2, 32, 4))
    assert shard(state.params, f"{path}/b") == ((2, 4, 2, 8), (2, 4, 4, 8))
    moment = next(p for p in trees.flatten(state.opt_state) if p.endswith(f"mu/{path}/b"))
    assert shard(state.opt_state, moment) == ((2, 4, 2, 8), (2, 4, 4, 8))
    embedding = "token_embedding/embedding"
    assert shard(state.params, f"{embedding}/a") == ((48, 4), (96, 4))
    assert shard(state.params, f"{embedding}/b") == ((4, 16), (4, 32))


def test_parameters_and_state_are_born_sharded(base):
    """Made by the session's jitted initialisers, and equal to the same made on one device."""
    split = session("2x2x2")
    optimizer = split.optimizer(ADAMW)
    params = split.init_base()
    state = split.init_opt_state(optimizer, params)
    path = "decoder/layers/mlp/wi_0/kernel"
    assert shard(params, path) == ((2, 16, 32), (2, 32, 64))
    assert shard(params, "token_embedding/embedding") == ((48, 16), (96, 32))
    for moment in ("mu", "nu"):
        (found,) = (p for p in trees.flatten(state) if p.endswith(f"{moment}/{path}"))
        assert shard(state, found) == ((2, 16, 32), (2, 32, 64))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.device_get(params),
        base,
    )


def test_a_step_is_its_definition(base):
    """One step against gradient, division and update written out."""
    batch = harness.uneven_batch(common.T5, ROWS)
    whole = session("1")
    transformation = whole.optimizer(ADAMW)
    model = whole.model

    @jax.jit
    def mean_loss(params):
        logits = model.apply({"params": params}, batch).astype(jnp.float32)
        log_p = jax.nn.log_softmax(logits)
        targets = batch[types.DECODER_TARGET_TOKENS][..., None]
        weights = batch[types.DECODER_LOSS_WEIGHTS]
        picked = jnp.take_along_axis(log_p, targets, axis=-1)[..., 0]
        return -jnp.sum(picked * weights) / jnp.sum(weights)

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(base)
    updates, _ = jax.jit(transformation.update)(grads, jax.jit(transformation.init)(base), base)
    state, _ = harness.start(whole, transformation, base)
    step = compiled_step(whole, ADAMW, state, {}, 1, Loss())
    state, metrics = step(state, {}, put(whole, 0))
    np.testing.assert_allclose(metrics["loss"] / metrics["denominator"], loss, rtol=1e-5)
    assert (int(metrics["step"]), int(state.step)) == (0, 1)
    # Adam's first step is the sign of the gradient: compare where that is not rounding error.
    jax.tree.map(
        lambda new, old, update, grad: np.testing.assert_allclose(
            np.where(np.abs(grad) > 1e-6, new - old, 0),
            np.where(np.abs(grad) > 1e-6, update, 0),
            rtol=1e-3,
            atol=1e-5,
        ),
        *jax.device_get((state.params, base, updates, grads)),
    )


def test_tokens_are_counted_without_padding():
    batch = harness.uneven_batch(common.T5, 8)
    real = sum(int((batch[k] > 0).sum()) for k in batch if k.endswith("segment_ids"))
    assert int(count_tokens(batch)) == real
    bare = {k: v for k, v in batch.items() if k.endswith("input_tokens")}
    assert int(count_tokens(bare)) == 8 * (12 + 10)


def test_a_batch_without_targets_cannot_be_trained_on():
    batch = common.random_batch(common.BERT)
    with pytest.raises(types.InputError, match="training needs batch\\['decoder_target_tokens'\\]"):
        check_trainable_batch(batch)
