"""What a masked language model would write at its masks.

Shapes: b batch, s slots, k candidates.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from t5x_lite import types
from t5x_lite.models.transformer import Transformer
from t5x_lite.types import Array, Batch, Params


def fill_mask(
    model: Transformer,
    params: Params,
    batch: Batch,
    *,
    candidates: int,
    vocab_size: int | None = None,
) -> tuple[Array, Array]:
    """The most probable tokens at each masked slot, every mask taken by itself.

    Args:
      model: an encoder alone with a language model's head. A head for pairs is left out: every
        slot is a mask.
      params: its parameters, PEFT leaves included.
      batch: `encoder_input_tokens [b, l]` and `masked_positions [b, s]`.
      candidates: k.
      vocab_size: of the vocabulary: the model's table may have more rows, which are no tokens.
        None: all are.

    Returns:
      Tokens int32 and their probabilities float32, `[b, s, k]`, the most probable first.
    """
    assert types.MASKED_POSITIONS in batch
    # With a pair head, the first slot would be the pair's.
    model = model.clone(config=dataclasses.replace(model.config, pair_head=None))
    logits = model.apply({"params": params}, batch).astype(jnp.float32)[..., :vocab_size]
    probabilities, tokens = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), candidates)
    return tokens.astype(jnp.int32), probabilities
