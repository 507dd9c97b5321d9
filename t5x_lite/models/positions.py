"""Positions: T5's relative bias.

Shapes: q query length, k key length, h heads.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from t5x_lite.models import config
from t5x_lite.types import Array


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

    @nn.compact
    def __call__(self, query_places: Array, key_places: Array, dtype: Any) -> Array:
        """Args: `query_places [q]` and `key_places [k]`, int32 places in the row."""
        init = nn.with_logical_partitioning(
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"), ("buckets", "heads")
        )
        shape = (self.config.num_buckets, self.num_heads)
        embedding = self.param("embedding", init, shape, self.param_dtype)
        bucket = relative_bucket(
            key_places[None, :] - query_places[:, None],
            bidirectional=self.bidirectional,
            num_buckets=self.config.num_buckets,
            max_distance=self.config.max_distance,
        )
        bias = jnp.take(embedding, bucket, axis=0)  # [q, k, h]
        return jnp.moveaxis(bias, -1, 0)[None].astype(dtype)
