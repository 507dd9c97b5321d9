"""Beam search over a cache: the most probable whole texts, by two conventions.

| | Hugging Face's `generate` ("hf") | T5X's `beam_search` ("t5x") |
|---|---|---|
| the summed log-probability is divided by | length ** penalty | ((5 + length) / 6) ** penalty |
| texts end by eos, if they rank among | the first `beams` candidates | all candidates |
| the longest texts | count as ended | count where a row has no other |
| a row's search stops | see `BeamSearch.early_stopping` | when no text can be better |

Length is that of the tokens made, eos included. Both look at 2 * beams candidates a step, so that
as many beams go on as there are ("hf": 1 more times for each eos beyond the first). Conventions
and their names: Wu et al. 2016 (section 7) for T5X's length penalty; transformers 5 for the other.

Shapes: b batch, k beams, c candidates, n new tokens, v vocab.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from t5x_lite.decode.sampling import BeamSearch, adjust, counts_repetitions
from t5x_lite.models.cache import Cache
from t5x_lite.types import Array, InputError

_NEVER = -1e9  # the score of what must not be chosen
# `(tokens [b, k], cache, places that each goes on from [b, k, c]) -> (logits [b, k, v], cache)`
Extend = Callable[[Array, Cache, Array], tuple[Array, Cache]]


@flax.struct.dataclass
class Beams:
    """Texts of each row, the best first."""

    tokens: Array  # int32 [b, k, n]: up to and with eos, then padding
    scores: Array  # float32 [b, k]


@flax.struct.dataclass
class _State:
    count: Array  # int32: tokens made
    live: Beams  # texts that go on; scores are sums of log-probabilities
    last: Array  # int32 [b, k]: their last tokens
    done: Beams  # the best texts that ended
    ended: Array  # bool [b, k]: which of those are texts at all
    open: Array  # bool [b]: whether the row's search goes on
    seen: Array | None  # bool [b, k, v]: tokens of the live texts, for a repetition penalty


def search(
    extend: Extend,
    logits: Array,
    cache: Cache,
    seen: Array | None,
    *,
    strategy: BeamSearch,
    max_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Beams:
    """The best `strategy.beams` texts of each row.

    Args:
      extend: feeds the last tokens of all beams; see `Transformer.extend`.
      logits: `[b, v]`, of the first new token.
      cache: of b rows, with k branches of n - 1 tokens behind the prompt. All beams of a row share
        what the encoder and the prompt wrote.
      seen: bool `[b, v]`, tokens of the prompts; None: without a repetition penalty.
      strategy: how.
      max_tokens: n.
      eos_ids: each ends a text.
      pad_id: follows eos.
    """
    rows, vocab_size = logits.shape
    beams, candidates = strategy.beams, _candidates(strategy, eos_ids)
    if candidates > vocab_size:
        raise InputError(
            f"BeamSearch.beams={beams} looks at {candidates} candidates a step, but the vocabulary "
            f"has {vocab_size} tokens: lower it"
        )

    def choose(state: _State, logits: Array) -> tuple[_State, Array]:
        return _choose(state, logits, strategy, max_tokens, eos_ids)

    # Nothing in the cache moves when beams change places: each remembers which places are its own.
    prompt = cache.capacity - beams * (max_tokens - 1)
    places = jnp.arange(cache.capacity)

    def with_next(line: Array, cache: Cache) -> Array:
        return line | (places[None, :] == cache.index + jnp.arange(beams)[:, None])[None]

    def unfinished(carry: tuple[_State, Array, Cache]) -> Array:
        return (carry[0].count < max_tokens) & jnp.any(carry[0].open)

    def advance(carry: tuple[_State, Array, Cache]) -> tuple[_State, Array, Cache]:
        state, line, cache = carry
        logits, cache = extend(state.last, cache, line)
        state, parents = choose(state, logits)
        return state, with_next(_take(line, parents), cache), cache

    def nothing(beams: int, score: float) -> Beams:
        tokens = jnp.full((rows, beams, max_tokens), pad_id, jnp.int32)
        return Beams(tokens, jnp.full((rows, beams), score, jnp.float32))

    start = _State(
        count=jnp.int32(0),
        live=nothing(1, 0.0),  # the prompt is the one text to go on from
        last=jnp.zeros((rows, 1), jnp.int32),
        done=nothing(beams, _NEVER),
        ended=jnp.zeros((rows, beams), bool),
        open=jnp.ones((rows,), bool),
        seen=None if seen is None else seen[:, None],
    )
    state, _ = choose(start, logits[:, None])
    line = jnp.broadcast_to(places < prompt, (rows, beams, cache.capacity))
    carry = (state, with_next(line, cache), cache)
    state = jax.lax.while_loop(unfinished, advance, carry)[0]
    if strategy.convention == "hf":
        return state.done
    some = jnp.any(state.ended, axis=1)[:, None]
    return jax.tree.map(
        lambda done, live: jnp.where(some.reshape(-1, *(1,) * (done.ndim - 1)), done, live),
        state.done,
        state.live,
    )


def _choose(
    state: _State, logits: Array, strategy: BeamSearch, max_tokens: int, eos_ids: tuple[int, ...]
) -> tuple[_State, Array]:
    """The state one token on, and of which live text `[b, k]` each is the continuation."""
    beams = strategy.beams
    scores, parents, tokens = _best(logits, state, strategy, _candidates(strategy, eos_ids))
    texts = _take(state.live.tokens, parents)
    texts = jax.lax.dynamic_update_slice(texts, tokens[:, :, None], (0, 0, state.count))
    count = state.count + 1
    ends = ended_by(tokens, eos_ids)
    finishes = ends
    if strategy.convention == "hf":
        ends |= count == max_tokens
        finishes = ends & (jnp.arange(ends.shape[1]) < beams)[None, :]
    # Texts that ended, old and new.
    final = scores / _length_factor(strategy, count)
    final = jnp.where(finishes & state.open[:, None], final, _NEVER)
    merged, places = jax.lax.top_k(jnp.concatenate([state.done.scores, final], axis=1), beams)
    done = Beams(_take(jnp.concatenate([state.done.tokens, texts], axis=1), places), merged)
    ended = _take(jnp.concatenate([state.ended, finishes], axis=1), places)
    # Texts that go on.
    going, places = jax.lax.top_k(jnp.where(ends, _NEVER, scores), beams)
    live = Beams(_take(texts, places), going)
    last, parents = _take(tokens, places), _take(parents, places)
    seen = state.seen
    if seen is not None:
        row, beam = jnp.arange(seen.shape[0])[:, None], jnp.arange(beams)[None, :]
        seen = _take(seen, parents).at[row, beam, last].set(True)
    still = state.open & _improvable(strategy, count, max_tokens, going[:, 0], merged, ended)
    return _State(count, live, last, done, ended, still, seen), parents


def _best(
    logits: Array, state: _State, strategy: BeamSearch, count: int
) -> tuple[Array, Array, Array]:
    """The `count` best continuations: scores, which live text they continue, tokens: `[b, c]`."""
    flat = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)
    if counts_repetitions(strategy):
        # Hugging Face's order: the penalty changes log-probabilities, and nothing makes them sum
        # to one again.
        assert state.seen is not None
        seen = state.seen.reshape(flat.shape)
        scores, tokens = jax.lax.top_k(adjust(jax.nn.log_softmax(flat), seen, strategy), count)
    else:
        scores, tokens = jax.lax.top_k(flat, count)
        scores = scores - jax.nn.logsumexp(flat, axis=-1, keepdims=True)
    scores = scores.reshape(*logits.shape[:2], count) + state.live.scores[:, :, None]
    # The best of all are among the best of each.
    scores, places = jax.lax.top_k(scores.reshape(scores.shape[0], -1), count)
    return scores, places // count, _take(tokens.reshape(scores.shape[0], -1), places)


def _length_factor(strategy: BeamSearch, length: Array | int) -> Array:
    """What a text's summed log-probability is divided by."""
    length = jnp.asarray(length, jnp.float32)
    base = length if strategy.convention == "hf" else (5.0 + length) / 6.0
    return base**strategy.penalty


def _improvable(
    strategy: BeamSearch,
    count: Array,
    max_tokens: int,
    going: Array,
    scores: Array,
    ended: Array,
) -> Array:
    """Whether a row's texts may still change: bool `[b]`.

    `going [b]` is the best live sum; `scores` and `ended` `[b, k]` are of the texts that ended.
    """
    full = jnp.all(ended, axis=1)
    if strategy.early_stopping is True:
        return ~full
    # The length at which the best live text scores highest. "hf" takes the present one, a guess
    # where longer texts gain, unless it is told "never" to guess.
    longest = strategy.convention == "t5x" or strategy.early_stopping == "never"
    length = max_tokens if longest and strategy.penalty > 0 else count
    return ~full | (going / _length_factor(strategy, length) > jnp.min(scores, axis=1))


def _candidates(strategy: BeamSearch, eos_ids: tuple[int, ...]) -> int:
    return strategy.beams * (max(2, 1 + len(eos_ids)) if strategy.convention == "hf" else 2)


def ended_by(tokens: Array, eos_ids: tuple[int, ...]) -> Array:
    """Bool, of the tokens' shape: which are one of `eos_ids`."""
    found = jnp.zeros(tokens.shape, bool)
    for eos in eos_ids:
        found |= tokens == eos
    return found


def _take(x: Array, places: Array) -> Array:
    """`x [b, m, ...]` at `places [b, c]`, which are places of m: `[b, c, ...]`.

    To say that they are, and to give XLA:CPU few axes, is eight times faster.
    """
    flat = x.reshape(*x.shape[:2], -1)
    taken = jnp.take_along_axis(flat, places[..., None], axis=1, mode="promise_in_bounds")
    return taken.reshape(*places.shape, *x.shape[2:])
