"""Text from a model with a decoder: prefill, then one token a step over a key-value cache.

One compiled program a shape, whatever the strategy.

Shapes: b batch, p prompt length, n new tokens, v vocab.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite import types
from t5x_lite.decode import beam, sampling
from t5x_lite.decode.sampling import BeamSearch, Greedy, Sampling, Strategy
from t5x_lite.models.cache import Cache, CacheDtype
from t5x_lite.models.transformer import Transformer, for_decoding
from t5x_lite.types import Array, Batch, InputError, Params


def generate(
    model: Transformer,
    params: Params,
    batch: Batch,
    *,
    strategy: Strategy = Greedy(),
    max_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    start_id: int | None = None,
    rng: Array | None = None,
    cache_dtype: CacheDtype | None = None,
    window: int | None = None,
) -> Array:
    """New tokens, again and again, until every row has ended.

    Rows that have ended are fed padding. Wrap in `jax.jit`, with `model` and the keyword arguments
    static but for `rng`. What a row becomes does not depend on the rows beside it.

    Args:
      model: with a decoder and a language model's head.
      params: its parameters, PEFT leaves included.
      batch: for an encoder-decoder `encoder_input_tokens [b, l]`, with `encoder_segment_ids` where
        there is padding. The decoder goes on from `decoder_input_tokens [b, p]`, with
        `decoder_segment_ids` 0 where shorter prompts are padded, on their left; where the batch has
        none, from `start_id` alone.
      strategy: how tokens are chosen. Beam search gives the best beam; see `search_beams`.
      max_tokens: n, the most tokens to make.
      eos_id: ends a row; there may be several.
      pad_id: follows eos.
      start_id: see `batch`; None: `pad_id`, as T5.
      rng: for Sampling: a key, of which each row gets its own by its number; or keys `[b]`.
      cache_dtype, window: see `Transformer.prefill`. Beams have no window.

    Returns:
      int32 `[b, n]`: tokens up to and with eos, then `pad_id`.

    Raises:
      InputError: sampling without a key, a model that writes nothing, too many beams.
    """
    if isinstance(strategy, BeamSearch):
        found = search_beams(
            model,
            params,
            batch,
            strategy=strategy,
            max_tokens=max_tokens,
            eos_id=eos_id,
            pad_id=pad_id,
            start_id=start_id,
            cache_dtype=cache_dtype,
            window=window,
        )
        return found.tokens[:, 0]
    if isinstance(strategy, Sampling) and rng is None:
        raise InputError("generate draws tokens for Sampling: give it `rng`, a jax.random.key")
    logits, cache, seen = _prefill(
        model, params, batch, strategy, max_tokens, pad_id, start_id, cache_dtype, window
    )
    rows = logits.shape[0]
    params = for_decoding(params)
    keys = None if rng is None else sampling.row_keys(rng, rows)
    eos_ids = _tuple(eos_id)

    def choose(logits: Array, count: Array, ended: Array, seen: Array | None) -> tuple:
        adjusted = sampling.adjust(logits, seen, strategy)
        drawn = None if keys is None else sampling.keys_at(keys, count)
        token = jnp.where(ended, pad_id, sampling.choose(adjusted, strategy, drawn))
        if seen is not None:
            seen = seen.at[jnp.arange(rows), token].set(True)
        return token, ended | beam.ended_by(token, eos_ids), seen

    def unfinished(carry: tuple) -> Array:
        count, _, ended, *_ = carry
        return (count < max_tokens) & ~jnp.all(ended)

    def advance(carry: tuple) -> tuple:
        count, token, ended, seen, tokens, cache = carry
        logits, cache = _extend(model, params, token[:, None], cache)
        token, ended, seen = choose(logits[:, -1], count, ended, seen)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, count))
        return count + 1, token, ended, seen, tokens, cache

    token, ended, seen = choose(logits, jnp.int32(0), jnp.zeros((rows,), bool), seen)
    tokens = jnp.full((rows, max_tokens), pad_id, jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), token, ended, seen, tokens, cache)
    return jax.lax.while_loop(unfinished, advance, carry)[4]


def search_beams(
    model: Transformer,
    params: Params,
    batch: Batch,
    *,
    strategy: BeamSearch,
    max_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    start_id: int | None = None,
    cache_dtype: CacheDtype | None = None,
    window: int | None = None,
) -> beam.Beams:
    """All beams with their scores, the best first; arguments as `generate`'s."""
    if window is not None:
        raise InputError(
            f"generate.window={window} is for Greedy and Sampling: beams go on from places that a "
            "rolling cache writes over"
        )
    logits, cache, seen = _prefill(
        model, params, batch, strategy, max_tokens, pad_id, start_id, cache_dtype, None
    )
    params = for_decoding(params)
    return beam.search(
        functools.partial(_extend, model, params),
        logits,
        cache,
        seen,
        strategy=strategy,
        max_tokens=max_tokens,
        eos_ids=_tuple(eos_id),
        pad_id=pad_id,
    )


def _prefill(
    model: Transformer,
    params: Params,
    batch: Batch,
    strategy: Strategy,
    max_tokens: int,
    pad_id: int,
    start_id: int | None,
    cache_dtype: CacheDtype | None,
    window: int | None,
) -> tuple[Array, Cache, Array | None]:
    """Logits `[b, v]` of the first new token, the cache, and the tokens seen where they count."""
    if model.config.decoder is None:
        raise InputError("generate needs a model with a decoder; this one is an encoder alone")
    if max_tokens < 1:
        raise InputError(f"generate.max_tokens={max_tokens}: expected at least 1")
    if types.DECODER_INPUT_TOKENS not in batch:
        rows = batch[types.ENCODER_INPUT_TOKENS].shape[0]
        start = jnp.full((rows, 1), pad_id if start_id is None else start_id, jnp.int32)
        batch = {**batch, types.DECODER_INPUT_TOKENS: start}
    tokens = batch[types.DECODER_INPUT_TOKENS]
    rows, prompt = tokens.shape
    # Logits at the last place alone.
    batch = {**batch, types.MASKED_POSITIONS: jnp.full((rows, 1), prompt - 1, jnp.int32)}
    branches = strategy.beams if isinstance(strategy, BeamSearch) else 1
    capacity = prompt + max_tokens - 1  # the last token is never fed
    logits, cache = model.apply(
        {"params": params},
        batch,
        capacity,
        cache_dtype=cache_dtype,
        window=window,
        branches=branches,
        method="prefill",
    )
    seen = None
    if sampling.counts_repetitions(strategy):
        real = batch.get(types.DECODER_SEGMENT_IDS, jnp.ones_like(tokens)) > 0
        seen = sampling.tokens_seen(tokens, real, logits.shape[-1])
    return logits[:, 0], cache, seen


def _extend(
    model: Transformer, params: Params, tokens: Array, cache: Cache, allowed: Array | None = None
) -> tuple[Any, Cache]:
    logits, cache = model.apply({"params": params}, tokens, cache, allowed, method="extend")
    return logits, cache


def _tuple(eos_id: int | tuple[int, ...]) -> tuple[int, ...]:
    return (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
