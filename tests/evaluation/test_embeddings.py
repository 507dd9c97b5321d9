"""Neighbours are those that brute force finds; probes find what is there and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from t5x_lite.evaluation import embeddings, probes
from t5x_lite.evaluation.word_vectors import Judged, WordVectors, read_judged
from t5x_lite.types import InputError


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_neighbours_are_those_of_brute_force(k, block):
    vectors, queries = drawn(40, 6), drawn(7, 6, seed=1) * 100
    found, cosines = embeddings.nearest(queries, vectors, k, block=block)
    for query, row, values in zip(queries, found, cosines, strict=True):
        exact = [v @ query / np.linalg.norm(v) / np.linalg.norm(query) for v in vectors]
        assert row.tolist() == sorted(range(40), key=lambda i: -exact[i])[:k]
        np.testing.assert_allclose(values, np.array(exact)[row], rtol=1e-5, atol=1e-6)


def test_of_equals_the_first_is_the_nearest():
    vectors = np.array([[0, 1], [1, 0], [2, 0], [3, 0], [1, 1], [0, 0]], np.float32)
    found, cosines = embeddings.nearest(np.array([[1, 0]]), vectors, 2)
    assert found.tolist() == [[1, 2]]
    assert embeddings.nearest(np.array([[1, 0]]), vectors, 5)[0].tolist() == [[1, 2, 3, 4, 0]]
    assert np.isfinite(cosines).all()


def test_similarity_is_the_correlation_of_ranks():
    left = np.tile([1.0, 0.0], (4, 1))
    angles = np.array([0.1, 0.2, 0.5, 1.0])
    right = 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert embeddings.similarity(left, right, [9, 8, 2, 1]) == pytest.approx(1)
    assert embeddings.similarity(left, right, [1, 2, 8, 9]) == pytest.approx(-1)
    assert embeddings.similarity(left, right, [9, 8, 1, 2]) == pytest.approx(0.8)


def test_the_odd_one_is_out():
    vectors = drawn(1, 8) + 0.1 * drawn(5, 8, seed=1)
    vectors[3] = drawn(8, seed=2)
    assert embeddings.odd_one_out(vectors * np.arange(1, 6)[:, None]) == 3


def test_mistakes_of_comparisons_are_named():
    with pytest.raises(InputError, match="5 dimensions and the vectors 6"):
        embeddings.nearest(drawn(2, 5), drawn(3, 6), 1)
    with pytest.raises(InputError, match="4 neighbours of 3"):
        embeddings.nearest(drawn(2, 6), drawn(3, 6), 4)
    with pytest.raises(InputError, match="at least two"):
        embeddings.similarity(drawn(1, 2), drawn(1, 2), [1.0])
    with pytest.raises(InputError, match="at least three"):
        embeddings.odd_one_out(drawn(2, 3))


def clusters(n=60, seed=0):
    """Three labels around three centres, far apart in two of ten dimensions."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    vectors = rng.normal(size=(n, 10)) * 0.3
    vectors[:, :2] += np.array([[3, 0], [-2, 3], [-2, -3]])[labels]
    return vectors.astype(np.float32), [f"label {i}" for i in labels]


def test_probes_find_what_is_there():
    vectors, labels = clusters()
    others, wanted = clusters(seed=1)
    probe = probes.LinearProbe(vectors, labels)
    assert probe.accuracy(others, wanted) == 100
    assert probes.vote_accuracy(vectors, labels, others, wanted, k=5) == 100
    # A scale that says nothing changes nothing.
    wide = vectors * np.geomspace(1e-3, 1e3, 10)
    assert probes.LinearProbe(wide, labels).predict(wide) == probe.predict(vectors)


def test_probes_find_nothing_where_nothing_is():
    vectors, labels = drawn(300, 4), np.random.default_rng(1).integers(0, 2, 300).tolist()
    others, wanted = drawn(300, 4, seed=2), np.random.default_rng(3).integers(0, 2, 300).tolist()
    assert 35 < probes.LinearProbe(vectors, labels).accuracy(others, wanted) < 65
    assert 35 < probes.vote_accuracy(vectors, labels, others, wanted) < 65


def test_the_linear_probe_is_at_the_optimum_of_what_it_says():
    vectors, labels = clusters(40)
    vectors[:, 3:] = 1.0  # dimensions without variance
    probe = probes.LinearProbe(vectors, labels, penalty=0.1)
    z = (vectors - vectors.mean(0)) / np.where(vectors.std(0) > 0, vectors.std(0), 1)
    weights, bias = np.asarray(probe._weights, np.float64), np.asarray(probe._bias, np.float64)
    logits = z @ weights + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(40), [probe.labels.index(label) for label in labels]] -= 1
    np.testing.assert_allclose(z.T @ p / 40 + 0.1 * weights, 0, atol=1e-3)
    np.testing.assert_allclose(p.mean(0), 0, atol=1e-3)


def test_mistakes_of_probes_are_named():
    with pytest.raises(InputError, match="3 vectors and 2 labels"):
        probes.LinearProbe(drawn(3, 2), [0, 1])
    with pytest.raises(InputError, match="two different labels"):
        probes.vote(drawn(3, 2), [1, 1, 1], drawn(1, 2))


WORDS = WordVectors(("a", "b", "c", "d"), np.array([[1, 0], [2, 1], [0, 1], [-1, 0]], np.float32))


def test_words_have_neighbours_and_a_folder(tmp_path):
    assert [word for word, _ in WORDS.nearest("a", 9)] == ["b", "c", "d"]
    assert WORDS.nearest("a", 1)[0][1] == pytest.approx(2 / 5**0.5)
    assert WORDS.odd_one_out(["a", "d", "b"]) == "d"
    WORDS.write(str(tmp_path / "words"))
    again = WordVectors.read(str(tmp_path / "words"))
    assert again.words == WORDS.words
    np.testing.assert_array_equal(again.vectors, WORDS.vectors)
    with pytest.raises(InputError, match="'e' is not among the 4 words"):
        WORDS.nearest("e")
    with pytest.raises(InputError, match="holds no vectors"):
        WordVectors.read(str(tmp_path))
    with pytest.raises(InputError, match="twice"):
        WordVectors(("a", "a"), np.zeros((2, 2)))


def test_pairs_are_judged_where_both_words_are_known(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("# a comment\nfirst\tsecond\tscore\nA\tb\t9\na\tc\t5.5\na\td\t1\na\tz\t3\n")
    pairs = read_judged(str(path))
    assert pairs[0] == Judged("a", "b", 9.0)
    found = WORDS.similarity(pairs)
    assert (found.pairs, found.given) == (3, 4)
    assert found.spearman == pytest.approx(1)
    path.write_text("a\tb\t9\na\tc\n")
    with pytest.raises(InputError, match="line 2: expected word, word and score"):
        read_judged(str(path))
    with pytest.raises(InputError, match="0 of 1 pairs"):
        WORDS.similarity([Judged("x", "a", 1.0)])
