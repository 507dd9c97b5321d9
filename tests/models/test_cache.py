"""A cache is an optimisation: whatever its form, logits are those of the whole row at once."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.kernels.plain import Visibility, dot_product_attention
from t5x_lite.models import cache as kv_cache
from t5x_lite.models.attention import cached_attention
from t5x_lite.models.transformer import for_decoding
from t5x_lite.types import InputError
from tests import common

ROWS, LENGTH, PROMPT = 3, 11, 4


@functools.cache
def build(name):
    model, params = common.build(common.T5 if name == "t5" else common.FAMILIES[name])
    return model, for_decoding(params)


def batch_of(model):
    rng = np.random.default_rng(0)
    batch = {types.DECODER_INPUT_TOKENS: rng.integers(2, 96, (ROWS, LENGTH)).astype(np.int32)}
    if model.config.encoder is not None:
        tokens = rng.integers(2, 96, (ROWS, 6)).astype(np.int32)
        real = (np.arange(6)[None] < np.array([[6], [3], [5]])).astype(np.int32)
        batch |= {types.ENCODER_INPUT_TOKENS: tokens, types.ENCODER_SEGMENT_IDS: real}
    return batch


def start(model, params, batch, capacity=LENGTH, **options):
    first = batch | {
        types.DECODER_INPUT_TOKENS: batch[types.DECODER_INPUT_TOKENS][:, :PROMPT],
    }
    prefill = functools.partial(model.apply, method="prefill", **options)
    return jax.jit(prefill, static_argnums=2)({"params": params}, first, capacity)


def stepped(model, params, tokens, cache):
    """Logits of the tokens behind the prompt, one at a time: `[b, n, v]`."""
    extend = jax.jit(lambda p, t, c: model.apply({"params": p}, t, c, method="extend"))
    found = []
    for place in range(PROMPT, LENGTH):
        logits, cache = extend(params, tokens[:, place : place + 1], cache)
        found.append(logits[:, 0])
    return np.stack(found, axis=1)


def whole(model, params, batch):
    """The definition, without a cache. Rows that stand apart are of one segment."""
    if types.ENCODER_SEGMENT_IDS in batch:
        batch = batch | {types.DECODER_SEGMENT_IDS: np.ones((ROWS, LENGTH), np.int32)}
    return np.asarray(jax.jit(model.apply)({"params": params}, batch))[:, PROMPT:]


@pytest.mark.parametrize("name", ["t5", pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_an_index_a_row_gives_what_one_for_all_gives(name):
    model, params = build(name)
    batch = batch_of(model)
    tokens = batch[types.DECODER_INPUT_TOKENS]
    expected = whole(model, params, batch)
    _, cache = start(model, params, batch)
    np.testing.assert_allclose(
        stepped(model, params, tokens, cache), expected, rtol=1e-4, atol=1e-4
    )
    apart = dataclasses.replace(cache, index=jnp.full(ROWS, PROMPT, jnp.int32))
    np.testing.assert_allclose(
        stepped(model, params, tokens, apart), expected, rtol=1e-4, atol=1e-4
    )


def test_rows_that_stand_at_different_places_do_not_meet():
    """Row i has read i tokens less; its next ones are written over what came behind."""
    model, params = build("t5")
    batch = batch_of(model)
    tokens = batch[types.DECODER_INPUT_TOKENS]
    _, cache = start(model, params, batch)
    behind = jnp.arange(ROWS, dtype=jnp.int32)
    cache = dataclasses.replace(cache, index=PROMPT - behind, positions=PROMPT - behind)
    shifted = np.stack(
        [np.roll(row, shift) for row, shift in zip(tokens, range(ROWS), strict=True)]
    )
    found = stepped(model, params, shifted, cache)
    expected = np.asarray(
        jax.jit(model.apply)(
            {"params": params},
            batch | {types.DECODER_SEGMENT_IDS: np.ones((ROWS, LENGTH), np.int32)},
        )
    )
    for row in range(ROWS):
        np.testing.assert_allclose(
            found[row], expected[row, PROMPT - row : LENGTH - row], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.02)])
def test_a_smaller_cache_changes_logits_little(dtype, tolerance):
    """Root mean square of the difference, as a share of that of the logits."""
    model, params = build("t5")
    batch = batch_of(model)
    expected = whole(model, params, batch)
    _, cache = start(model, params, batch, cache_dtype=dtype)
    leaves = {leaf.dtype for leaf in jax.tree.leaves(cache.layers)}
    assert jnp.dtype(dtype) in leaves
    found = stepped(model, params, batch[types.DECODER_INPUT_TOKENS], cache)
    difference = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert 0.0 < difference < tolerance


def test_rounded_vectors_are_within_half_a_step():
    vectors = 3.0 * jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    vectors = vectors.at[0, 0, 0].set(0.0)
    kept = kv_cache.rounded(vectors, "int8")
    error = jnp.abs(kv_cache.read(kept, jnp.float32) - vectors)
    assert bool(jnp.all(error <= 0.5001 * kept.scale[..., None]))


@pytest.mark.parametrize(
    ("name", "window"),
    [("t5", 3), ("llama", 6), *(pytest.param("gpt2", n, marks=pytest.mark.slow) for n in (3, 6))],
)
def test_a_window_is_attention_to_the_last_tokens(name, window, monkeypatch):
    """Places are used again, and nothing changes: full attention with a mask says what comes."""
    model, params = build(name)
    batch = batch_of(model)
    _, cache = start(model, params, batch, window=window)
    assert cache.capacity == window
    found = stepped(model, params, batch[types.DECODER_INPUT_TOKENS], cache)
    plain = Visibility.mask

    def limited(self):
        mask = plain(self)
        if self.query_places is None:
            return mask
        near = self.key_places[None, :] > self.query_places[:, None] - window
        return mask & near[None, None]

    monkeypatch.setattr(Visibility, "mask", limited)
    np.testing.assert_allclose(found, whole(model, params, batch), rtol=1e-4, atol=1e-4)


def test_a_window_takes_one_token_at_a_time():
    model, params = build("gpt2")
    _, cache = start(model, params, batch_of(model), window=3)
    with pytest.raises(InputError, match="one token at a time, not 2"):
        model.apply({"params": params}, jnp.zeros((ROWS, 2), jnp.int32), cache, method="extend")


def test_a_prompt_longer_than_its_cache_is_an_error():
    model, params = build("gpt2")
    with pytest.raises(InputError, match="4 tokens is longer than the cache's 3"):
        start(model, params, batch_of(model), capacity=3)


@pytest.mark.parametrize(("shared", "heads"), [(1, 4), (1, 2), (3, 4), (3, 2)])
def test_queries_share_keys(shared, heads):
    """Rows of queries over one row of the cache, and heads over one head: as if repeated."""
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2 * shared, 5, 4, 8))
    key, value = (jax.random.normal(k, (2, heads, 7, 8)) for k in keys[1:3])
    bias = jax.random.normal(keys[3], (1, 4, 5, 7))
    segments = jnp.array([[1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    ones = jnp.ones((2, 5), jnp.int32)
    found = cached_attention(query, key, value, Visibility(ones, segments), bias)

    def repeated(x):
        return jnp.repeat(jnp.swapaxes(jnp.repeat(x, 4 // heads, axis=1), 1, 2), shared, axis=0)

    visibility = Visibility(jnp.repeat(ones, shared, axis=0), jnp.repeat(segments, shared, axis=0))
    expected = dot_product_attention(query, repeated(key), repeated(value), visibility, bias)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
