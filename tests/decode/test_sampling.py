"""Tokens are drawn as often as their definition says, and each row by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decode import sampling
from t5x_lite.decode.sampling import BeamSearch, Greedy, Sampling
from t5x_lite.types import InputError

ROWS, VOCAB = 5, 600  # three blocks, the last not full
ADJUST = jax.jit(sampling.adjust, static_argnums=2)
CHOOSE = jax.jit(sampling.choose, static_argnums=1)
# The value that chi-square exceeds once in 10,000 times, by degrees of freedom (any table).
CRITICAL = {9: 33.72, 19: 50.80, 29: 66.15}


def some_logits(rows: int = ROWS, vocab: int = VOCAB, scale: float = 3.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(3), (rows, vocab))


def probabilities(logits) -> np.ndarray:
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kept_by_definition(logits, strategy: Sampling) -> list[set[int]]:
    """The tokens that each row keeps, one limit after the other, by sorting."""
    kept = []
    for row in np.asarray(logits, np.float64) / strategy.temperature:
        order = np.argsort(-row)
        left = list(order if strategy.top_k is None else order[: strategy.top_k])
        if strategy.top_p is not None:
            before = np.concatenate([[0.0], np.cumsum(probabilities(row[left]))[:-1]])
            left = [
                token for token, share in zip(left, before, strict=True) if share < strategy.top_p
            ]
        if strategy.min_p is not None:
            share = probabilities(row[left])
            left = [t for t, p in zip(left, share, strict=True) if p >= strategy.min_p * share[0]]
        kept.append({int(token) for token in left})
    return kept


STRATEGIES = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=13),
    Sampling(top_p=0.8),
    Sampling(temperature=1.5, top_p=1.0),
    Sampling(min_p=0.05),
    Sampling(temperature=2.0, top_k=200, top_p=0.9, min_p=0.01),
    Sampling(top_p=1e-6),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_limits_keep_what_sorting_keeps(strategy):
    logits = some_logits()
    found = np.asarray(ADJUST(logits, None, strategy))
    expected = kept_by_definition(logits, strategy)
    assert [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in found] == expected
    kept = np.isfinite(found)
    np.testing.assert_allclose(found[kept], (logits / strategy.temperature)[kept], rtol=1e-6)


def test_limits_of_rows_are_those_of_batches():
    """Seven strategies in one program: each row as if all had its own."""
    strategies = [*STRATEGIES[:6], Greedy(), Sampling(top_k=3, repetition_penalty=1.7)]
    logits = some_logits(len(strategies))
    seen = jax.random.bernoulli(jax.random.key(0), 0.3, logits.shape)
    keys = sampling.row_keys(jax.random.key(5), len(strategies))
    rows = sampling.by_row(strategies)
    adjusted = jax.jit(sampling.adjust)(logits, seen, rows)
    chosen = jax.jit(sampling.choose)(adjusted, rows, keys)
    for row, strategy in enumerate(strategies):
        part = slice(row, row + 1)
        alone = ADJUST(logits[part], seen[part], strategy)
        np.testing.assert_allclose(adjusted[part], alone, rtol=1e-6, err_msg=str(strategy))
        assert chosen[row] == CHOOSE(alone, strategy, keys[part])[0], strategy


def test_repetition_penalty_by_definition():
    logits = jnp.array([[2.0, -1.0, 0.5, -0.5], [1.0, 2.0, -3.0, 4.0]])
    tokens, real = jnp.array([[0, 3, 3], [2, 1, 0]]), jnp.array([[1, 1, 1], [0, 1, 1]])
    seen = sampling.tokens_seen(tokens, real, 4)
    found = ADJUST(logits, seen, Greedy(repetition_penalty=2.0))
    np.testing.assert_allclose(found, [[1.0, -1.0, 0.5, -1.0], [0.5, 1.0, -3.0, 4.0]])


@pytest.mark.parametrize("strategy", [Sampling(), Sampling(temperature=1.4, top_k=20)], ids=str)
def test_frequencies_are_the_probabilities(strategy):
    """Chi-square over the 29 or 19 most probable tokens and the rest together."""
    draws = 8_000
    logits = ADJUST(some_logits(1, scale=1.5), None, strategy)
    keys = sampling.row_keys(jax.random.key(11), draws)
    rows = jnp.broadcast_to(logits, (draws, VOCAB))
    tokens = np.asarray(CHOOSE(rows, strategy, keys))
    share = probabilities(logits[0])
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[share == 0].any()
    best = np.argsort(-share)[: (29 if strategy.top_k is None else strategy.top_k)]
    observed, expected = counts[best], share[best] * draws
    if expected.sum() < draws * 0.999:
        observed = np.append(observed, draws - observed.sum())
        expected = np.append(expected, draws - expected.sum())
    assert expected.min() > 5
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < CRITICAL[len(expected) - 1]
    wrong = share[best][::-1] * draws  # the test is sharp: exchanged probabilities fail
    assert float(((observed[: len(best)] - wrong) ** 2 / wrong).sum()) > CRITICAL[29]


def test_every_token_can_be_drawn():
    """The first and last of a row, a lone one in any block, whatever the number drawn."""
    keys = sampling.row_keys(jax.random.key(2), 64)
    for token in (0, 255, 256, VOCAB - 1):
        logits = jnp.full((64, VOCAB), -jnp.inf).at[:, token].set(-1e4)
        assert (CHOOSE(logits, Sampling(), keys) == token).all()


def test_a_rows_draw_depends_on_its_key_alone():
    logits = some_logits()
    keys = sampling.row_keys(jax.random.key(7), ROWS)
    drawn = CHOOSE(logits, Sampling(), keys)
    backwards = CHOOSE(logits[::-1], Sampling(), keys[::-1])
    np.testing.assert_array_equal(drawn, backwards[::-1])
    many = [
        np.asarray(CHOOSE(logits, Sampling(), sampling.keys_at(keys, jnp.int32(step))))
        for step in range(12)
    ]
    assert len({tuple(tokens.tolist()) for tokens in many}) > 8
    again = CHOOSE(logits, Sampling(), sampling.keys_at(keys, jnp.full(ROWS, 3)))
    np.testing.assert_array_equal(again, many[3])


def test_one_token_to_choose_from_is_greedy():
    logits = some_logits()
    keys = sampling.row_keys(jax.random.key(1), ROWS)
    for strategy in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(min_p=1.0)):
        found = CHOOSE(ADJUST(logits, None, strategy), strategy, keys)
        np.testing.assert_array_equal(found, CHOOSE(logits, Greedy(), None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Greedy(repetition_penalty=0.0), "Greedy.repetition_penalty=0.0: expected more"),
        (lambda: Sampling(temperature=0.0), "Sampling.temperature=0.0: .*use Greedy"),
        (lambda: Sampling(temperature=1e-39), "temperature=1e-39: expected 1e-06 or more"),
        (lambda: Sampling(temperature=float("nan")), "temperature=nan: expected 1e-06"),
        (lambda: BeamSearch(early_stopping=1), "early_stopping=1: expected one of .True, False"),
        (lambda: BeamSearch(early_stopping=0), "early_stopping=0: expected one of"),
        (lambda: Sampling(top_k=0), "Sampling.top_k=0: expected at least 1"),
        (lambda: Sampling(top_p=1.5), "Sampling.top_p=1.5: expected more than 0 and at most 1"),
        (lambda: Sampling(min_p=0.0), "Sampling.min_p=0.0"),
        (lambda: BeamSearch(beams=0), "BeamSearch.beams=0: expected at least 1"),
        (lambda: BeamSearch(convention="fairseq"), "convention='fairseq': expected 'hf' or 't5x'"),
        (lambda: BeamSearch(early_stopping="now"), "early_stopping='now': expected one of"),
        (
            lambda: BeamSearch(convention="t5x", early_stopping=True),
            "early_stopping=True: expected one of .False",
        ),
    ],
)
def test_strategies_that_make_no_sense(make, message):
    with pytest.raises(InputError, match=message):
        make()
    assert len({Greedy(), Sampling(), BeamSearch(), Greedy()}) == 3


def test_a_limit_above_the_vocabulary_is_none():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7)), jnp.float32)
    unlimited, limited = (
        np.asarray(ADJUST(logits, None, Sampling(top_k=k))) for k in (None, 100_000)
    )
    np.testing.assert_array_equal(limited, unlimited)
