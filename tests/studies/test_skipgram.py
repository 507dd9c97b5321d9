"""Skip-gram: its step descends its objective on its rows alone, and finds what was planted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.evaluation.word_vectors import WordVectors
from t5x_lite.studies import skipgram
from t5x_lite.studies import skipgram_data as data
from t5x_lite.types import InputError

SIZES = data.Sizes(steps=3, blocks=2, centres=4, window=2, negatives=6)


def corpus(lengths=(9, 1, 14), rows=30, seed=0):
    tokens = np.random.default_rng(seed).integers(0, rows, sum(lengths)).astype(np.int32)
    starts = np.cumsum([0, *lengths])[:-1]
    names = tuple(map(str, range(rows)))
    return data.Corpus(tokens, starts, names, np.bincount(tokens, minlength=rows))


def cut(given, sizes=SIZES, *, subsample=0.0, seed=(0,)):
    return list(
        data.windows(
            given, sizes, subsample=subsample, rates=(0.5, 0.1), progress=(0, 1), seed=seed
        )
    )


def pairs(windows):
    """Every (centre, output) pair of windows, told place by place."""
    found = []
    for c, s, t in np.ndindex(windows.left.shape):
        at = t + SIZES.window
        for u in range(at - windows.left[c, s, t], at + windows.right[c, s, t] + 1):
            if u != at:
                found.append((windows.outputs[c, s, at], windows.outputs[c, s, u]))
    return found


def a_step(seed=0):
    (windows, _), *_ = cut(corpus(seed=seed))
    return skipgram.Step(*(part[0] for part in windows))


def tables(rows=30, dim=5, seed=1):
    drawn = np.random.default_rng(seed).normal(size=(2, rows, dim)).astype(np.float32)
    return skipgram.Tables(*map(jnp.asarray, drawn))


def test_a_step_descends_the_objective_as_written():
    step, before = a_step(), tables()
    grads = jax.jit(jax.grad(skipgram.objective), static_argnums=2)(before, step, 5)
    after = jax.jit(skipgram.update, static_argnums=2)(before, step, 5)
    for found, start, grad in zip(after, before, grads, strict=True):
        np.testing.assert_allclose(found, start - step.rate * grad, rtol=1e-4, atol=1e-5)


def test_the_objective_is_the_sum_over_pairs():
    step, given = a_step(), tables()
    x, y = (np.asarray(table, np.float64) for table in given)
    loss = lambda z: np.log1p(np.exp(-z))
    noise = lambda i: 5 / 6 * sum(loss(-x[i] @ y[n]) for n in step.negatives)
    windows = data.Windows(*(np.asarray(part)[None] for part in step))
    wanted = sum(loss(x[i] @ y[j]) + noise(i) for i, j in pairs(windows))
    assert float(skipgram.objective(given, step, 5)) == pytest.approx(wanted, rel=1e-5)


def test_a_step_touches_its_rows_alone():
    step, before = a_step(), tables(rows=200)
    after = jax.jit(skipgram.update, static_argnums=2)(before, step, 5)
    reached = step.left.astype(int) + step.right.astype(int) > 0
    centres = step.outputs[:, SIZES.window : -SIZES.window][reached]
    moved = [np.any(np.asarray(a != b), axis=1) for a, b in zip(after, before, strict=True)]
    assert set(np.flatnonzero(moved[0])) == set(centres.tolist())
    assert set(np.flatnonzero(moved[1])) <= {*step.outputs.ravel(), *step.negatives}
    assert set(step.negatives) <= set(np.flatnonzero(moved[1]))


def test_no_operation_is_as_large_as_a_table():
    """But for the tables themselves: nothing dense, no copy."""
    windows = data.empty(SIZES)
    shapes = skipgram.Tables(*[jax.ShapeDtypeStruct((5003, 7), jnp.float32)] * 2)
    text = skipgram.run.lower(shapes, windows, 5).compile().as_text()
    made = [line.split(" = ")[1] for line in text.splitlines() if " = f32[5003,7]" in line]
    kinds = {line.split("(")[0].split(" ")[-1] for line in made}
    # A scatter in place is an operation of its own, or within a loop, as tests compile it.
    scattered = {"scatter", "dynamic-update-slice"}
    assert kinds <= {"parameter", "get-tuple-element", "fusion", *scattered}, kinds


def test_windows_hold_each_centre_once_within_its_document():
    given = corpus()
    found = cut(given)
    seen = np.concatenate([w.outputs[:, :, 2:-2].ravel() for w, _ in found])
    count = sum(count for _, count in found)
    assert count == len(given.tokens)
    np.testing.assert_array_equal(seen[:count], given.tokens)
    left, right = (
        np.concatenate([getattr(w, side).ravel() for w, _ in found]) for side in ("left", "right")
    )
    assert not left[count:].any()
    assert not right[count:].any()
    place, length = 0, [9, 1, 14]
    for n in length:
        for i in range(n):
            assert left[place + i] <= min(i, SIZES.window)
            assert right[place + i] <= min(n - 1 - i, SIZES.window)
            # As far as the die says, on both sides alike but for the document's ends
            if min(i, n - 1 - i) >= SIZES.window:
                assert left[place + i] == right[place + i] >= 1
        place += n
    rates = np.concatenate([w.rate for w, _ in found])
    assert rates[0] == np.float32(0.5)
    assert (np.diff(rates) < 0).all()


def test_windows_are_as_wide_as_a_die_says():
    reach = np.concatenate([w.left.ravel() for w, _ in cut(corpus(lengths=(3000,)))])[:2990]
    shares = np.bincount(reach)[1:] / len(reach)
    np.testing.assert_allclose(shares, [0.5, 0.5], atol=0.04)


def test_passes_differ_by_seed_alone():
    first, again, other = (cut(corpus(), subsample=0.1, seed=(s,)) for s in (1, 1, 2))
    for one, two in zip(first, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.array_equal(first[0][0].negatives, other[0][0].negatives)


def test_frequent_words_are_thinned_out():
    counts = np.array([10000, 1000, 10, 0])
    keep = data.keep_probability(counts, 1e-2)
    ratio = 1e-2 * counts.sum() / 10000
    np.testing.assert_allclose(keep, [ratio**0.5 + ratio, 0.3317 + 0.1101, 1, 1], rtol=1e-3)
    assert (data.keep_probability(counts, 0) == 1).all()
    tokens = np.repeat(np.arange(4), counts).astype(np.int32)
    given = data.Corpus(tokens, np.array([0]), tuple("abcd"), counts)
    kept = sum(count for _, count in cut(given, subsample=1e-2))
    assert kept == pytest.approx(float(keep @ counts), rel=0.05)


def test_negatives_come_by_count_to_three_quarters():
    counts = np.array([1000, 100, 0, 10, 1])
    drawn = data.draw_negatives(data.negative_bounds(counts), (4000, 16), np.random.default_rng(0))
    wanted = counts**0.75 / (counts**0.75).sum()
    shares = np.bincount(drawn.ravel(), minlength=5) / drawn.size
    np.testing.assert_allclose(shares, wanted, atol=2e-3)
    assert shares[2] == 0
    # A systematic sample: in no step more or less than expected by one.
    each = np.array([np.bincount(step, minlength=5) for step in drawn])
    assert np.abs(each - 16 * wanted).max() < 1


def planted(documents=400, seed=0):
    """Two circles of words that never meet, and words that stand anywhere."""
    rng = np.random.default_rng(seed)
    circles = (["king", "queen", "throne", "crown"], ["sea", "wave", "ship", "sail"])
    texts = []
    for number in range(documents):
        words = [*circles[number % 2] * 3, *["the", "and", "of"] * 3]
        texts.append(" ".join(rng.permutation(words)))
    return texts, circles


CONFIG = skipgram.SkipGram(
    dim=16, subsample=0.0, epochs=6, centres=8, blocks=1, shared=32, steps=50, learning_rate=0.05
)


def test_it_finds_what_was_planted():
    texts, circles = planted()
    given = data.word_corpus(texts, 5)
    learned = skipgram.train(given, CONFIG)
    vectors = WordVectors(given.names, np.asarray(learned.tables.inputs))
    for circle in circles:
        for word in circle:
            assert {found for found, _ in vectors.nearest(word, 3)} == set(circle) - {word}
    assert vectors.odd_one_out(["king", "queen", "wave", "crown"]) == "wave"
    again = skipgram.train(given, CONFIG)
    np.testing.assert_array_equal(again.tables.inputs, learned.tables.inputs)
    assert learned.words == CONFIG.epochs * len(given.tokens) == learned.centres


def test_words_and_tokens():
    texts = ["Don't stop. The 3 kings' sons, the SONS", "the kings"]
    words = data.word_corpus(texts, 2)
    assert words.names == ("the", "kings", "sons")
    assert " ".join(words.names[i] for i in words.tokens) == "the kings sons the sons the kings"
    assert words.starts.tolist() == [0, 5]
    assert words.counts.tolist() == [3, 2, 2]
    vocabulary = ByteVocabulary()
    tokens = data.token_corpus(["ab\u00e9b"], vocabulary, 1)
    assert tokens.tokens.tolist() == vocabulary.encode("ab\u00e9b").tolist()
    assert len(tokens.names) == len(tokens.counts) == vocabulary.size
    assert tokens.names[tokens.tokens[0]] == vocabulary.piece(int(tokens.tokens[0]))
    rare = data.token_corpus(["abb"], vocabulary, 2)
    assert rare.tokens.tolist() == vocabulary.encode("bb").tolist()


def test_mistakes_are_named():
    with pytest.raises(InputError, match="min_count"):
        data.word_corpus(["one two"], 2)
    with pytest.raises(InputError, match=r"SkipGram\.shared=0"):
        skipgram.SkipGram(shared=0)
    with pytest.raises(InputError, match="learning_rate"):
        skipgram.SkipGram(learning_rate=1e-9)
    texts, _ = planted(20)
    wild = skipgram.SkipGram(dim=8, subsample=0.0, blocks=8, shared=1, learning_rate=1e30, steps=4)
    with pytest.raises(InputError, match=r"diverged.*SkipGram\.shared"):
        skipgram.train(data.word_corpus(texts, 5), wild)
