"""Renderers: a text and its noise mask become what is read, and what must be written."""

from __future__ import annotations

import numpy as np

from t5x_lite.data.objectives.masks import run_starts


def spans_to_sentinels(
    tokens: np.ndarray, noise_mask: np.ndarray, first_sentinel: int
) -> np.ndarray:
    """Each run of noise becomes one sentinel: the first `first_sentinel`, then downwards.

        tokens       5  6  7  8  9 10 11 12
        noise_mask   0  0  0  1  1  0  0  1      first_sentinel=99
        result       5  6  7 99    10 11 98

    With the mask inverted the same call renders the targets:

        result      99        8  9 98    12
    """
    first = run_starts(noise_mask)
    starts = np.flatnonzero(first)
    rendered: np.ndarray = tokens.astype(np.int32)
    rendered[starts] = np.arange(first_sentinel, first_sentinel - len(starts), -1)
    return rendered[~noise_mask | first]


def noise_after_sentinels(
    tokens: np.ndarray, noise_mask: np.ndarray, first_sentinel: int
) -> np.ndarray:
    """The noise alone, each run after the sentinel that `spans_to_sentinels` put in its place.

        tokens       5  6  7  8  9 10 11 12
        noise_mask   1  0  0  1  1  0  0  0      first_sentinel=99
        result      99  5 98  8  9

    For masks that begin with a kept and end with a noise span, the inverted mask gives the same;
    for others it would name the wrong spans.
    """
    noise = tokens[noise_mask].astype(np.int32)
    starts = np.flatnonzero(run_starts(noise_mask)[noise_mask])
    return insert(noise, starts, np.arange(first_sentinel, first_sentinel - len(starts), -1))


def insert(tokens: np.ndarray, places: np.ndarray, values: np.ndarray | int) -> np.ndarray:
    """`tokens` int32 with `values` before the (ascending) places; `len(tokens)` is the end.

        insert([5, 6, 7], [1, 1, 3], 9)    5 9 9 6 7 9

    np.insert does the same in three times the time.
    """
    result: np.ndarray = np.empty(len(tokens) + len(places), dtype=np.int32)
    kept: np.ndarray = np.ones(len(result), dtype=bool)
    new = places + np.arange(len(places))
    kept[new] = False
    result[new] = values
    result[kept] = tokens
    return result
