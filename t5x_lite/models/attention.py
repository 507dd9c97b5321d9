"""Attention: who may see whom, the plain kernel, and the multi-head module.

Shapes: b batch, q query length, k key length, h heads, d head width, e embed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from t5x_lite.models.cache import KeyValue
from t5x_lite.models.layers import Dense, Dropout
from t5x_lite.sharding import constrain
from t5x_lite.types import Array

# Exactly zero after softmax in float32 wherever a row sees at least one key; finite, so that a row
# that sees none is uniform instead of NaN.
_HIDDEN = -1e10


@flax.struct.dataclass
class Visibility:
    """Which keys a query sees, as data: packing, causality and prefixes.

    A kernel either honours every field that is set or raises; none may be ignored.
    """

    query_segments: Array | None = None  # [b, q] int32; a query sees keys of its own segment only
    key_segments: Array | None = None  # [b, k]
    query_places: Array | None = None  # [q] int32; with key_places: only keys not after the query
    key_places: Array | None = None  # [k]
    key_prefix: Array | None = None  # [b, k]: nonzero keys are seen ahead of causality (prefix LM)

    def mask(self) -> Array | None:
        """True where visible: bool `[b or 1, 1, q, k]`, or None if all is visible to all."""
        visible = None
        if self.query_places is not None and self.key_places is not None:
            visible = (self.key_places[None, :] <= self.query_places[:, None])[None, None]
            if self.key_prefix is not None:
                visible = visible | (self.key_prefix != 0)[:, None, None, :]
        if self.query_segments is not None and self.key_segments is not None:
            same = self.query_segments[:, None, :, None] == self.key_segments[:, None, None, :]
            visible = same if visible is None else visible & same
        return visible


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    visibility: Visibility,
    bias: Array | None = None,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Array:
    """Plain attention, the reference for every other kernel; softmax in float32.

    T5 does not scale by `1/sqrt(d)`: its query initialisation does.

    Args:
      query: `[b, q, h, d]`.
      key, value: `[b, k, h, d]`.
      visibility: see `Visibility`.
      bias: `[1 or b, h, q, k]`, added to the logits.
      drop: dropout for the attention weights `[b, h, q, k]`.

    Returns:
      `[b, q, h, d]` in `query`'s dtype.
    """
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    mask = visibility.mask()
    if mask is not None:
        logits = jnp.where(mask, logits, _HIDDEN)
    weights = drop(jax.nn.softmax(logits, axis=-1).astype(value.dtype))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class MultiHeadAttention(nn.Module):
    """Attention of `x` over keys and values, which `key_value` projects from `x` or a memory."""

    num_heads: int
    head_dim: int
    embed_dim: int
    dropout: float
    param_dtype: Any

    def setup(self) -> None:
        features, names = (self.num_heads, self.head_dim), ("embed", "heads", "kv")
        # 1/d in variance stands for the missing 1/sqrt(d) in front of the logits.
        self.query = Dense(features, names, self.param_dtype, scale=1.0 / self.head_dim)
        self.key = Dense(features, names, self.param_dtype)
        self.value = Dense(features, names, self.param_dtype)
        self.out = Dense((self.embed_dim,), ("heads", "kv", "embed"), self.param_dtype, in_axes=2)
        self.drop = Dropout(self.dropout, (-2,))

    def key_value(self, memory: Array) -> KeyValue:
        """Keys and values `[b, k, h, d]` of `memory [b, k, e]`."""
        names = ("batch", "length", "heads", "kv")
        return constrain(self.key(memory), *names), constrain(self.value(memory), *names)

    def __call__(
        self,
        x: Array,
        key_value: KeyValue,
        visibility: Visibility,
        bias: Array | None,
        deterministic: bool,
    ) -> Array:
        """`[b, q, e]` from `x [b, q, e]`."""
        query = constrain(self.query(x), "batch", "length", "heads", "kv")
        drop = functools.partial(self.drop, deterministic=deterministic)
        attended = dot_product_attention(query, *key_value, visibility, bias, drop)
        return self.out(constrain(attended, "batch", "length", "heads", "kv"))
