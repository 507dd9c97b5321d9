"""Vectors compared: neighbours by cosine, similarity beside people's judgement, odd one out.

Shapes: n vectors, q queries, k neighbours, d dimensions.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np

from t5x_lite.types import InputError


def unit(vectors: np.ndarray) -> np.ndarray:
    """float32 `[..., d]` of length 1; a vector of zeros stays as it is."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def nearest(
    queries: np.ndarray, vectors: np.ndarray, k: int, *, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """The k vectors with the highest cosine for each query, best first.

    Products of `block` queries with all vectors at a time; of equal cosines the lower index is
    first.

    Args:
      queries: `[q, d]`.
      vectors: `[n, d]`.
      k: at most n.

    Returns:
      Indices int64 `[q, k]` and cosines float32 `[q, k]`.
    """
    queries, vectors = np.atleast_2d(unit(queries)), unit(vectors)
    if queries.shape[-1] != vectors.shape[-1]:
        raise InputError(
            f"queries have {queries.shape[-1]} dimensions and the vectors {vectors.shape[-1]}: "
            "expected those of one model"
        )
    if not 1 <= k <= len(vectors):
        raise InputError(f"{k} neighbours of {len(vectors)} vectors: expected 1 to all")
    indices: np.ndarray = np.empty((len(queries), k), np.int64)
    cosines: np.ndarray = np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        scores = queries[part] @ vectors.T
        indices[part], cosines[part] = _top(scores, k)
    return indices, cosines


def _top(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of scores `[q, n]`, the k highest a row, and where they are."""
    n = scores.shape[1]
    if k < n:  # all that are at least as high as the k-th, so that ties fall by index
        least = np.partition(scores, n - k, axis=1)[:, n - k, None]
        candidates = scores >= least
        width = int(candidates.sum(axis=1).max())
        found = np.argsort(~candidates, axis=1, kind="stable")[:, :width]
        values = np.where(
            np.take_along_axis(candidates, found, axis=1),
            np.take_along_axis(scores, found, axis=1),
            -np.inf,
        )
    else:
        found, values = np.broadcast_to(np.arange(n), scores.shape), scores
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(values, order, axis=1)


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float32 `[n]`: the cosine of each pair of rows of `left` and `right` `[n, d]`."""
    return np.sum(unit(left) * unit(right), axis=-1)


def similarity(left: np.ndarray, right: np.ndarray, judged: Sequence[float]) -> float:
    """Spearman's correlation of the pairs' cosines with what people said, -1 to 1.

    Not a number where either side is constant. Raises InputError for fewer than two pairs.
    """
    if len(judged) < 2 or len(left) != len(judged) or len(right) != len(judged):
        raise InputError(
            f"similarity got {len(left)} and {len(right)} vectors for {len(judged)} judgements: "
            "expected as many of each, at least two"
        )
    stats = importlib.import_module("scipy.stats")  # comes with jax
    return float(stats.spearmanr(cosines(left, right), judged).statistic)


def odd_one_out(vectors: np.ndarray) -> int:
    """The row of `vectors` `[n, d]` whose cosines with the others are lowest, summed."""
    if len(vectors) < 3:
        raise InputError(f"odd one out of {len(vectors)}: expected at least three")
    units = unit(vectors)
    others = units.sum(axis=0, keepdims=True) - units
    return int(np.argmin(np.sum(units * others, axis=-1)))
