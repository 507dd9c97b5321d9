"""Objectives: what the model is asked to learn from a text.

An objective maps the tokens of one example and a random generator to an `Example`. The
self-supervised ones are made of a noise mask (which tokens are hidden) and two renderers (what the
encoder sees, and what the decoder must say), each a short function of arrays.

Span corruption is T5's (Raffel et al. 2020, arXiv:1910.10683, section 3.3.4; the published code is
`t5/data/preprocessors.py`). Counts match it exactly, including its arithmetic: float32 products,
rounded half to even. Which spans are drawn depends on the generator, as there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Token streams of one example, each int32 `[its own length]`, eos included."""

    inputs: np.ndarray | None = None  # what the encoder reads
    targets: np.ndarray | None = None  # what the decoder writes


class Objective(Protocol):
    """What a Task asks of an objective.

    `features` names the record fields whose tokens it takes, in order; `makes` the streams of the
    `Example` that it fills. `fit(lengths)` gives, for each feature, the most tokens whose streams
    fit the model's lengths: longer ones are cut before the call.
    """

    @property
    def features(self) -> tuple[str, ...]: ...
    @property
    def makes(self) -> tuple[str, ...]: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    def fit(self, lengths: Mapping[str, int]) -> tuple[int, ...]: ...
    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator) -> Example: ...


# --- noise masks ---------------------------------------------------------------------------------


def noise_counts(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """T5's (number of noise tokens, number of noise spans) for `length` tokens.

        noise tokens = round(length * noise_density), kept within [1, length - 1]
        noise spans  = round(noise tokens / mean_span_length), at least 1

    In float32 with ties to even, as TensorFlow computes them: 568 tokens at 0.15 and 3.0 give
    (85, 28). Lengths below 2 count as 2. Where the kept tokens are fewer than the spans, which
    would have to separate them (the published code fails there), there are as many spans as those.
    """
    length = max(length, 2)
    noise_tokens = int(np.rint(np.float32(length) * np.float32(noise_density)))
    noise_tokens = min(max(noise_tokens, 1), length - 1)
    spans = int(np.rint(np.float32(noise_tokens) / np.float32(mean_span_length)))
    # A span has at least one token: a mean below 1 can't ask for more spans than noise tokens.
    return noise_tokens, max(min(spans, noise_tokens, length - noise_tokens), 1)


def random_segmentation(num_items: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of `num_segments` non-empty segments that add up to `num_items`, all equally likely.

    `num_segments - 1` of the items after the first are drawn to start a segment:

        items      a b c d e f g      num_items=7, num_segments=3
        starts     1 0 0 1 0 1 0      the first is always one
        lengths    [3, 2, 2]
    """
    bounds: np.ndarray = np.empty(num_segments + 1, dtype=np.int64)
    bounds[0], bounds[-1] = 0, num_items
    bounds[1:-1] = 1 + np.sort(rng.permutation(num_items - 1)[: num_segments - 1])
    return bounds[1:] - bounds[:-1]


def random_spans_noise_mask(
    length: int,
    rng: np.random.Generator,
    *,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
) -> np.ndarray:
    """Which tokens are noise, bool `[length]`: T5's alternating random spans, a kept span first.

        noise spans [2, 1], kept spans [3, 2]:    0 0 0 1 1 0 0 1

    One token is kept (the mask of two, cut), and no token gives an empty mask, as published.
    """
    if length < 1:
        return np.zeros(0, dtype=bool)
    noise_tokens, spans = noise_counts(length, noise_density, mean_span_length)
    lengths: np.ndarray = np.empty(
        2 * spans, dtype=np.int64
    )  # of kept, noise, kept, noise ... spans
    lengths[1::2] = random_segmentation(noise_tokens, spans, rng)
    lengths[0::2] = random_segmentation(max(length, 2) - noise_tokens, spans, rng)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)[:length]


# --- renderers -----------------------------------------------------------------------------------


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
    after_noise = np.empty_like(noise_mask)
    after_noise[:1] = False
    after_noise[1:] = noise_mask[:-1]
    starts = np.flatnonzero(noise_mask > after_noise)
    rendered: np.ndarray = tokens.astype(np.int32)
    rendered[starts] = np.arange(first_sentinel, first_sentinel - len(starts), -1)
    return rendered[~(noise_mask & after_noise)]


def append_eos(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """`[5, 6]` -> `[5, 6, eos_id]`, int32."""
    result: np.ndarray = np.empty(len(tokens) + 1, dtype=np.int32)
    result[:-1] = tokens
    result[-1] = eos_id
    return result


# --- objectives ----------------------------------------------------------------------------------


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
        tokens, targets = span_corruption_lengths(
            lengths["encoder"], self.noise_density, self.mean_span_length
        )
        if targets > lengths["decoder"]:
            raise InputError(
                f"span corruption of {lengths['encoder']} encoder tokens makes {targets} target "
                f"tokens, but lengths['decoder'] is {lengths['decoder']}: set it to {targets}"
            )
        # float32 counts may differ from span_corruption_lengths' by one at a tie.
        while not self._fits(tokens, lengths):
            tokens -= 1
        _, spans = noise_counts(tokens, self.noise_density, self.mean_span_length)
        self._check_sentinels(spans, tokens)
        return (tokens,)

    def _fits(self, tokens: int, lengths: Mapping[str, int]) -> bool:
        noise, spans = noise_counts(tokens, self.noise_density, self.mean_span_length)
        return (
            tokens - noise + spans + 1 <= lengths["encoder"]
            and noise + spans + 1 <= lengths["decoder"]
        )

    def _check_sentinels(self, spans: int, tokens: int) -> None:
        if spans > self.vocabulary.num_sentinels:
            raise InputError(
                f"span corruption of {tokens} tokens needs {spans} sentinels, but the vocabulary "
                f"has {self.vocabulary.num_sentinels}: raise its extra_ids, or mean_span_length"
            )

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator) -> Example:
        """`tokens` int32 `[length]` -> an Example of inputs and targets, eos appended to both."""
        (text,) = tokens
        mask = random_spans_noise_mask(
            len(text),
            rng,
            noise_density=self.noise_density,
            mean_span_length=self.mean_span_length,
        )
        sentinel, eos = self.vocabulary.size - 1, self.vocabulary.eos_id
        inputs = spans_to_sentinels(text, mask, sentinel)
        targets = spans_to_sentinels(text, ~mask, sentinel)
        self._check_sentinels(len(targets) - int(np.count_nonzero(mask)), len(text))
        return Example(inputs=append_eos(inputs, eos), targets=append_eos(targets, eos))


@dataclasses.dataclass(frozen=True)
class TextToText:
    """A pair of texts, each with eos: read `inputs`, write `targets`. Nothing is random.

    inputs  [5, 6] -> [5, 6, 1]      targets [7] -> [7, 1]
    """

    vocabulary: Vocabulary

    features = ("inputs", "targets")
    makes = ("inputs", "targets")

    def fit(self, lengths: Mapping[str, int]) -> tuple[int, int]:
        """Room for eos is kept on both sides."""
        if min(lengths["encoder"], lengths["decoder"]) < 2:
            raise InputError(
                f"lengths {dict(lengths)} leave no room for a token and eos: expected 2 or more"
            )
        return lengths["encoder"] - 1, lengths["decoder"] - 1

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator | None = None) -> Example:
        """(inputs, targets) -> the same with eos appended."""
        inputs, targets = tokens
        eos = self.vocabulary.eos_id
        return Example(inputs=append_eos(inputs, eos), targets=append_eos(targets, eos))
