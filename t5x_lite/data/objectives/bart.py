"""BART: rebuild a text from a noised one (Lewis et al. 2020, arXiv:1910.13461, section 2.2).

A noise is a function `(tokens, rng) -> tokens`; they compose by running one after another. Special
tokens, such as the eos between joined documents, are never hidden, deleted or split off.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from t5x_lite.data.objectives.base import (
    Example,
    check_rate,
    fits,
    mask_token,
    most,
    ordinary_tokens,
    wrap,
    wrap_targets,
    wrapping,
)
from t5x_lite.data.objectives.rendering import insert
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError


class Noise(Protocol):
    """Changes a text; never makes it longer."""

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _TokenNoise:
    """What noises of a share of the tokens have in common: `round(rate * n)` of n are drawn."""

    vocabulary: Vocabulary
    rate: float = 0.3

    def __post_init__(self) -> None:
        check_rate(f"{type(self).__name__}.rate", self.rate)

    @functools.cached_property
    def _ordinary(self) -> np.ndarray:
        return ordinary_tokens(self.vocabulary)

    def _draw(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        places = np.flatnonzero(self._ordinary[tokens])
        return places[rng.permutation(len(places))[: round(self.rate * len(places))]]


@dataclasses.dataclass(frozen=True)
class TokenMasking(_TokenNoise):
    """Random tokens become the mask: `5 6 7 8` -> `5 M 7 8`. As in BERT, without its other 20%."""

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noised: np.ndarray = tokens.astype(np.int32)
        noised[self._draw(tokens, rng)] = mask_token(self.vocabulary, "token masking")
        return noised


@dataclasses.dataclass(frozen=True)
class TokenDeletion(_TokenNoise):
    """Random tokens go: `5 6 7 8` -> `5 7 8`. The model must find out where one is missing."""

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.delete(tokens.astype(np.int32), self._draw(tokens, rng))


@dataclasses.dataclass(frozen=True)
class TextInfilling(_TokenNoise):
    """Random spans become one mask each; their lengths are Poisson, and a span of none inserts one.

        tokens   5  6  7  8  9 10 11 12
        spans       3        0     1           6 7 8 hidden, nothing before 10, 11 hidden
        noised   5  M  9  M 10  M 12

    Lengths are drawn until `round(rate * n)` tokens are hidden, the last span being cut; then all
    ways to lay the spans between the other tokens are equally likely. A special token inside a span
    stays and splits it. There are never more masks than hidden tokens, so that no text grows.
    """

    mean_span_length: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mean_span_length > 0.0:
            raise InputError(
                f"TextInfilling.mean_span_length is {self.mean_span_length}; expected more than 0"
            )

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        mask = mask_token(self.vocabulary, "text infilling")
        ordinary = self._ordinary[tokens]
        places = np.flatnonzero(ordinary)
        count, specials = round(self.rate * len(places)), len(tokens) - len(places)
        if not count:
            return tokens.astype(np.int32)
        lengths = span_lengths(count, self.mean_span_length, rng, at_most=count - specials)
        spans = len(lengths)
        order = rng.permutation(len(places) - count + spans)  # of kept tokens and spans
        kept_before = np.sort(order[:spans]) - np.arange(spans)
        hidden = np.repeat(kept_before, lengths) + np.arange(count)
        starts = np.append(places, len(tokens))[kept_before + np.cumsum(lengths) - lengths]
        kept: np.ndarray = np.ones(len(tokens), dtype=bool)
        kept[places[hidden]] = False
        if specials:
            after: np.ndarray = 1 + np.flatnonzero(~ordinary[:-1] & ~kept[1:])
            starts = np.sort(np.append(starts, np.setdiff1d(after, starts[lengths > 0])))
        return insert(tokens[kept], np.append(0, np.cumsum(kept))[starts], mask)


def span_lengths(total: int, mean: float, rng: np.random.Generator, at_most: int) -> np.ndarray:
    """Poisson lengths that add up to `total`, the last one cut.

    If there are more than `at_most`, empty ones are left out: `3 0 1 0` -> `3 1 0` at most 3.
    """
    lengths: np.ndarray = np.zeros(0, dtype=np.int64)
    while lengths.sum() < total:
        lengths = np.append(lengths, rng.poisson(mean, 8 + round(total / mean)))
    sums: np.ndarray = np.cumsum(lengths)
    spans = int(np.searchsorted(sums, total)) + 1
    lengths = lengths[:spans]
    lengths[-1] -= sums[spans - 1] - total
    if spans > at_most:
        lengths = np.delete(lengths, np.flatnonzero(lengths == 0)[: spans - at_most])
    return lengths


@dataclasses.dataclass(frozen=True)
class SentencePermutation:
    """The sentences of each document in random order: `a b. c. d e.` -> `d e. a b. c.`

    A sentence ends where the vocabulary says so, a document at a special token, which stays.
    """

    vocabulary: Vocabulary

    @functools.cached_property
    def _ordinary(self) -> np.ndarray:
        return ordinary_tokens(self.vocabulary)

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if not len(tokens):
            return tokens.astype(np.int32)
        special = ~self._ordinary[tokens]
        first: np.ndarray = np.ones(len(tokens), dtype=bool)  # of a sentence, or a special token
        first[1:] = self.vocabulary.ends_sentence(tokens)[:-1] | special[1:] | special[:-1]
        starts = np.flatnonzero(first)
        keys = rng.random(len(starts))
        keys[special[starts]] = -1.0  # before the document that follows it
        rank: np.ndarray = np.empty(len(starts), dtype=np.int64)
        rank[np.lexsort((keys, np.cumsum(special)[starts]))] = np.arange(len(starts))
        order = np.argsort(rank[np.cumsum(first) - 1], kind="stable")
        return tokens[order].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class DocumentRotation:
    """The text begins with a random token, and goes on around its end: `5 6 7 8` -> `7 8 5 6`."""

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        start = int(rng.integers(0, max(len(tokens), 1)))
        return np.concatenate([tokens[start:], tokens[:start]], dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class BART:
    """Read the noised text, write the text as it was.

        tokens   5  6  7  8  9 10 11 12
        inputs   0  5  M  9  M 10  M 12  2         0, 2: bos, eos; M: mask
        targets  0  5  6  7  8  9 10 11 12  2      the decoder starts with eos (start_id)

    `noises` run in order; None is the published mix: all sentences permuted, then 30% of the tokens
    hidden by text infilling.
    """

    vocabulary: Vocabulary
    noises: Sequence[Noise] | None = None

    features = ("text",)
    makes = ("inputs", "targets")

    def __post_init__(self) -> None:
        noises = self.noises
        if noises is None:
            noises = (SentencePermutation(self.vocabulary), TextInfilling(self.vocabulary))
        object.__setattr__(self, "noises", tuple(noises))

    def fit(self, lengths: Mapping[str, int]) -> tuple[int]:
        """Both sides hold the whole text. Raises InputError if a noise needs a mask in vain."""
        for noise in self.noises or ():
            if isinstance(noise, TokenMasking | TextInfilling):
                mask_token(self.vocabulary, f"BART's {type(noise).__name__}")
        ends = wrapping(self.vocabulary)
        targets = len(wrap_targets(np.zeros(0, np.int32), self.vocabulary))
        limit = max(lengths.values())
        return (most(lambda n: fits(lengths, n + ends, n + targets), limit, "BART", lengths),)

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator) -> Example:
        """`tokens` int32 `[length]` -> an Example of inputs and targets, with bos and eos."""
        (text,) = tokens
        noised = text
        for noise in self.noises or ():
            noised = noise(noised, rng)
        vocabulary = self.vocabulary
        return Example(
            wrap(noised, vocabulary),
            wrap_targets(text, vocabulary),
            start_id=vocabulary.start_id,
        )
