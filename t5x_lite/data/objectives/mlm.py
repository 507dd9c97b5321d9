"""Masked language modelling: predict hidden tokens where they stand (BERT).

Devlin et al. 2019 (arXiv:1810.04805, section 3.1 and appendix A.1); whole words from its authors'
later release; spans from SpanBERT (Joshi et al. 2020, arXiv:1907.10529, section 3.1); a new mask
every time a text is seen from RoBERTa (Liu et al. 2019, arXiv:1907.11692, section 4.1).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from t5x_lite.data.objectives.base import (
    Example,
    check_rate,
    mask_token,
    ordinary_tokens,
    wrap,
    wrapping,
)
from t5x_lite.data.objectives.masks import noise_count, run_starts
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError

# --- which tokens --------------------------------------------------------------------------------


class Selection(Protocol):
    """Draws `count` of the `places` of a text (ascending, int64) that may be masked.

    Returns an int array as long as `places`: -1 where nothing is drawn, elsewhere a number. Places
    of one number are replaced alike.
    """

    def __call__(
        self,
        places: np.ndarray,
        begins_word: np.ndarray,
        count: int,
        rng: np.random.Generator,
    ) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class MaskTokens:
    """Any tokens, every set of them as likely as another.

    8 places, 3 to draw:    -1  0 -1 -1  1 -1 -1  2
    """

    def __call__(
        self,
        places: np.ndarray,
        begins_word: np.ndarray,
        count: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        drawn = np.full(len(places), -1)
        drawn[rng.permutation(len(places))[:count]] = np.arange(count)
        return drawn


@dataclasses.dataclass(frozen=True)
class MaskWholeWords:
    """Whole words, in random order, until `count` tokens are drawn.

        words      a  a  b  c  c  c  d        3 to draw, and the order is b, c, a, d
        drawn      0  1  2 -1 -1 -1 -1        with b there is no room for c, but for a

    Fewer are drawn where no word is left that is short enough, as BERT does. Each token is replaced
    by itself, as there.
    """

    def __call__(
        self,
        places: np.ndarray,
        begins_word: np.ndarray,
        count: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        starts = np.flatnonzero(begins_word)
        sizes = np.diff(starts, append=len(places))
        order = rng.permutation(len(starts))
        chosen: np.ndarray = np.zeros(len(starts), dtype=bool)
        left = count
        for word, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
            if size <= left:
                chosen[word] = True
                left -= size
                if not left:
                    break
        mask: np.ndarray = np.repeat(chosen, sizes)
        drawn = np.full(len(places), -1)
        drawn[mask] = np.arange(count - left)
        return drawn


@dataclasses.dataclass(frozen=True)
class MaskSpans:
    """Spans of whole words, SpanBERT's: their lengths geometric with `p`, cut at `longest`.

        words      a  a  b  c  c  c  d        5 to draw; first a span of 1 word, then one of 2
        drawn     -1 -1  1  1  1  1  0        the last is cut if it would be too long

    A span begins with the word of a random token that isn't drawn yet, and never crosses a special
    token. It is replaced as one: all of it by masks, by random tokens, or by itself.
    """

    p: float = 0.2
    longest: int = 10  # words; with p = 0.2 the mean is then 3.8

    def __post_init__(self) -> None:
        if not 0.0 < self.p < 1.0 or self.longest < 1:
            raise InputError(
                f"MaskSpans(p={self.p}, longest={self.longest}): expected p between 0 and 1, and 1 "
                "or more words"
            )

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        lengths = np.arange(1, self.longest + 1)
        weights: np.ndarray = np.cumsum(self.p * (1 - self.p) ** (lengths - 1))
        return weights / weights[-1]

    def __call__(
        self,
        places: np.ndarray,
        begins_word: np.ndarray,
        count: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        starts = np.flatnonzero(begins_word)
        ends = [*starts[1:].tolist(), len(places)]
        word_of: list[int] = (np.cumsum(begins_word) - 1).tolist()
        joined = [False, *(np.diff(places) == 1).tolist()]  # to the place before
        draws = rng.random(count)  # every span draws one token or more
        lengths: list[int] = (1 + np.digitize(draws, self._bounds)).tolist()
        drawn = [-1] * len(places)
        left, number = count, 0
        for anchor in rng.permutation(len(places)).tolist():
            if not left:
                break
            if drawn[anchor] >= 0:
                continue
            word = word_of[anchor]
            begin = int(starts[word])
            end = ends[min(word + lengths[number], len(ends)) - 1]
            for place in range(begin, end):
                if not left or (place > begin and not joined[place]):
                    break
                if drawn[place] < 0:
                    drawn[place] = number
                    left -= 1
            number += 1
        return np.asarray(drawn, dtype=np.int64)


# --- the objective -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """BERT's pretraining: hide 15% of the tokens, and predict them from both sides.

        tokens             5   6   7   8   9  10
        inputs           101   5 103   7   8  42  10 102       101, 102: bos, eos; 103: mask
        masked_positions       2       5                       places in the inputs
        masked_targets         6       9

    Of the drawn tokens 80% become the mask, 10% a random token and 10% stay as they are. Special
    tokens (between joined documents, say) are never drawn, and never put in. Exactly
    `round(rate * n)` of n tokens are drawn, at least one, if the selection finds so many.
    """

    vocabulary: Vocabulary
    rate: float = 0.15  # share of tokens drawn
    selection: Selection = MaskTokens()
    mask_rate: float = 0.8  # of the drawn: become the mask
    random_rate: float = 0.1  # of the drawn: become a random token; the others stay

    features = ("text",)
    makes = ("inputs", "masked_positions", "masked_targets")

    def __post_init__(self) -> None:
        for name in ("rate", "mask_rate", "random_rate"):
            check_rate(f"MaskedLM.{name}", getattr(self, name))
        check_rate("MaskedLM.mask_rate + random_rate", self.mask_rate + self.random_rate)

    def fit(self, lengths: Mapping[str, int]) -> tuple[int]:
        """The encoder's length without bos and eos. Raises InputError for too few slots."""
        _ = mask_token(self.vocabulary, "masked language modelling")
        tokens = lengths["encoder"] - wrapping(self.vocabulary)
        if tokens < 1:
            raise InputError(
                f"lengths['encoder'] is {lengths['encoder']}: no room for a token between bos and "
                "eos; expected 3 or more"
            )
        self.check_slots(tokens, 0, lengths)
        return (tokens,)

    def check_slots(self, tokens: int, others: int, lengths: Mapping[str, int]) -> None:
        """Raises InputError unless the slots suffice for so many tokens, and `others` besides."""
        slots = noise_count(tokens, self.rate) + others
        if slots > lengths["masked"]:
            raise InputError(
                f"masking {self.rate:.0%} of {tokens} tokens takes {slots} slots, but "
                f"lengths['masked'] is {lengths['masked']}: set it to {slots}"
            )

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator) -> Example:
        """`tokens` int32 `[length]` -> inputs, masked_positions and masked_targets."""
        (text,) = tokens
        places, hidden = self.mask(text, rng)
        return Example(
            inputs=wrap(hidden, self.vocabulary),
            masked_positions=(places + wrapping(self.vocabulary) - 1).astype(np.int32),
            masked_targets=text[places].astype(np.int32),
        )

    @functools.cached_property
    def _ordinary(self) -> np.ndarray:
        return ordinary_tokens(self.vocabulary)

    @functools.cached_property
    def _text_ids(self) -> np.ndarray:
        return np.flatnonzero(self._ordinary).astype(np.int32)

    def mask(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(places drawn, ascending; the tokens with those places replaced)."""
        maskable = self._ordinary[tokens]
        places = np.flatnonzero(maskable)
        # A word that a special token interrupts begins anew after it.
        begins = (self.vocabulary.starts_word(tokens) | run_starts(maskable))[places]
        drawn = self.selection(places, begins, noise_count(len(places), self.rate), rng)
        which = drawn >= 0
        places, drawn = places[which], drawn[which]
        draws = rng.random(drawn.max(initial=-1) + 1)[drawn]
        hidden: np.ndarray = tokens.astype(np.int32)
        hidden[places[draws < self.mask_rate]] = self.vocabulary.mask_id
        anything = places[(draws >= self.mask_rate) & (draws < self.mask_rate + self.random_rate)]
        hidden[anything] = self._text_ids[rng.integers(0, len(self._text_ids), len(anything))]
        return places, hidden
