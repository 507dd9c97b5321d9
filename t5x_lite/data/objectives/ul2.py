"""UL2's mixture of denoisers (Tay et al. 2022, arXiv:2205.05131, section 3.1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from t5x_lite.data.objectives.base import Example, fits, most
from t5x_lite.data.objectives.masks import (
    noise_count,
    noise_counts,
    random_spans_noise_mask,
    suffix_noise_mask,
)
from t5x_lite.data.objectives.span_corruption import check_sentinels, denoising_example
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError

Mode = Literal["R", "S", "X"]
_MODES = ("R", "S", "X")


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One kind of noise: random spans, or (`mean_span_length=None`) the end of the text."""

    mode: Mode  # the mode token that announces it: regular, sequential or extreme
    noise_density: float
    mean_span_length: float | None

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise InputError(f"Denoiser.mode is '{self.mode}'; expected one of {', '.join(_MODES)}")
        if not 0.0 < self.noise_density < 1.0:
            raise InputError(f"noise_density is {self.noise_density}; expected between 0 and 1")
        if self.mean_span_length is not None and not self.mean_span_length >= 1.0:
            raise InputError(f"mean_span_length is {self.mean_span_length}; expected 1 or more")

    def counts(self, length: int) -> tuple[int, int]:
        """(noise tokens, noise spans) for `length` tokens."""
        if self.mean_span_length is None:
            return noise_count(length, self.noise_density), 1
        return noise_counts(length, self.noise_density, self.mean_span_length)

    def mask(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Which tokens are noise, bool `[length]`."""
        if self.mean_span_length is None:
            return suffix_noise_mask(length, noise_density=self.noise_density)
        return random_spans_noise_mask(
            length,
            rng,
            noise_density=self.noise_density,
            mean_span_length=self.mean_span_length,
        )


PUBLISHED = (
    Denoiser("R", 0.15, 3.0),
    Denoiser("R", 0.15, 8.0),
    Denoiser("S", 0.25, None),
    Denoiser("X", 0.5, 3.0),
    Denoiser("X", 0.5, 8.0),
    Denoiser("X", 0.15, 64.0),
    Denoiser("X", 0.5, 64.0),
)


@dataclasses.dataclass(frozen=True)
class UL2:
    """One of several denoisers for each text, its mode told by the first token of the inputs.

        tokens       5  6  7  8  9 10 11 12
        R  inputs   49  5  6  7 99 10 11 12  1      targets  99  8  9  1
        S  inputs   48  5  6  7  8  9 10 99  1      targets  99 11 12  1
        X  inputs   47  5 99  8 98 12  1            targets  99  6  7 98  9 10 11  1

    99, 98: the first sentinels; 49, 48, 47: R, S and X, the vocabulary's last three sentinels. The
    published settings are R (mean 3 or 8, 15%), S (the last 25%) and X (mean 3, 8 or 64 at 50%, or
    64 at 15%), each as often as another. All share the row's lengths, so that X leaves some room.
    """

    vocabulary: Vocabulary
    denoisers: Sequence[Denoiser] = PUBLISHED
    weights: Sequence[float] | None = None  # how often each is drawn; None: equally often

    features = ("text",)
    makes = ("inputs", "targets")

    def __post_init__(self) -> None:
        object.__setattr__(self, "denoisers", tuple(self.denoisers))
        weights = tuple(self.weights or (1.0,) * len(self.denoisers))
        if not weights or len(weights) != len(self.denoisers) or not all(w > 0 for w in weights):
            raise InputError(
                f"UL2 has {len(self.denoisers)} denoisers and weights {self.weights}; expected one "
                "positive weight a denoiser"
            )
        object.__setattr__(self, "weights", weights)

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        weights: np.ndarray = np.cumsum(np.asarray(self.weights))
        return weights / weights[-1]

    def mode_token(self, mode: Mode) -> int:
        """The id that announces R, S or X."""
        return self.vocabulary.sentinel_id(self.vocabulary.num_sentinels - 3 + _MODES.index(mode))

    def fit(self, lengths: Mapping[str, int]) -> tuple[int]:
        """The most tokens that fit whichever denoiser is drawn."""

        def fitting(tokens: int) -> bool:
            made = [denoiser.counts(tokens) for denoiser in self.denoisers]
            return all(fits(lengths, tokens - n + s + 2, n + s + 1) for n, s in made)

        # Each keeps less than all, so that a text may be longer than its inputs.
        tokens = most(fitting, 2 * sum(lengths.values()), "UL2", lengths)
        spans = max(denoiser.counts(tokens)[1] for denoiser in self.denoisers)
        check_sentinels(self.vocabulary, spans + len(_MODES), tokens)
        return (tokens,)

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator) -> Example:
        """`tokens` int32 `[length]` -> an Example of inputs and targets, eos appended to both."""
        (text,) = tokens
        drawn = int(np.searchsorted(self._bounds, rng.random(), side="right"))
        denoiser = self.denoisers[drawn]
        mask = denoiser.mask(len(text), rng)
        return denoising_example(text, mask, self.vocabulary, self.mode_token(denoiser.mode))
