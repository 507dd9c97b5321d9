"""Greedy decoding over a key-value cache, one compiled program a shape.

Shapes: b batch, n new tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from t5x_lite import types
from t5x_lite.models.transformer import Transformer
from t5x_lite.types import Array, Batch, Params


def greedy(
    model: Transformer, params: Params, batch: Batch, *, max_tokens: int, eos_id: int, pad_id: int
) -> Array:
    """The most probable next token, again and again, until every row has ended.

    The cache holds every row; rows that have ended are fed padding, and the loop stops when all
    have. Wrap in `jax.jit` with `model` and the keyword arguments static.

    Args:
      model: with an encoder and a decoder.
      params: its parameters, PEFT leaves included.
      batch: `encoder_input_tokens [b, l]`, and `encoder_segment_ids` where there is padding.
      max_tokens: n, the most tokens to make.
      eos_id: ends a row.
      pad_id: follows eos; it is also what decoding starts from, as in T5.

    Returns:
      int32 `[b, n]`: tokens up to and with `eos_id`, then `pad_id`.
    """
    variables = {"params": params}
    rows = batch[types.ENCODER_INPUT_TOKENS].shape[0]
    start = jnp.full((rows, 1), pad_id, jnp.int32)
    first_batch = {**batch, types.DECODER_INPUT_TOKENS: start}
    logits, cache = model.apply(variables, first_batch, max_tokens, method="prefill")

    def choose(logits: Array, ended: Array) -> tuple[Array, Array]:
        token = jnp.argmax(logits[:, -1].astype(jnp.float32), axis=-1).astype(jnp.int32)
        token = jnp.where(ended, pad_id, token)
        return token, ended | (token == eos_id)

    def unfinished(carry: tuple) -> Array:
        count, _, ended, _, _ = carry
        return (count < max_tokens) & ~jnp.all(ended)

    def advance(carry: tuple) -> tuple:
        count, token, ended, tokens, cache = carry
        logits, cache = model.apply(variables, token[:, None], cache, method="extend")
        token, ended = choose(logits, ended)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, count))
        return count + 1, token, ended, tokens, cache

    token, ended = choose(logits, jnp.zeros((rows,), bool))
    tokens = jnp.full((rows, max_tokens), pad_id, jnp.int32).at[:, 0].set(token)
    return jax.lax.while_loop(unfinished, advance, (jnp.int32(1), token, ended, tokens, cache))[3]
