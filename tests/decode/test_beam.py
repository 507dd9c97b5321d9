"""Beam search does what its definition says, on a model small enough to search by lists.

The model is a table: a text's next logits are the row that a sum over its tokens picks, so every
token before counts, and a beam that goes on from another's places would show.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decode import beam
from t5x_lite.decode.sampling import BeamSearch
from t5x_lite.models.cache import Cache, LayerCache
from t5x_lite.types import InputError

ROWS, VOCAB, NEW, TABLE = 3, 12, 6, 61
WEIGHTS = np.array([1, 5, 17, 23, 31, 43])
EOS, PAD = (1,), 0
STRATEGIES = [
    BeamSearch(3),
    BeamSearch(3, length_penalty=3.0),
    BeamSearch(3, length_penalty=3.0, early_stopping="never"),
    BeamSearch(3, length_penalty=0.0, early_stopping="never"),
    BeamSearch(3, length_penalty=-1.0),
    BeamSearch(3, early_stopping=True),
    BeamSearch(1, early_stopping=True),
    BeamSearch(3, convention="t5x"),
    BeamSearch(3, convention="t5x", length_penalty=2.0),
    BeamSearch(3, repetition_penalty=2.5),
]


def tables(seed: int) -> np.ndarray:
    """Logits `[rows, TABLE, VOCAB]`; the rows' eos is likely, hardly, and never."""
    logits = 2.0 * np.random.default_rng(seed).normal(size=(ROWS, TABLE, VOCAB))
    logits[:, :, EOS[0]] += np.array([[1.5], [0.0], [-30.0]])
    return logits.astype(np.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def found(tables, strategy, eos_ids=EOS):
    beams = strategy.beams

    def logits(written, lines):  # [rows, places] and [rows, beams, places] -> [..., VOCAB]
        nth = jnp.maximum(jnp.cumsum(lines, axis=2) - 1, 0)
        terms = jnp.where(lines, written[:, None] * jnp.asarray(WEIGHTS)[nth], 0)
        place = jnp.sum(terms, axis=2) % TABLE
        return tables[jnp.arange(ROWS)[:, None], place]

    def extend(tokens, cache, lines):
        (layer,), index = cache.layers, cache.index
        places, other = layer.self_attention
        written = jax.lax.dynamic_update_slice(places, tokens[:, None], (0, 0, index))
        layers = (LayerCache((written, other)),)
        cache = dataclasses.replace(cache, layers=layers, index=index + beams)
        return logits(written[:, 0], lines), cache

    nothing = jnp.zeros((ROWS, 1, beams * (NEW - 1)), jnp.int32)
    cache = Cache((LayerCache((nothing, nothing)),), jnp.int32(0), jnp.zeros(ROWS, jnp.int32))
    first = logits(nothing[:, 0], nothing > 0)[:, 0]
    seen = jnp.zeros((ROWS, VOCAB), bool) if strategy.repetition_penalty != 1.0 else None
    options = {"strategy": strategy, "max_tokens": NEW, "eos_ids": eos_ids, "pad_id": PAD}
    assert beams * 2 <= VOCAB
    return beam.search(extend, first, cache, seen, **options)


def log_probabilities(table: np.ndarray, text: tuple[int, ...], penalty: float) -> np.ndarray:
    logits = table[sum(w * t for w, t in zip(WEIGHTS, text, strict=False)) % TABLE].astype(float)
    scores = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    scores[sorted(set(text))] *= penalty  # they are negative
    return scores


def by_lists(table: np.ndarray, strategy: BeamSearch, eos_ids: tuple[int, ...]):
    """`(text, score)` of the best beams, the best first."""
    hugging_face, beams, alpha = strategy.convention == "hf", strategy.beams, strategy.penalty
    many = beams * (max(2, 1 + len(eos_ids)) if hugging_face else 2)

    def normal(score: float, length: int) -> float:
        return score / (length if hugging_face else (5 + length) / 6) ** alpha

    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    done: list[tuple[tuple[int, ...], float]] = []
    for count in range(1, NEW + 1):
        candidates = [
            ((*text, token), score + more)
            for text, score in live
            for token, more in enumerate(
                log_probabilities(table, text, strategy.repetition_penalty)
            )
        ]
        candidates = sorted(candidates, key=lambda one: -one[1])[:many]
        live = []
        for rank, (text, score) in enumerate(candidates):
            if text[-1] not in eos_ids and (count < NEW or not hugging_face):
                live = [*live, (text, score)][:beams]
            elif rank < beams or not hugging_face:
                done.append((text, normal(score, count)))
        done = sorted(done, key=lambda one: -one[1])[:beams]
        if len(done) == beams and live:
            if strategy.early_stopping is True:
                break
            longest = not hugging_face or (strategy.early_stopping == "never" and alpha > 0)
            if normal(live[0][1], NEW if longest else count) <= done[-1][1]:
                break
    return done or live


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_search_finds_what_lists_find(strategy):
    for seed in range(3):
        drawn = tables(seed)
        beams = jax.device_get(found(drawn, strategy))
        for row in range(ROWS):
            expected = by_lists(drawn[row], strategy, EOS)
            scores = [score for _, score in expected]
            np.testing.assert_allclose(beams.scores[row][: len(scores)], scores, rtol=1e-4)
            texts = [[*text, *[PAD] * (NEW - len(text))] for text, _ in expected]
            np.testing.assert_array_equal(beams.tokens[row][: len(texts)], texts)


def test_the_conventions_and_options_differ():
    """Or else the test above would show less than it says."""
    drawn = [tables(seed) for seed in range(3)]
    answers = {
        str([by_lists(table, strategy, EOS)[0][0] for one in drawn for table in one])
        for strategy in STRATEGIES
    }
    assert len(answers) >= 7


def test_several_eos_end_texts():
    drawn = tables(5)
    for row, tokens in enumerate(found(drawn, BeamSearch(2), (1, 4, 7)).tokens[:, 0].tolist()):
        expected = by_lists(drawn[row], BeamSearch(2), (1, 4, 7))[0][0]
        assert tokens == [*expected, *[PAD] * (NEW - len(expected))]


def test_more_beams_than_the_vocabulary_allows():
    with pytest.raises(InputError, match=r"beams=7 looks at 14 candidates .* has 12 tokens"):
        beam.search(
            lambda tokens, cache, lines: (tokens, cache),
            jnp.zeros((1, VOCAB)),
            Cache((), jnp.int32(0), jnp.zeros(1, jnp.int32)),
            None,
            strategy=BeamSearch(7),
            max_tokens=2,
            eos_ids=EOS,
            pad_id=PAD,
        )
