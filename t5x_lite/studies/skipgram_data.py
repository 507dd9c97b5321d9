"""What skip-gram learns from: a corpus of ids, and batches of windows out of it. numpy alone.

The same three draws as in word2vec (Mikolov et al. 2013, arXiv:1310.4546): frequent words are left
out at random, each centre's window is as wide as a die says, and negatives come by count^0.75.

Shapes: n tokens, v rows of a table, c steps of a dispatch, s blocks, t centres of a block,
u = t + 2 window outputs of a block, m negatives.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@dataclass(frozen=True)
class Corpus:
    """Documents as ids of rows, one behind another."""

    tokens: np.ndarray  # int32 [n]
    starts: np.ndarray  # int64: where each document begins in `tokens`
    names: tuple[str, ...]  # [v], of the rows
    counts: np.ndarray  # int64 [v]

    def __post_init__(self) -> None:
        if not len(self.tokens):
            raise InputError(
                "the corpus is empty: no word of the source is as frequent as min_count says"
            )


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: letters, and apostrophes between them."""
    return _WORD.findall(text.lower())


def word_corpus(texts: Iterable[str], min_count: int) -> Corpus:
    """Texts by words; rows by falling count. Rarer ones than `min_count` are not there."""
    documents = [words_of(text) for text in texts]
    counted = collections.Counter(word for words in documents for word in words)
    kept = [(word, count) for word, count in counted.most_common() if count >= min_count]
    ids = {word: row for row, (word, _) in enumerate(kept)}
    return _corpus(
        ([ids[word] for word in words if word in ids] for words in documents),
        tuple(ids),
    )


def token_corpus(texts: Iterable[str], vocabulary: Vocabulary, min_count: int) -> Corpus:
    """Texts by a vocabulary's tokens: row i is token i, as in a language model's embedding.

    Rarer tokens than `min_count` are left out of the texts; their rows are never learned.
    """
    names = tuple(vocabulary.piece(token) for token in range(vocabulary.size))
    documents = [np.asarray(vocabulary.encode(text), np.int32) for text in texts]
    counts: np.ndarray = np.zeros(len(names), np.int64)
    for ids in documents:
        counts += np.bincount(ids, minlength=len(names))
    return _corpus((ids[counts[ids] >= min_count] for ids in documents), names)


def _corpus(documents: Iterable[Sequence[int] | np.ndarray], names: tuple[str, ...]) -> Corpus:
    arrays = [np.asarray(ids, np.int32) for ids in documents if len(ids)]
    tokens = np.concatenate([*arrays, np.zeros(0, np.int32)])
    starts = np.cumsum([0, *(len(array) for array in arrays)])[:-1]
    return Corpus(tokens, starts, names, np.bincount(tokens, minlength=len(names)))


def keep_probability(counts: np.ndarray, subsample: float) -> np.ndarray:
    """float32 `[v]`: how likely a token stays in the text; 0 for `subsample` keeps all.

    sqrt(t/f) + t/f for a token of frequency f, as word2vec's program has it (its paper: the root
    alone).
    """
    if not subsample:
        return np.ones(len(counts), np.float32)
    ratio = subsample * counts.sum() / np.maximum(counts, 1)
    return np.minimum(np.sqrt(ratio) + ratio, 1.0).astype(np.float32)


def negative_bounds(counts: np.ndarray) -> np.ndarray:
    """float64 `[v]`: the distribution function of negatives, proportional to count^0.75."""
    bounds = np.cumsum(counts.astype(np.float64) ** 0.75)
    return bounds / bounds[-1]


def draw_negatives(
    bounds: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """int32 `[steps, m]`, a systematic sample a step: row i expected m p_i times, to within one.

    One uniform draw places m equally spaced points on the distribution function. Frequent rows are
    then never drawn many times in a step by chance, which is what unsettles large steps.
    """
    steps, m = shape
    points = (np.arange(m) + rng.random((steps, 1))) / m
    found = np.searchsorted(bounds, points, side="right")
    return np.minimum(found, len(bounds) - 1).astype(np.int32)


class Windows(NamedTuple):
    """Steps of one dispatch. Centre i of a block is its output i + window."""

    outputs: np.ndarray  # int32 [c, s, u]: the tokens of a block, and a window on either side
    left: np.ndarray  # int8 [c, s, t]: how far each centre's window reaches
    right: np.ndarray
    negatives: np.ndarray  # int32 [c, m], shared by all pairs of a step
    rate: np.ndarray  # float32 [c], the learning rate


class Sizes(NamedTuple):
    """Of a dispatch."""

    steps: int
    blocks: int
    centres: int
    window: int
    negatives: int


def empty(sizes: Sizes) -> Windows:
    """Windows that reach nowhere, in the shapes and dtypes of all others."""
    steps, blocks, centres, window, m = sizes
    reach: np.ndarray = np.zeros((steps, blocks, centres), np.int8)
    return Windows(
        np.zeros((steps, blocks, centres + 2 * window), np.int32),
        reach,
        reach,
        np.zeros((steps, m), np.int32),
        np.zeros(steps, np.float32),
    )


def windows(
    corpus: Corpus,
    sizes: Sizes,
    *,
    subsample: float,
    rates: tuple[float, float],
    progress: tuple[float, float],
    seed: Sequence[int],
) -> Iterator[tuple[Windows, int]]:
    """One pass over the corpus: dispatches, and how many centres each has.

    Windows don't cross documents; a centre's reach is uniform from 1 to `sizes.window`. The last
    dispatch is filled up with centres that reach nowhere. The learning rate falls linearly from
    `rates[0]` at progress 0 to `rates[1]` at progress 1; this pass goes over `progress`.
    """
    rng = np.random.default_rng(seed)
    steps, blocks, centres, window, m = sizes
    keep = keep_probability(corpus.counts, subsample)
    kept = np.flatnonzero(rng.random(len(corpus.tokens), np.float32) < keep[corpus.tokens])
    tokens, count = corpus.tokens[kept], len(kept)
    starts = np.searchsorted(kept, corpus.starts)
    lengths: np.ndarray = np.diff(np.append(starts, count))
    place = np.arange(count) - np.repeat(starts, lengths)
    reach = rng.integers(1, window + 1, count)
    left = np.minimum(reach, place)
    right = np.minimum(reach, np.repeat(lengths, lengths) - 1 - place)

    dispatch = steps * blocks * centres
    rows = -(-count // dispatch) * steps
    filled = rows * blocks * centres
    padded = np.pad(tokens, (window, filled - count + window))
    outputs = np.lib.stride_tricks.sliding_window_view(padded, centres + 2 * window)[::centres]
    outputs = outputs.reshape(rows, blocks, -1)
    left, right = (
        np.pad(side, (0, filled - count)).astype(np.int8).reshape(rows, blocks, centres)
        for side in (left, right)
    )
    bounds = negative_bounds(corpus.counts)
    along = np.interp(np.arange(rows) / max(rows, 1), (0, 1), progress)
    rate = np.interp(along, (0, 1), rates).astype(np.float32)
    for start in range(0, rows, steps):
        part = slice(start, start + steps)
        negatives = draw_negatives(bounds, (steps, m), rng)
        yield (
            Windows(outputs[part], left[part], right[part], negatives, rate[part]),
            min(dispatch, count - start * blocks * centres),
        )
