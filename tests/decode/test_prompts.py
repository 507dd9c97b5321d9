"""Prompts of unequal length, and greedy decoding of a decoder alone from them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.decode import prompts
from t5x_lite.decode.greedy import greedy
from tests import common

EOS, PAD = 1, 0


def row(tokens, weights, length=8):
    """One unpacked row of a decoder alone, padded to `length`."""
    size = len(tokens)
    room = (0, length - size)
    return {
        types.DECODER_INPUT_TOKENS: np.pad(np.array(tokens, np.int32), room)[None],
        types.DECODER_LOSS_WEIGHTS: np.pad(np.array(weights, np.float32), room)[None],
        types.DECODER_SEGMENT_IDS: np.pad(np.ones(size, np.int32), room)[None],
        types.DECODER_PREFIX: np.pad(1 - np.array(weights, np.int32), room)[None],
    }


def stack(rows):
    return {key: np.concatenate([one[key] for one in rows]) for key in rows[0]}


def test_the_prompt_is_the_unweighted_part_moved_to_the_end():
    batch = stack(
        [
            # the last of the prompt predicts the first weighted target, so it is weighted itself
            row([9, 5, 6, 2, 7, 8], [0, 0, 0, 1, 1, 1]),
            row([9, 4], [1, 1]),
            row([], []),  # only fills the batch up
        ]
    )
    moved = prompts.of_batch({key: jnp.asarray(value) for key, value in batch.items()})
    segments = moved[types.DECODER_SEGMENT_IDS]
    np.testing.assert_array_equal(
        segments, [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1]]
    )
    shown = moved[types.DECODER_INPUT_TOKENS] * segments
    np.testing.assert_array_equal(shown[0], [0, 0, 0, 0, 9, 5, 6, 2])
    np.testing.assert_array_equal(shown[1], [0, 0, 0, 0, 0, 0, 0, 9])
    np.testing.assert_array_equal(moved[types.DECODER_PREFIX][0], [0, 0, 0, 0, 1, 1, 1, 0])


def test_an_encoders_streams_are_the_prompt():
    batch = common.random_batch(common.T5)
    assert set(prompts.of_batch(batch)) == {types.ENCODER_INPUT_TOKENS, types.ENCODER_SEGMENT_IDS}


def test_padding_is_on_the_left():
    padded = prompts.pad_left([np.array([5, 6]), np.array([7])], 3)
    np.testing.assert_array_equal(padded[types.DECODER_INPUT_TOKENS], [[0, 5, 6], [0, 0, 7]])
    np.testing.assert_array_equal(padded[types.DECODER_SEGMENT_IDS], [[0, 1, 1], [0, 0, 1]])


def uncached(model, params, prompt, count, prefix=None):
    """Each new token from the whole row so far; what follows is padding that nothing sees."""
    apply = jax.jit(lambda batch: model.apply({"params": params}, batch))
    tokens = list(prompt)
    for _ in range(count):
        filled = np.array([tokens + [PAD] * (len(prompt) + count - len(tokens))], np.int32)
        batch = {types.DECODER_INPUT_TOKENS: filled}
        if prefix is not None:
            batch[types.DECODER_PREFIX] = np.zeros_like(filled)
            batch[types.DECODER_PREFIX][0, : len(prefix)] = prefix
        tokens.append(int(np.argmax(apply(batch)[0, len(tokens) - 1])))
        if tokens[-1] == EOS:
            break
    found = tokens[len(prompt) :]
    return found + [PAD] * (count - len(found))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_unequal_prompts_decode_as_each_would_alone(family):
    model, params = common.build(common.FAMILIES[family])
    rng = np.random.default_rng(1)
    texts = [rng.integers(2, 96, size).astype(np.int32) for size in (6, 2, 4)]
    decode = jax.jit(functools.partial(greedy, model, max_tokens=5, eos_id=EOS, pad_id=PAD))
    found = decode(params, prompts.pad_left(texts, 6))
    for text, tokens in zip(texts, found.tolist(), strict=True):
        assert tokens == uncached(model, params, text.tolist(), 5)


def test_a_prefix_is_read_in_both_directions():
    model, params = common.build(common.FAMILIES["gpt2"])
    text = np.random.default_rng(2).integers(2, 96, 6).astype(np.int32)
    prefix = [1, 1, 1, 1, 1, 0]
    batch = prompts.pad_left([text], 8)
    batch[types.DECODER_PREFIX] = np.array([[0, 0, *prefix]], np.int32)
    decode = jax.jit(functools.partial(greedy, model, max_tokens=4, eos_id=EOS, pad_id=PAD))
    expected = uncached(model, params, text.tolist(), 4, prefix)
    assert decode(params, batch)[0].tolist() == expected
    causal = model.apply({"params": params}, {types.DECODER_INPUT_TOKENS: text[None]})
    both = model.apply(
        {"params": params},
        {types.DECODER_INPUT_TOKENS: text[None], types.DECODER_PREFIX: np.array([prefix])},
    )
    assert np.abs(causal - both)[0, -1].max() > 1e-3  # or else the test would show nothing
