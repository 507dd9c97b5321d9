"""What vectors say about labels: a linear probe and the vote of neighbours. Accuracies in percent.

Shapes: n vectors, d dimensions, c labels.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np

from t5x_lite.evaluation.embeddings import nearest
from t5x_lite.types import InputError


class LinearProbe:
    """Multinomial logistic regression, its weights (not its bias) with an L2 penalty.

    Minimises the mean of -log softmax(z W + b)[label] plus `penalty` |W|^2 / 2, where z are the
    vectors with each dimension brought to mean 0 and variance 1 over the training set; by L-BFGS,
    from zero. The objective is convex, so that nothing depends on a seed.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        labels: Sequence[object],
        *,
        penalty: float = 1e-3,
        steps: int = 200,
    ):
        vectors = np.asarray(vectors, np.float64)
        self.labels, targets = _labels(vectors, labels)
        self._mean = vectors.mean(axis=0)
        deviation = vectors.std(axis=0)
        self._scale = np.where(deviation > 0, deviation, 1)
        self._weights, self._bias = _fit(
            self._normal(vectors), targets, penalty, len(self.labels), steps
        )

    def predict(self, vectors: np.ndarray) -> list[object]:
        """The likeliest label of each of `vectors` `[n, d]`."""
        logits = self._normal(np.asarray(vectors, np.float64)) @ self._weights + self._bias
        return [self.labels[i] for i in np.argmax(logits, axis=-1)]

    def accuracy(self, vectors: np.ndarray, labels: Sequence[object]) -> float:
        """Of `predict`, in percent."""
        return _accuracy(labels, self.predict(vectors))

    def _normal(self, vectors: np.ndarray) -> np.ndarray:
        return (vectors - self._mean) / self._scale


def _fit(
    vectors: np.ndarray, targets: np.ndarray, penalty: float, labels: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights `[d, c]` and bias `[c]` after at most `steps` of L-BFGS."""
    n, d = vectors.shape
    wanted = np.eye(labels)[targets]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[: d * labels].reshape(d, labels), flat[d * labels :]
        logits = vectors @ weights + bias
        logs = logits - logits.max(axis=1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
        value = -np.sum(wanted * logs) / n + 0.5 * penalty * np.sum(weights**2)
        surplus = (np.exp(logs) - wanted) / n
        grads = (vectors.T @ surplus + penalty * weights).ravel(), surplus.sum(axis=0)
        return float(value), np.concatenate(grads)

    optimize = importlib.import_module("scipy.optimize")  # comes with jax
    start: np.ndarray = np.zeros((d + 1) * labels)
    options = {"maxiter": steps, "gtol": 1e-6}
    found = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    return found[: d * labels].reshape(d, labels), found[d * labels :]


def vote(
    vectors: np.ndarray, labels: Sequence[object], queries: np.ndarray, *, k: int = 10
) -> list[object]:
    """The label that the cosines of a query's k nearest vectors add up highest for."""
    known, targets = _labels(vectors, labels)
    indices, cosines = nearest(queries, vectors, min(k, len(vectors)))
    votes: np.ndarray = np.zeros((len(indices), len(known)), np.float32)
    rows = np.broadcast_to(np.arange(len(indices))[:, None], indices.shape)
    np.add.at(votes, (rows, targets[indices]), cosines)
    return [known[i] for i in np.argmax(votes, axis=-1)]


def vote_accuracy(
    vectors: np.ndarray,
    labels: Sequence[object],
    queries: np.ndarray,
    wanted: Sequence[object],
    *,
    k: int = 10,
) -> float:
    """Of `vote`, in percent: the k-NN probe."""
    return _accuracy(wanted, vote(vectors, labels, queries, k=k))


def _labels(vectors: np.ndarray, labels: Sequence[object]) -> tuple[list[object], np.ndarray]:
    """The different labels in the order of their first places, and each one's number."""
    if len(vectors) != len(labels):
        raise InputError(f"a probe got {len(vectors)} vectors and {len(labels)} labels")
    known = list(dict.fromkeys(labels))
    if len(known) < 2:
        raise InputError(f"a probe needs at least two different labels; it got {known}")
    number = {label: i for i, label in enumerate(known)}
    return known, np.array([number[label] for label in labels])


def _accuracy(wanted: Sequence[object], found: Sequence[object]) -> float:
    if len(wanted) != len(found) or not len(wanted):
        raise InputError(
            f"a probe got {len(found)} vectors and {len(wanted)} labels to be judged by: expected "
            "as many of each, at least one"
        )
    return 100.0 * sum(w == f for w, f in zip(wanted, found, strict=True)) / len(wanted)
