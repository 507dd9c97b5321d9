"""Greedy decoding over a key-value cache, one compiled program a shape.

Shapes: b batch, p prompt length, n new tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from t5x_lite import types
from t5x_lite.models.transformer import Transformer, for_decoding
from t5x_lite.types import Array, Batch, Params


def greedy(
    model: Transformer,
    params: Params,
    batch: Batch,
    *,
    max_tokens: int,
    eos_id: int,
    pad_id: int,
    start_id: int | None = None,
) -> Array:
    """The most probable next token, again and again, until every row has ended.

    The cache holds every row; rows that have ended are fed padding, and the loop stops when all
    have. Wrap in `jax.jit` with `model` and the keyword arguments static.

    Args:
      model: with a decoder.
      params: its parameters, PEFT leaves included.
      batch: for an encoder-decoder `encoder_input_tokens [b, l]`, with `encoder_segment_ids` where
        there is padding. The decoder goes on from `decoder_input_tokens [b, p]`, with
        `decoder_segment_ids` 0 where shorter prompts are padded, on their left; where the batch has
        none, from `start_id` alone.
      max_tokens: n, the most tokens to make.
      eos_id: ends a row.
      pad_id: follows eos.
      start_id: see `batch`; None: `pad_id`, as T5.

    Returns:
      int32 `[b, n]`: tokens up to and with `eos_id`, then `pad_id`.
    """
    variables = {"params": params}
    if types.DECODER_INPUT_TOKENS not in batch:
        rows = batch[types.ENCODER_INPUT_TOKENS].shape[0]
        start = jnp.full((rows, 1), pad_id if start_id is None else start_id, jnp.int32)
        batch = {**batch, types.DECODER_INPUT_TOKENS: start}
    rows, prompt = batch[types.DECODER_INPUT_TOKENS].shape
    # Logits at the last place alone.
    first_batch = {**batch, types.MASKED_POSITIONS: jnp.full((rows, 1), prompt - 1, jnp.int32)}
    capacity = prompt + max_tokens - 1  # the last token is never fed
    logits, cache = model.apply(variables, first_batch, capacity, method="prefill")

    variables = {"params": for_decoding(params)}

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
