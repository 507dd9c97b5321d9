"""Cached decoding equals uncached, row by row, and compiles once a shape."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.decode.greedy import greedy
from tests import common

EOS, PAD, NEW = 1, 0, 9


def padded_batch():
    """Rows of different lengths, padding at the end."""
    rng = np.random.default_rng(3)
    lengths = np.array([12, 5, 9])
    segments = (np.arange(12)[None] < lengths[:, None]).astype(np.int32)
    tokens = rng.integers(2, 96, segments.shape).astype(np.int32) * segments
    return {types.ENCODER_INPUT_TOKENS: tokens, types.ENCODER_SEGMENT_IDS: segments}


def uncached(model, params, batch):
    """The definition: the whole prefix through the model for each new token, one row at a time.

    What follows the prefix is padding that a causal decoder cannot see: one shape, one program.
    """
    rows = []
    for row in range(batch[types.ENCODER_INPUT_TOKENS].shape[0]):
        length = int(batch[types.ENCODER_SEGMENT_IDS][row].sum())
        encoder = batch[types.ENCODER_INPUT_TOKENS][row : row + 1, :length]
        tokens = [PAD]
        for _ in range(NEW):
            inputs = {
                types.ENCODER_INPUT_TOKENS: encoder,
                types.DECODER_INPUT_TOKENS: np.asarray([(tokens + [PAD] * NEW)[:NEW]], np.int32),
            }
            tokens.append(int(np.argmax(common.call(model, params, inputs)[0, len(tokens) - 1])))
            if tokens[-1] == EOS:
                break
        rows.append((tokens[1:] + [PAD] * NEW)[:NEW])
    return np.asarray(rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_equals_recomputing_everything(seed):
    model, params = common.build(common.T5, seed)
    batch = padded_batch()
    expected = uncached(model, params, batch)
    # Make one row end early: its second token becomes eos, by swapping the two in the tables.
    token = int(expected[0, 1])
    params["lm_head"]["kernel"] = (
        params["lm_head"]["kernel"].at[:, jnp.array([token, EOS])].set(
            params["lm_head"]["kernel"][:, jnp.array([EOS, token])]
        )
    )  # fmt: skip
    table = params["token_embedding"]["embedding"]
    swap = jnp.array([token, EOS])
    params["token_embedding"]["embedding"] = table.at[swap].set(table[swap[::-1]])
    batch[types.ENCODER_INPUT_TOKENS] = np.where(
        batch[types.ENCODER_INPUT_TOKENS] == token, EOS, batch[types.ENCODER_INPUT_TOKENS]
    )
    expected = uncached(model, params, batch)
    assert EOS in expected[0, :3]
    decode = jax.jit(functools.partial(greedy, model, max_tokens=NEW, eos_id=EOS, pad_id=PAD))
    np.testing.assert_array_equal(decode(params, batch), expected)


@pytest.mark.parametrize(
    "config",
    [common.T5, *(common.FAMILIES[name] for name in ("bart", "gpt2", "llama"))],
    ids=["t5", "bart", "gpt2", "llama"],
)
def test_cached_logits_equal_uncached(config):
    model, params = common.build(config)
    batch = common.random_batch(config)
    batch = {k: v for k, v in batch.items() if k.endswith("input_tokens")}
    tokens = batch[types.DECODER_INPUT_TOKENS]
    variables = {"params": params}
    expected = common.call(model, params, batch)
    prefill = jax.jit(lambda v, b: model.apply(v, b, 10, method="prefill"))
    extend = jax.jit(lambda v, t, c: model.apply(v, t, c, method="extend"))
    start = batch | {types.DECODER_INPUT_TOKENS: tokens[:, :3]}
    logits, cache = prefill(variables, start)
    np.testing.assert_allclose(logits, expected[:, :3], rtol=1e-5, atol=1e-5)
    for place in range(3, tokens.shape[1]):
        logits, cache = extend(variables, tokens[:, place : place + 1], cache)
        np.testing.assert_allclose(
            logits[:, 0], expected[:, place], rtol=1e-5, atol=1e-5, err_msg=str(place)
        )


def test_one_program_serves_every_batch_of_a_shape():
    model, params = common.build(common.T5)
    traces = []

    def counted(params, batch):
        traces.append(1)
        return greedy(model, params, batch, max_tokens=NEW, eos_id=EOS, pad_id=PAD)

    decode = jax.jit(counted)
    for shift in range(3):
        batch = padded_batch()
        batch[types.ENCODER_INPUT_TOKENS] = (batch[types.ENCODER_INPUT_TOKENS] + shift) % 90
        decode(params, batch)
    assert len(traces) == 1
