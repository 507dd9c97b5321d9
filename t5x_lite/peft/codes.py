"""Numbers as small codes: NF4, int8, and the scales of NF4 as 8-bit codes in turn.

A block is so many numbers one after the other along a weight's inputs; its scale is the largest of
their absolute values. NF4's 16 values are quantiles of a normal distribution, scaled to [-1, 1],
with an exact zero (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, 3); codes lie two to a byte, the
first in the upper four bits. int8 has one block for each output, the whole of its inputs: a scale
costs nothing then, and 127 steps are fine enough for trained weights without blocks (the
vector-wise quantisation of LLM.int8, Dettmers et al. 2022, arXiv:2208.07339, 3.1). Double
quantisation takes the mean from NF4's scales and stores them in 8 bits, in groups of 256 (QLoRA,
3.2), by the dynamic code of Dettmers 2015 (arXiv:1511.04561).

Codes, scales and their order are those of bitsandbytes for the transposed weight, as torch has it.

Shapes: n inputs, m outputs, s scales of an output, g groups of scales.
"""

from __future__ import annotations

import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.types import Array

# The table in QLoRA's appendix E, in float32.
NF4: Final = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
GROUP: Final = 256  # scales that share a scale of their own


def quantise(w: Array, kind: str, block: int) -> tuple[Array, Array]:
    """Codes and scales of `w [n, m]`, in blocks of `block` inputs.

    Returns:
      Codes, uint8 `[n / 2, m]` for "nf4" and int8 `[n, m]` for "int8", and scales, float32
      `[n / block, m]`.
    """
    blocks = w.astype(jnp.float32).reshape(-1, block, w.shape[1])
    scales = jnp.max(jnp.abs(blocks), axis=1)
    unit = blocks / jnp.where(scales > 0, scales, 1)[:, None]
    if kind == "int8":
        return jnp.round(unit * 127).astype(jnp.int8).reshape(w.shape), scales
    codes = nearest(unit, NF4).reshape(-1, 2, w.shape[1])
    return codes[:, 0] << 4 | codes[:, 1], scales


def values(codes: Array, axis: int) -> Array:
    """What codes stand for in units of their scale: float32 in [-1, 1].

    Bytes of two NF4 codes (uint8) become two neighbours along `axis`; int8 codes keep their shape.
    """
    if codes.dtype == jnp.int8:
        return codes.astype(jnp.float32) / 127
    ones = (1,) * (axis + 1), (1,) * (codes.ndim - axis - 1)
    shift = jnp.array([4, 0], jnp.int32).reshape(*ones[0], 2, *ones[1])
    pairs = jnp.expand_dims(codes, axis + 1).astype(jnp.int32) >> shift
    # A tree of selections: vector units have no fast lookup in a table, however short.
    found = list(map(jnp.float32, NF4))
    for bit in range(4):
        is_set = (pairs >> bit) & 1 != 0
        found = [jnp.where(is_set, *pair[::-1]) for pair in zip(*[iter(found)] * 2, strict=True)]
    shape = list(codes.shape)
    shape[axis] *= 2
    return found[0].reshape(shape)


def quantise_scales(scales: Array) -> tuple[Array, Array, Array]:
    """8-bit codes of `scales [s, m]`: uint8 `[s, m]`, float32 scales `[g]` and the mean `[]`."""
    ordered = scales.T.reshape(-1)
    mean = jnp.mean(ordered)
    groups = jnp.pad(ordered - mean, (0, -ordered.size % GROUP)).reshape(-1, GROUP)
    largest = jnp.max(jnp.abs(groups), axis=1)
    codes = nearest(groups / jnp.where(largest > 0, largest, 1)[:, None], dynamic_map())
    return codes.reshape(-1)[: ordered.size].reshape(scales.shape[::-1]).T, largest, mean


def scales_of(codes: Array, groups: Array, mean: Array) -> Array:
    """The inverse of `quantise_scales`: float32 `[s, m]`."""
    place = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 0)
    place = place + codes.shape[0] * jax.lax.broadcasted_iota(jnp.int32, codes.shape, 1)
    return jnp.asarray(dynamic_map())[codes] * groups[place // GROUP] + mean


def nearest(x: Array, book: np.ndarray) -> Array:
    """Indices, uint8, of the entries of a rising `book` that are nearest to `x`."""
    middles = (book[1:] + book[:-1]) / 2
    if len(book) > 16:
        return jnp.searchsorted(jnp.asarray(middles), x).astype(jnp.uint8)
    index = jnp.zeros(x.shape, jnp.uint8)
    for middle in middles:  # no [..., 15] array
        index = index + (x > middle).astype(jnp.uint8)
    return index


@functools.cache
def dynamic_map() -> np.ndarray:
    """256 rising values in (-1, 1], spaced more finely the nearer to zero.

    Seven decades, of which the n-th from below has 2^n values of either sign, equally spaced, each
    in the middle of its part of [0.1, 1]; and 0 and 1.
    """
    positive = []
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1, dtype=np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.append(np.float64(10.0 ** (decade - 6)) * middles.astype(np.float64))
    one_sign = np.concatenate(positive)
    return np.sort(np.concatenate([-one_sign, [0.0], one_sign, [1.0]])).astype(np.float32)
