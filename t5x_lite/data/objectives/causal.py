"""Objectives of models that write from left to right: causal and prefix LM, fill in the middle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from t5x_lite.data.objectives.base import (
    Example,
    append_eos,
    check_rate,
    fits,
    most,
    wrap,
    wrap_targets,
    wrapping,
)
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """Each token from those before it (GPT: Radford et al. 2018, 2019). Nothing is random.

        tokens   5 6 7                 a text that ended; the layout shows 50 5 6 7 to the decoder,
        targets  5 6 7 1               50 being what the vocabulary starts with

    A text that fills the whole row was cut: `as_decoder` leaves its eos out. With Chunks that is
    every row, and documents end inside.
    """

    vocabulary: Vocabulary

    features = ("text",)
    makes = ("targets",)

    def fit(self, lengths: Mapping[str, int]) -> tuple[int]:
        """The whole row: eos needs no room of its own."""
        return (lengths["decoder"],)

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator | None = None) -> Example:
        """`tokens` int32 `[length]` -> targets, with eos unless they end with one."""
        (text,) = tokens
        eos = self.vocabulary.eos_id
        ended = len(text) and text[-1] == eos
        targets = text.astype(np.int32) if ended else append_eos(text, eos)
        return Example(targets=targets, start_id=self.vocabulary.start_id)


@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """The rest of a text from its beginning, cut at a random place (Raffel et al. 2020, 3.2.1).

        tokens   5 6 7 8 9
        inputs   5 6 1                 read in both directions
        targets  7 8 9 1

    Every cut that leaves a token on either side is equally likely.
    """

    vocabulary: Vocabulary

    features = ("text",)
    makes = ("inputs", "targets")

    def fit(self, lengths: Mapping[str, int]) -> tuple[int]:
        """The most tokens whose parts fit wherever they are cut."""
        ends = wrapping(self.vocabulary)
        extra = len(wrap_targets(np.zeros(0, np.int32), self.vocabulary))

        def fitting(tokens: int) -> bool:
            if "encoder" in lengths:
                return fits(lengths, tokens - 1 + ends, tokens - 1 + extra)
            return fits(lengths, tokens + ends, extra)

        return (most(fitting, max(lengths.values()), "a prefix and its rest", lengths),)

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator) -> Example:
        """`tokens` int32 `[length]` -> inputs and targets, each with bos and eos."""
        (text,) = tokens
        cut = int(rng.integers(1, len(text))) if len(text) > 1 else len(text)
        vocabulary = self.vocabulary
        return Example(
            wrap(text[:cut], vocabulary),
            wrap_targets(text[cut:], vocabulary),
            start_id=vocabulary.start_id,
        )


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """The middle of a text after its beginning and its end (Bavarian et al. 2022).

    arXiv:2207.14255, section 3.

        tokens   5 6 | 7 8 | 9                      cut at two random places
        PSM     97 5 6 98 9 99 7 8 1                97, 98, 99: prefix, suffix, middle; 1: eos
        SPM     97 98 9 99 5 6 7 8 1

    A share `rate` of the texts is cut so, the others stay as they are; of those cut, `spm_rate` are
    SPM, in the variant that the paper trains together with PSM (its appendix D). The cuts fall
    between tokens; the paper's fall between characters. Every text ends with eos, for that is how
    a model says that the middle has met the suffix.
    """

    vocabulary: Vocabulary
    rate: float = 0.5  # share of texts that are transformed
    spm_rate: float = 0.5  # share of those that have the suffix first
    tokens: tuple[int, int, int] | None = None  # ids of prefix, suffix, middle; None: sentinels 0-2

    features = ("text",)
    makes = ("targets",)

    def __post_init__(self) -> None:
        check_rate("FillInTheMiddle.rate", self.rate)
        check_rate("FillInTheMiddle.spm_rate", self.spm_rate)
        if self.tokens is not None:
            object.__setattr__(self, "tokens", tuple(self.tokens))
            if len(set(self.tokens)) != 3:
                raise InputError(
                    f"FillInTheMiddle.tokens is {self.tokens}; expected three different ids: "
                    "prefix, suffix, middle"
                )

    @property
    def markers(self) -> tuple[int, int, int]:
        """The ids of prefix, suffix and middle. Raises InputError without ids for them."""
        if self.tokens is not None:
            return self.tokens
        if self.vocabulary.num_sentinels < 3:
            raise InputError(
                f"fill in the middle marks three places, but the vocabulary has "
                f"{self.vocabulary.num_sentinels} sentinels: raise its extra_ids, or set "
                "FillInTheMiddle.tokens"
            )
        first, second, third = (self.vocabulary.sentinel_id(k) for k in range(3))
        return first, second, third

    def fit(self, lengths: Mapping[str, int]) -> tuple[int]:
        """Room for the three markers and eos is kept."""
        _ = self.markers
        if lengths["decoder"] < 5:
            raise InputError(
                f"lengths['decoder'] is {lengths['decoder']}: fill in the middle adds 4 tokens to "
                "a text; expected 5 or more"
            )
        return (lengths["decoder"] - 4,)

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator) -> Example:
        """`tokens` int32 `[length]` -> targets with eos."""
        (text,) = tokens
        transformed, spm = rng.random(2) < (self.rate, self.spm_rate)
        if transformed:
            first, second = sorted(rng.integers(0, len(text) + 1, 2).tolist())
            prefix, middle, suffix = text[:first], text[first:second], text[second:]
            marks = self.markers
            pre, suf, mid = (np.array([mark], np.int32) for mark in marks)
            parts = (
                (pre, suf, suffix, mid, prefix, middle)
                if spm
                else (pre, prefix, suf, suffix, mid, middle)
            )
            text = np.concatenate(parts)
        return Example(
            targets=append_eos(text, self.vocabulary.eos_id), start_id=self.vocabulary.start_id
        )
