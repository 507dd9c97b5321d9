"""How the next token is chosen: strategies as data, and the pure functions of logits they name.

Every function works on rows by themselves: what a row gives depends on its logits and its key
alone. A limit is a number, or one for each row `[b]`, so that one program serves requests that
differ.

Shapes: b batch, v vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.types import Array, InputError

_NEVER = -np.inf  # the logit of a token that is not to be drawn
_BLOCK = 256  # tokens summed together where one is drawn: about the root of a vocabulary's size
_COLDEST = 1e-6  # temperature: logits of 1e30 divided by it are float32 numbers still
Limit: TypeAlias = Any  # a number, or an array [b]: one for each row


@dataclass(frozen=True)
class Greedy:
    """The most probable token, always."""

    repetition_penalty: float = 1.0  # see `penalise`; 1: none

    def __post_init__(self) -> None:
        _check(self, "repetition_penalty", self.repetition_penalty > 0, "more than 0")


@dataclass(frozen=True)
class Sampling:
    """A token drawn by its probability, of those that every limit leaves; in this order."""

    temperature: float = 1.0  # logits are divided by it: below 1 sharper, above 1 flatter
    top_k: int | None = None  # so many of the most probable tokens
    top_p: float | None = None  # the fewest tokens that hold this much of the probability
    min_p: float | None = None  # tokens at least this many times as probable as the most probable
    repetition_penalty: float = 1.0  # see `penalise`; before all else. 1: none

    def __post_init__(self) -> None:
        mend = f"{_COLDEST} or more (for the most probable token alone use Greedy())"
        _check(self, "temperature", self.temperature >= _COLDEST, mend)
        _check(self, "top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None")
        for name in ("top_p", "min_p"):
            share = getattr(self, name)
            within = "more than 0 and at most 1, or None"
            _check(self, name, share is None or 0.0 < share <= 1.0, within)
        _check(self, "repetition_penalty", self.repetition_penalty > 0, "more than 0")


@dataclass(frozen=True)
class BeamSearch:
    """The most probable whole text that a search over `beams` beginnings at a time finds.

    See `decode.beam` for the two conventions and what they compute.
    """

    beams: int = 4
    # Of a text's summed log-probability, by the tokens made, eos included: "hf" divides by
    # length ** length_penalty, "t5x" by ((5 + length) / 6) ** length_penalty. Higher: longer texts.
    # None: what each has by default, 1.0 and 0.6.
    length_penalty: float | None = None
    convention: Literal["hf", "t5x"] = "hf"
    # "hf" alone: True stops when there are as many texts as beams; False also when none is likely
    # to be better; "never" when none can be.
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "beams", self.beams >= 1, "at least 1")
        _check(self, "convention", self.convention in ("hf", "t5x"), "'hf' or 't5x'")
        stops = (True, False, "never") if self.convention == "hf" else (False,)
        # 1 is equal to True, and isn't one of these.
        known = any(
            type(s) is type(self.early_stopping) and s == self.early_stopping for s in stops
        )
        _check(self, "early_stopping", known, f"one of {stops}")
        _check(self, "repetition_penalty", self.repetition_penalty > 0, "more than 0")

    @property
    def penalty(self) -> float:
        """The length penalty."""
        if self.length_penalty is not None:
            return self.length_penalty
        return 1.0 if self.convention == "hf" else 0.6


Strategy: TypeAlias = Greedy | Sampling | BeamSearch


@flax.struct.dataclass
class RowStrategies:
    """`Greedy` or `Sampling` of each row, as arrays `[b]`: data, for which nothing is compiled."""

    temperature: Array  # float32; 0: greedy
    top_k: Array  # int32
    top_p: Array  # float32
    min_p: Array  # float32
    repetition_penalty: Array  # float32


def by_row(strategies: Sequence[Greedy | Sampling]) -> RowStrategies:
    """The strategies of a batch's rows as NumPy arrays."""
    full = [one if isinstance(one, Sampling) else None for one in strategies]
    everything = np.iinfo(np.int32).max
    return RowStrategies(
        temperature=np.array([one.temperature if one else 0.0 for one in full], np.float32),
        top_k=np.array([(one and one.top_k) or everything for one in full], np.int32),
        top_p=np.array([(one and one.top_p) or 1.0 for one in full], np.float32),
        min_p=np.array([(one and one.min_p) or 0.0 for one in full], np.float32),
        repetition_penalty=np.array([one.repetition_penalty for one in strategies], np.float32),
    )


def adjust(logits: Array, seen: Array | None, strategy: Strategy | RowStrategies) -> Array:
    """The logits `[b, v]`, float32, that a strategy draws from: -inf for what it leaves out.

    Args:
      logits: `[b, v]`.
      seen: bool `[b, v]`, which tokens stand in each row so far, as `tokens_seen` has them; None:
        only with a `repetition_penalty` of 1.
      strategy: of all rows, or of each.
    """
    logits = logits.astype(jnp.float32)
    if isinstance(strategy, RowStrategies):
        return _adjust_rows(logits, seen, strategy)
    if counts_repetitions(strategy):
        assert seen is not None, "a repetition penalty needs the tokens seen"
        logits = penalise(logits, seen, strategy.repetition_penalty)
    if not isinstance(strategy, Sampling):
        return logits
    if strategy.temperature != 1.0:
        logits = logits / strategy.temperature
    for keep, limit in (
        (keep_top_k, strategy.top_k),
        (keep_top_p, strategy.top_p),
        (keep_min_p, strategy.min_p),
    ):
        logits = logits if limit is None else keep(logits, limit)
    return logits


def _adjust_rows(logits: Array, seen: Array | None, rows: RowStrategies) -> Array:
    """As `adjust`. A limit costs only the steps in which some row has it."""

    def when(some: Array, change: Callable[[Array], Array], logits: Array) -> Array:
        changed: Array = jax.lax.cond(jnp.any(some), change, lambda x: x, logits)
        return changed

    if seen is not None:
        penalty = rows.repetition_penalty
        logits = when(penalty != 1.0, lambda x: penalise(x, seen, penalty), logits)
    logits = logits / _column(jnp.where(rows.temperature == 0.0, 1.0, rows.temperature))
    logits = when(rows.top_k < logits.shape[-1], lambda x: keep_top_k(x, rows.top_k), logits)
    logits = when(rows.top_p < 1.0, lambda x: keep_top_p(x, rows.top_p), logits)
    return when(rows.min_p > 0.0, lambda x: keep_min_p(x, rows.min_p), logits)


def choose(logits: Array, strategy: Greedy | Sampling | RowStrategies, rngs: Array | None) -> Array:
    """A token for each row, int32 `[b]`.

    Args:
      logits: `[b, v]`, adjusted.
      strategy: of all rows, or of each.
      rngs: keys `[b]`, one a row (see `keys_at`); None: only with Greedy.
    """
    best: Array = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if isinstance(strategy, Greedy):
        return best
    assert rngs is not None, "sampling needs a key for each row"
    if isinstance(strategy, Sampling):
        return _draw(logits, rngs)
    greedy = strategy.temperature == 0.0
    drawn = jax.lax.cond(jnp.all(greedy), lambda: best, lambda: _draw(logits, rngs))
    return jnp.where(greedy, best, drawn)


def _draw(logits: Array, rngs: Array) -> Array:
    """A token a row by the softmax of `logits [b, v]`: where one uniform number falls in the sums.

    First among blocks of tokens, then within one. A number for every token (the Gumbel trick)
    would cost 29 ms for 8 rows of 50,257, this 0.6.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    padded = jnp.pad(weights, ((0, 0), (0, -weights.shape[-1] % _BLOCK)))
    blocks = padded.reshape(weights.shape[0], -1, _BLOCK)
    sums = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)  # [b, blocks]
    aim = jax.vmap(jax.random.uniform)(rngs)[:, None] * sums[:, -1:]
    block = _first_above(sums, aim)[:, None]
    before = jnp.where(block > 0, jnp.take_along_axis(sums, jnp.maximum(block - 1, 0), axis=1), 0.0)
    inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    place = _first_above(jnp.cumsum(inside, axis=-1), aim - before)
    # Where rounding leaves the aim behind the last sum: the block's last token with any weight.
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0.0, axis=-1)
    return (block[:, 0] * _BLOCK + jnp.minimum(place, last)).astype(jnp.int32)


def _first_above(sums: Array, aim: Array) -> Array:
    """The first place `[b]` at which the growing `sums [b, n]` exceed `aim [b, 1]`, or the last."""
    return jnp.minimum(jnp.sum(sums <= aim, axis=-1), sums.shape[-1] - 1)


def keys_at(rngs: Array, step: Array) -> Array:
    """The keys `[b]` with which rows that have keys `rngs [b]` draw their token number `step`.

    `step`: int32, one for all or `[b]`.
    """
    return jax.vmap(jax.random.fold_in)(rngs, jnp.broadcast_to(step, rngs.shape))


def row_keys(rng: Array, rows: int) -> Array:
    """A key for each of a batch's rows `[rows]`, from one; keys `[rows]` stay what they are."""
    if rng.ndim == 1:
        return rng
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))


def counts_repetitions(strategy: Strategy) -> bool:
    """Whether `adjust` asks which tokens were seen."""
    return strategy.repetition_penalty != 1.0


def tokens_seen(tokens: Array, real: Array, vocab_size: int) -> Array:
    """Bool `[b, v]`: which tokens stand at the `real [b, l]` places of `tokens [b, l]`."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    none = jnp.zeros((tokens.shape[0], vocab_size), bool)
    return none.at[rows, tokens].max(real.astype(bool))


def penalise(logits: Array, seen: Array, penalty: Limit) -> Array:
    """Logits of tokens seen divided by `penalty` where positive, multiplied where negative.

    Keskar et al. 2019 (CTRL), section 4.1; for negative logits as in Hugging Face's `generate`,
    which takes a decoder's tokens for seen: a prompt's, and of an encoder-decoder its start, but
    not what the encoder read.
    """
    penalty = _column(penalty)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Array, k: Limit) -> Array:
    """The k highest logits of each row, and those equal to the lowest of them; others -inf."""
    if isinstance(k, int):
        k = min(k, logits.shape[-1])
        return jnp.where(logits >= jax.lax.top_k(logits, k)[0][:, -1:], logits, _NEVER)
    return _keep_most(logits, jnp.ones_like(logits), _column(k))


def keep_top_p(logits: Array, p: Limit) -> Array:
    """The nucleus: the fewest tokens whose probabilities reach p in sum; others -inf.

    Holtzman et al. 2019, section 3.1. Tokens as probable as the last of them stay too.
    """
    share = _column(p)
    share = jnp.where(share < 1.0, share, jnp.inf)  # rounded sums reach 1 too early
    return _keep_most(logits, jax.nn.softmax(logits, axis=-1), share)


def keep_min_p(logits: Array, p: Limit) -> Array:
    """Tokens at least p times as probable as the row's most probable; others -inf.

    Nguyen et al. 2024. Of logits alone: no softmax.
    """
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(_column(p))
    return jnp.where(logits >= least, logits, _NEVER)


def _keep_most(logits: Array, mass: Array, target: Array) -> Array:
    """The highest logits of each row whose `mass [b, v]` reaches `target [b or 1, 1]`.

    The lowest of them is sought bit by bit among the 2^32 float32 numbers, in their order: 32
    sums instead of a sort. 8 rows of 50,257 on two cores: 7 ms against 130.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    negative = bits >> 31 == 1
    order = jnp.where(negative, ~bits, bits | np.uint32(1 << 31))  # as the numbers are ordered

    def decide(turn: Array, lowest: Array) -> Array:
        higher = lowest | (jnp.uint32(1 << 31) >> turn.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(order >= higher, mass, 0.0), axis=-1, keepdims=True)
        return jnp.where(reached >= target, higher, lowest)

    lowest = jax.lax.fori_loop(0, 32, decide, jnp.zeros((logits.shape[0], 1), jnp.uint32))
    return jnp.where(order >= lowest, logits, _NEVER)


def _column(limit: Limit) -> Array:
    """`[b, 1]`, or `[1, 1]` of one number: float32."""
    return jnp.asarray(limit, jnp.float32).reshape(-1, 1)


def _check(strategy: Any, name: str, good: bool, expected: str) -> None:
    if not good:
        value = getattr(strategy, name)
        raise InputError(f"{type(strategy).__name__}.{name}={value!r}: expected {expected}")
