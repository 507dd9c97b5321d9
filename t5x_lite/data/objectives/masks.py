"""Noise masks: which tokens of a text are hidden, bool `[length]`.

T5's span masks are those of its published code (`t5/data/preprocessors.py`; Raffel et al. 2020,
arXiv:1910.10683, section 3.3.4). Counts match it exactly, including its arithmetic: float32
products, rounded half to even. Which spans are drawn depends on the generator, as there.
"""

from __future__ import annotations

import numpy as np


def noise_count(length: int, density: float) -> int:
    """How many of `length` tokens a share of `density` is: rounded, half to even, but at least 1.

    7 tokens at 0.15 give 1, 512 give 77; none of none.
    """
    return min(max(round(length * density), 1), length)


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
    # Lengths of kept, noise, kept, noise ... spans.
    lengths: np.ndarray = np.empty(2 * spans, dtype=np.int64)
    lengths[1::2] = random_segmentation(noise_tokens, spans, rng)
    lengths[0::2] = random_segmentation(max(length, 2) - noise_tokens, spans, rng)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)[:length]


def iid_noise_mask(
    length: int, rng: np.random.Generator, *, noise_density: float = 0.15
) -> np.ndarray:
    """`noise_count` tokens anywhere, every set of them as likely as another.

        length 8, noise_density 0.4:    0 1 1 0 0 0 0 1

    The published mask draws each token by itself; a given number gives the lengths a bound.
    """
    mask: np.ndarray = np.zeros(length, dtype=bool)
    mask[rng.permutation(length)[: noise_count(length, noise_density)]] = True
    return mask


def suffix_noise_mask(length: int, *, noise_density: float = 0.25) -> np.ndarray:
    """The last `noise_count` tokens: `length` 8 at 0.25 gives 0 0 0 0 0 0 1 1."""
    mask: np.ndarray = np.zeros(length, dtype=bool)
    mask[length - noise_count(length, noise_density) :] = True
    return mask


def run_starts(mask: np.ndarray) -> np.ndarray:
    """Where a run of True begins: `0 1 1 0 1` -> `0 1 0 0 1`."""
    before = np.empty_like(mask)
    before[:1] = False
    before[1:] = mask[:-1]
    return mask > before
