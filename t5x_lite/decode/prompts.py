"""Prompts for decoding: rows of unequal length end at the same place, padded on their left.

Shapes: b batch, l length.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from t5x_lite import types
from t5x_lite.types import Array, Batch


def of_batch(batch: Batch) -> dict[str, Array]:
    """What `greedy` needs of a teacher-forced batch with one example a row.

    An encoder's streams as they are. Of a decoder alone, the part of each row that carries no loss,
    moved to the row's end:

        decoder_input_tokens   0 5 6 1 7 8      ->   decoder_input_tokens   7 8 0 5 6 1
        decoder_loss_weights   0 0 0 1 1 1           decoder_segment_ids    0 0 1 1 1 1

    The place before the first weighted target is the prompt's last: it predicts that target.
    """
    if types.ENCODER_INPUT_TOKENS in batch:
        return {key: value for key, value in batch.items() if key.startswith("encoder_")}
    tokens, weights = batch[types.DECODER_INPUT_TOKENS], batch[types.DECODER_LOSS_WEIGHTS]
    real = batch.get(types.DECODER_SEGMENT_IDS, jnp.ones(tokens.shape, jnp.int32)) > 0
    length = jnp.sum(real & (jnp.cumsum(weights > 0, axis=1) == 0), axis=1, keepdims=True) + 1
    places = jnp.arange(tokens.shape[1])[None, :] - (tokens.shape[1] - length)
    places = places % tokens.shape[1]
    moved = {
        types.DECODER_INPUT_TOKENS: jnp.take_along_axis(tokens, places, axis=1),
        types.DECODER_SEGMENT_IDS: (places < length).astype(jnp.int32),
    }
    if types.DECODER_PREFIX in batch:
        prefix = jnp.take_along_axis(batch[types.DECODER_PREFIX], places, axis=1)
        moved[types.DECODER_PREFIX] = prefix * moved[types.DECODER_SEGMENT_IDS]
    return moved


def pad_left(prompts: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Prompts as one batch of `decoder_input_tokens` and `decoder_segment_ids` `[b, length]`.

    [5 6] [7], length 3:    tokens  0 5 6    segments  0 1 1
                                    0 0 7              0 0 1
    """
    tokens: np.ndarray = np.zeros((len(prompts), length), np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return {types.DECODER_INPUT_TOKENS: tokens, types.DECODER_SEGMENT_IDS: segments}


def pad_right(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded behind, and which places are theirs: two int32 `[b, length]`.

    [5 6] [7], length 3:    tokens  5 6 0    segments  1 1 0
                                    7 0 0              1 0 0
    """
    tokens: np.ndarray = np.zeros((len(rows), length), np.int32)
    segments = np.zeros_like(tokens)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    return tokens, segments
