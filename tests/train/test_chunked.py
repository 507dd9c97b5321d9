"""A loss whose logits are made in chunks is the loss of all of them at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import trees, types
from t5x_lite.models.transformer import Transformer, head_parameters
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Full
from t5x_lite.sharding import Partitioner
from t5x_lite.train import chunked
from t5x_lite.train.losses import by_sequence
from t5x_lite.train.optim import AdamW
from t5x_lite.train.session import Session
from t5x_lite.train.step import Loss
from tests import common
from tests.train import harness

ROWS = 4
WHOLE = Loss(z_loss=1e-2, label_smoothing=0.1, normalisation=by_sequence, logits_bytes=0)
# Three tokens of a row at a time: 10 tokens are three chunks and one that is padded.
CHUNKED = dataclasses.replace(WHOLE, logits_bytes=3 * 4 * ROWS * common.T5.vocab_size)
MODELS = {
    "untied": common.T5,
    "tied, scaled": common.FAMILIES["t5_1_0"],
    "tied, with a bias": common.FAMILIES["bart"],
    "decoder": common.GPT,
}


def gradients(config, transform, loss, batch, params):
    """Sums, and gradients in what the transform trains, with dropout."""
    model = Transformer(config)
    session = Session(config, transform, harness.one_device())
    trainable, frozen = session.split(jax.tree.map(jnp.asarray, params))
    trainable = jax.tree.map(lambda p: p + 0.01, trainable)  # off LoRA's start, where a's are zero

    @jax.jit
    def run(trainable):
        def value(trainable):
            sums = loss.of(model, transform.apply(trainable, frozen), batch, jax.random.key(0))
            return sums["loss"], sums

        return jax.grad(value, has_aux=True)(trainable)

    return run(trainable)


def assert_close(*pairs):
    for found, expected in pairs:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected
        )


@pytest.mark.parametrize("name", MODELS)
def test_sums_and_gradients_are_those_of_all_logits_at_once(name):
    config = common.with_stacks(MODELS[name], dropout=0.1)
    batch, params = harness.uneven_batch(config, ROWS), common.host_params(config)
    grads, sums = gradients(config, Full(), CHUNKED, batch, params)
    expected, wanted = gradients(config, Full(), WHOLE, batch, params)
    assert sums.keys() == wanted.keys()
    assert_close((sums, wanted), (grads, expected))


def test_masked_slots_through_a_transform():
    """BERT's head: slots of the row, a projection and a norm before the logits, a bias behind."""
    config = dataclasses.replace(common.FAMILIES["bert"], pair_head=None)
    batch = common.random_batch(config, rows=ROWS)
    slots = np.sort(np.random.default_rng(0).permuted(np.tile(np.arange(10), (ROWS, 1)), axis=1))
    batch = {key: value for key, value in batch.items() if not key.startswith("decoder")}
    batch |= {
        types.MASKED_POSITIONS: slots[:, :7].astype(np.int32),
        types.MASKED_TARGET_TOKENS: np.arange(28, dtype=np.int32).reshape(ROWS, 7),
        types.MASKED_LOSS_WEIGHTS: np.ones((ROWS, 7), np.float32),
    }
    params = common.host_params(config)
    assert_close(
        *zip(
            gradients(config, Full(), CHUNKED, batch, params),
            gradients(config, Full(), WHOLE, batch, params),
            strict=True,
        )
    )


TRANSFORMS = {
    "attention": LoRA(rank=2),
    "head": LoRA(rank=2, targets=("lm_head/kernel",)),
    # Dropout at the head: all at once, for each chunk would draw the same numbers.
    "everywhere": LoRA(rank=2, targets=(".*kernel", "token_embedding/embedding"), dropout=0.2),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_of_adapters(name):
    batch, params = harness.uneven_batch(common.T5, ROWS), common.host_params(common.T5)
    found = gradients(common.T5, TRANSFORMS[name], CHUNKED, batch, params)
    expected = gradients(common.T5, TRANSFORMS[name], WHOLE, batch, params)
    assert_close(*zip(found, expected, strict=True))


def wide(transform, loss):
    """The compiled step of a model whose vocabulary is large beside all else."""
    config = dataclasses.replace(common.T5, vocab_size=4096)
    session = Session(config, transform, harness.one_device())
    optimizer = session.optimizer(AdamW(0.01))
    state, frozen = harness.start(session, optimizer, common.host_params(config))
    batch = harness.uneven_batch(config, ROWS)
    return harness.compile_step(session, optimizer, state, frozen, batch, loss=loss)


def test_logits_never_stand_whole():
    one = 4 * ROWS * 4096  # bytes of one token's logits in every row
    whole, few = (wide(LoRA(), Loss(logits_bytes=size)) for size in (0, one))
    temporaries = [step.memory_analysis().temp_size_in_bytes for step in (whole, few)]
    assert temporaries[0] - temporaries[1] > 8 * one, temporaries
    assert f"f32[{ROWS},10,4096]" in whole.as_text()
    assert f"{ROWS},10,4096]" not in few.as_text()


def test_a_frozen_head_has_no_gradient_and_nothing_is_computed_twice():
    """Products with the vocabulary: logits, their states' gradient, and with Full the kernel's."""
    size = 4 * ROWS * 10 * 4096
    flop = {
        (name, bytes_): wide(transform, Loss(logits_bytes=bytes_)).cost_analysis()["flops"]
        for name, transform in (("lora", LoRA()), ("full", Full()))
        for bytes_ in (size, size - 1)  # one chunk, and two of them in a loop, counted once
    }
    product = 2 * ROWS * 10 * 32 * 4096
    # Half of each product is the loop's second turn; elementwise work on logits is counted too.
    saved = {name: flop[name, size] - flop[name, size - 1] for name in ("lora", "full")}
    assert 0.9 < saved["lora"] / product < 1.3, saved["lora"] / product
    assert 1.4 < saved["full"] / product < 1.8, saved["full"] / product


@pytest.mark.parametrize("microbatches", [1, 2])
def test_on_a_mesh(microbatches):
    """With the vocabulary and the rows split: the step's losses are one device's."""
    loss = Loss(z_loss=1e-3, logits_bytes=3 * 4 * 96)  # some tokens of one row
    base = common.host_params(common.T5)
    records = {}
    for mesh in (harness.one_device(), Partitioner(data=2, fsdp=2, model=2)):
        session = Session(common.T5, Full(), mesh)
        # eps over the gradients' rounding: without, one that is nearly zero steps by its noise.
        optimizer = session.optimizer(AdamW(0.01, eps=1e-3))
        state, frozen = harness.start(session, optimizer, base)
        batch = session.partitioner.put_batch(harness.uneven_batch(common.T5, 16), 16)
        step = harness.compile_step(session, optimizer, state, frozen, batch, microbatches, loss)
        found = []
        for _ in range(3):
            state, metrics = step(state, frozen, batch)
            found.append([float(metrics[key]) for key in ("loss", "gradient_norm", "accuracy")])
        records[mesh.data] = found
    np.testing.assert_allclose(records[2], records[1], rtol=1e-4)


def test_scoring_alone_is_in_chunks_too():
    model, params = common.build(common.GPT)
    batch = harness.uneven_batch(common.GPT, ROWS)
    found, expected = (
        jax.jit(lambda params, loss=loss: loss.of(model, params, batch))(params)
        for loss in (CHUNKED, WHOLE)
    )
    np.testing.assert_allclose(*(list(one.values()) for one in (found, expected)), rtol=1e-5)


def test_bfloat16_gradients_are_summed_in_float32():
    def read(params, x):
        return x @ params

    def score(logits, targets, weights):
        return {"loss": jnp.sum(weights * jnp.sum(logits, axis=-1)) + 0.0 * jnp.sum(targets)}

    states = jnp.ones((1, 1024, 1), jnp.bfloat16)

    def loss(kernel):
        ones = jnp.ones((1, 1024), jnp.float32)
        return chunked.summed(read, score, kernel, states, ones.astype(jnp.int32), ones, 1)["loss"]

    # Added up in bfloat16, ones stop at 256.
    assert float(jax.jit(jax.grad(loss))(jnp.ones((1, 1), jnp.bfloat16))[0, 0]) == 1024


def test_chunks_fit():
    for rows, length, vocab, most in ((4, 10, 96, 4608), (8, 114, 32128, 2**25), (1, 7, 50, 1)):
        chunk = chunked.chunk_length(rows, length, vocab, most)
        assert 1 <= chunk <= length
        assert chunk == 1 or 4 * rows * chunk * vocab <= most
    assert chunked.chunk_length(2, 5, 10, 400) == 5
    with pytest.raises(types.InputError, match="logits_bytes=-1"):
        Loss(logits_bytes=-1)


def test_paths_of_the_head_are_all_that_it_reads():
    """Or a chunk's gradient would miss some of it."""
    for config in MODELS.values():
        model, params = common.build(config)
        own = head_parameters(config, params)
        states = jnp.ones((1, 2, config.embed_dim))
        model.apply({"params": own}, states, method="logits")
        assert set(trees.flatten(own)) <= set(trees.flatten(params))
