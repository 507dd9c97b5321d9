"""Positions: T5's relative bias, learned and sinusoidal embeddings, rotary angles.

Shapes: b batch, l length, q query length, k key length, h heads, d head width, e embed.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.kernels.plain import ByDistance
from t5x_lite.models import config_positions as config
from t5x_lite.models import weights
from t5x_lite.types import Array

Angles: TypeAlias = tuple[Array, Array]  # cosines and sines, see `rotary_angles`


def relative_bucket(
    relative_position: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """T5's bucket of `key position - query position`, as Mesh TensorFlow computes it.

    Bidirectional: half of the buckets for keys after the query. Otherwise keys after the query
    share bucket 0, since a causal mask hides them. In each half, distances below half the buckets
    are exact and the rest grow logarithmically up to `max_distance`.

    Args:
      relative_position: int32, any shape.

    Returns:
      int32 of the same shape, in `[0, num_buckets)`.
    """
    offset = jnp.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative_position > 0, num_buckets, 0).astype(jnp.int32)
        distance = jnp.abs(relative_position)
    else:
        distance = jnp.maximum(-relative_position, 0)
    exact = num_buckets // 2
    # The epsilon keeps log finite at 0, where the exact branch is taken anyway.
    ratio = jnp.log(distance.astype(jnp.float32) / exact + np.finfo(np.float32).eps)
    logarithmic = exact + (ratio / np.log(max_distance / exact) * (num_buckets - exact)).astype(
        jnp.int32
    )
    logarithmic = jnp.minimum(logarithmic, num_buckets - 1)
    return offset + jnp.where(distance < exact, distance, logarithmic)


class RelativeBias(nn.Module):
    """T5's learned bias `[1, h, q, k]` by bucketed distance, shared by the layers of a stack.

    Distances come from places in the row, not from `positions`: inside a packed segment the two
    agree, and pairs across segments are invisible; so one bias serves every row of the batch.
    """

    config: config.RelativeBias
    num_heads: int
    bidirectional: bool
    param_dtype: Any

    def __call__(self, query_places: Array, key_places: Array, dtype: Any) -> Array:
        """The bias `[1, h, q, k]`.

        Args: `query_places [q]` and `key_places [k]`, int32 places in the row. Where rows differ,
        `[b, q]` and `[b, k]`: the bias is `[b, h, q, k]` then.
        """
        distance = key_places[..., None, :] - query_places[..., :, None]
        bias = self._of(distance[None] if distance.ndim == 2 else distance, dtype)
        return jnp.moveaxis(bias, -1, 1)

    def by_distance(self, length: int) -> ByDistance:
        """The same, float32, of rows whose places are in order."""
        distance = jnp.arange(2 * length, dtype=jnp.int32) - (length - 1)
        return ByDistance(self._of(distance, jnp.float32).T)

    @nn.compact
    def _of(self, distance: Array, dtype: Any) -> Array:
        """A number a head: `[..., h]` of distances `[...]`."""
        init = nn.with_logical_partitioning(
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"), ("buckets", "heads")
        )
        shape = (self.config.num_buckets, self.num_heads)
        embedding = weights.parameter(self, "embedding", init, shape, self.param_dtype)
        bucket = relative_bucket(
            distance,
            bidirectional=self.bidirectional,
            num_buckets=self.config.num_buckets,
            max_distance=self.config.max_distance,
        )
        return weights.lookup(bucket, embedding, dtype)


def sinusoids(positions: Array, embed_dim: int, max_period: float) -> Array:
    """Sines, then cosines, of position times frequency: float32 `[b, l, e]` of int32 `[b, l]`.

    Frequency i of n = e / 2 is `max_period ** (-i / n)` (Vaswani et al. 2017, section 3.5, with
    sines and cosines in two halves, as BART's sinusoidal relatives and Marian have them).
    """
    half = (embed_dim + 1) // 2
    frequency = max_period ** (-np.arange(half, dtype=np.float32) / half)
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[..., :embed_dim]


def rotary_angles(rotary: config.Rotary, dim: int, positions: Array, before: int = 0) -> Angles:
    """Cosines and sines, float32 `[b, l, 1, d/2]`, of each position's angles.

    Angle i is `position * base ** (-2i / d)` (Su et al. 2021, equation 15), its frequencies as
    `rotary.scaling` changes them.

    Args:
      dim: d, the dimensions of a head that turn.
      positions: int32 `[b, l]`.
      before: how many positions come before the text's own.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / dim
    inverse: Array = (rotary.base**-exponents).astype(np.float32)
    factor = 1.0
    match rotary.scaling:
        case config.LinearScaling(factor=by):
            inverse = inverse / np.float32(by)
        case config.DynamicScaling(factor=by, original_length=original):
            longest = jnp.maximum(_lengths(positions) + before, original).astype(jnp.float32)
            base = rotary.base * (by * longest / original - (by - 1)) ** (dim / (dim - 2))
            inverse = base[..., None] ** -exponents[None, None, :]
        case config.Llama3Scaling() as scaling:
            inverse = _llama3_frequencies(inverse, scaling)
        case config.YarnScaling() as scaling:
            inverse = _yarn_frequencies(inverse, rotary.base, dim, scaling)
            factor = scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
    inverse = jnp.broadcast_to(inverse, (*positions.shape, dim // 2))
    angle = ((positions + before).astype(jnp.float32)[..., None] * inverse)[:, :, None, :]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def _lengths(positions: Array) -> Array:
    """Of each place's segment, its last position + 1: `0 1 2 0 1 -> 3 3 3 2 2`, int32 `[b, l]`.

    By segment, so that no row depends on what it is packed or batched with.
    """
    segments = jnp.cumsum(positions == 0, axis=1)
    last = jax.vmap(lambda p, s: jax.ops.segment_max(p, s, num_segments=p.shape[0] + 1))
    return jnp.take_along_axis(last(positions, segments), segments, axis=1) + 1


def rotate(x: Array, angles: Angles) -> Array:
    """`x [b, l, h, d]` with its first dimensions turned: i together with i + half of them.

    As many dimensions turn as `angles` cover; the rest stay. Computed in float32, in `x`'s dtype.
    """
    cosine, sine = angles
    half = cosine.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., 2 * half :]], -1)


def _llama3_frequencies(inverse: np.ndarray, scaling: config.Llama3Scaling) -> np.ndarray:
    """Waves longer than the original length are slowed down, short ones kept (Llama 3.1)."""
    turns = scaling.original_length * inverse / (2 * np.pi)  # within the original length
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (inverse * (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


def _yarn_frequencies(
    inverse: np.ndarray, base: float, dim: int, scaling: config.YarnScaling
) -> np.ndarray:
    """A ramp over dimensions, from kept to divided by the factor (Peng et al. 2023, 3.2)."""

    def dimension(turns: float) -> float:
        """The dimension whose wave turns so often within the original length."""
        return dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / 2 / math.log(base)

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), dim - 1)
    span = max(high - low, 0.001)
    divided = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / span, 0.0, 1.0)
    return (inverse * (1.0 - divided + divided / scaling.factor)).astype(np.float32)
