"""T5's denoising: hide spans behind sentinels, and write them (Raffel et al. 2020, section 3.3).

arXiv:1910.10683; the published code is `t5/data/preprocessors.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from t5x_lite.data.objectives.base import Example, append_eos, check_rate, fits, most
from t5x_lite.data.objectives.masks import (
    iid_noise_mask,
    noise_count,
    noise_counts,
    random_spans_noise_mask,
)
from t5x_lite.data.objectives.rendering import noise_after_sentinels, spans_to_sentinels
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError


def span_corruption_lengths(
    inputs_length: int, noise_density: float = 0.15, mean_span_length: float = 3.0
) -> tuple[int, int]:
    """T5's (tokens to take, length of the targets) that fill an input of `inputs_length`.

    512 gives (568, 114): 568 tokens lose 85 in 28 spans, so 483 + 28 + 1 = 512 inputs, and
    85 + 28 + 1 = 114 targets. Python's rounding of doubles, as in T5's `random_spans_helper`,
    unlike the mask's. Raises InputError if no two tokens fit.
    """

    def lengths(tokens: int) -> tuple[int, int]:
        noise = round(tokens * noise_density)
        spans = round(noise / mean_span_length)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length - 1
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    if tokens < 2:
        raise InputError(
            f"a length of {inputs_length} is too short for span corruption: expected 3 or more"
        )
    targets_length = lengths(tokens)[1]
    if noise_density == 0.5 and targets_length > inputs_length:  # published so: equal lengths
        tokens, targets_length = tokens - 1, targets_length - 1
    return tokens, targets_length


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """T5's pretraining: hide random spans, and write them in order after their sentinels.

        tokens    5  6  7  8  9 10 11 12          mask 0 0 0 1 1 0 0 1
        inputs    5  6  7 99 10 11 98  1          99, 98: <extra_id_0>, <extra_id_1>; 1: eos
        targets  99  8  9 98 12  1

    Fewer than two tokens pass as the published code lets them: one token is kept and asks for
    nothing (`targets = [<extra_id_0>, eos]`), none gives a lone eos on both sides.
    """

    vocabulary: Vocabulary
    noise_density: float = 0.15  # share of tokens hidden
    mean_span_length: float = 3.0  # tokens a hidden span

    features = ("text",)
    makes = ("inputs", "targets")

    def __post_init__(self) -> None:
        if not 0.0 < self.noise_density < 1.0:
            raise InputError(f"noise_density is {self.noise_density}; expected between 0 and 1")
        if not self.mean_span_length >= 1.0:
            raise InputError(f"mean_span_length is {self.mean_span_length}; expected 1 or more")

    def fit(self, lengths: Mapping[str, int]) -> tuple[int]:
        """The most tokens whose inputs and targets fit. Raises InputError if the decoder is short
        of T5's targets length, or the vocabulary of sentinels."""
        if "encoder" in lengths:
            tokens, targets = span_corruption_lengths(
                lengths["encoder"], self.noise_density, self.mean_span_length
            )
            if targets > lengths["decoder"]:
                raise InputError(
                    f"span corruption of {lengths['encoder']} encoder tokens makes {targets} "
                    f"target tokens, but lengths['decoder'] is {lengths['decoder']}: set it to "
                    f"{targets}"
                )
        else:
            tokens = lengths["decoder"]
        # float32 counts may differ from span_corruption_lengths' by one at a tie.
        tokens = most(lambda n: self._fits(n, lengths), tokens, "span corruption", lengths)
        _, spans = noise_counts(tokens, self.noise_density, self.mean_span_length)
        check_sentinels(self.vocabulary, spans, tokens)
        return (tokens,)

    def _fits(self, tokens: int, lengths: Mapping[str, int]) -> bool:
        noise, spans = noise_counts(tokens, self.noise_density, self.mean_span_length)
        return fits(lengths, tokens - noise + spans + 1, noise + spans + 1)

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator) -> Example:
        """`tokens` int32 `[length]` -> an Example of inputs and targets, eos appended to both."""
        (text,) = tokens
        mask = random_spans_noise_mask(
            len(text),
            rng,
            noise_density=self.noise_density,
            mean_span_length=self.mean_span_length,
        )
        vocabulary, eos = self.vocabulary, self.vocabulary.eos_id
        inputs = spans_to_sentinels(text, mask, vocabulary.sentinel_id(0))
        targets = spans_to_sentinels(text, ~mask, vocabulary.sentinel_id(0))
        check_sentinels(vocabulary, len(targets) - int(np.count_nonzero(mask)), len(text))
        return Example(
            append_eos(inputs, eos), append_eos(targets, eos), start_id=vocabulary.start_id
        )


@dataclasses.dataclass(frozen=True)
class IidDenoising:
    """T5's denoising of tokens hidden one by one, neighbours behind one sentinel (section 3.1.4).

    tokens    5  6  7  8  9 10 11 12          mask 1 0 0 1 1 0 0 0
    inputs   99  6  7 98 10 11 12  1          99, 98: <extra_id_0>, <extra_id_1>; 1: eos
    targets  99  5 98  8  9  1
    """

    vocabulary: Vocabulary
    noise_density: float = 0.15  # share of tokens hidden

    features = ("text",)
    makes = ("inputs", "targets")

    def __post_init__(self) -> None:
        check_rate("noise_density", self.noise_density)

    def fit(self, lengths: Mapping[str, int]) -> tuple[int]:
        """The most tokens that fit even if no two hidden ones are neighbours."""

        def fitting(tokens: int) -> bool:
            noise = noise_count(tokens, self.noise_density)
            return fits(lengths, tokens + 1, 2 * noise + 1)

        tokens = most(fitting, max(lengths.values()), "i.i.d. denoising", lengths)
        check_sentinels(self.vocabulary, noise_count(tokens, self.noise_density), tokens)
        return (tokens,)

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator) -> Example:
        """`tokens` int32 `[length]` -> an Example of inputs and targets, eos appended to both."""
        (text,) = tokens
        mask = iid_noise_mask(len(text), rng, noise_density=self.noise_density)
        return denoising_example(text, mask, self.vocabulary)


def denoising_example(
    tokens: np.ndarray, noise_mask: np.ndarray, vocabulary: Vocabulary, mode: int | None = None
) -> Example:
    """Noise behind sentinels in the inputs, after them in the targets; `mode` before the inputs."""
    inputs = spans_to_sentinels(tokens, noise_mask, vocabulary.sentinel_id(0))
    targets = noise_after_sentinels(tokens, noise_mask, vocabulary.sentinel_id(0))
    if mode is not None:
        inputs = np.concatenate([[np.int32(mode)], inputs], dtype=np.int32)
    eos = vocabulary.eos_id
    return Example(append_eos(inputs, eos), append_eos(targets, eos), start_id=vocabulary.start_id)


def check_sentinels(vocabulary: Vocabulary, needed: int, tokens: int) -> None:
    """Raises InputError unless the vocabulary has so many sentinels."""
    if needed > vocabulary.num_sentinels:
        raise InputError(
            f"span corruption of {tokens} tokens needs {needed} sentinels, but the vocabulary "
            f"has {vocabulary.num_sentinels}: raise its extra_ids, or mean_span_length"
        )
