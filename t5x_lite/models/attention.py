"""Attention over a cache, and the multi-head module.

Shapes: b batch, q query length, k key length, h heads, d head width, e embed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5x_lite.kernels.plain import HIDDEN, ByDistance, Visibility, dot_product_attention, product
from t5x_lite.models import cache as kv_cache
from t5x_lite.models.cache import KeyValue
from t5x_lite.models.config import StackConfig
from t5x_lite.models.layers import Dense, Dropout
from t5x_lite.models.positions import Angles, rotate
from t5x_lite.models.weights import PROJECTED, prefix_rows
from t5x_lite.sharding import constrain
from t5x_lite.types import Array


def cached_attention(
    query: Array,
    key: Array,
    value: Array,
    visibility: Visibility,
    bias: Array | None = None,
    prefix: tuple[Array, Array] | None = None,
) -> Array:
    """`dot_product_attention` of a few tokens over a cache, whose heads stand before its places.

    Queries that read the same keys are rows of one product: the g heads that share a head of keys,
    and the m rows of queries that share a row of the cache (beams over one encoder's output).

    Args:
      query: `[b * m, q, h * g, d]`.
      key, value: `[b, h, k, d]`.
      visibility: of `b` or of `b * m` rows.
      bias: `[1 or b * m, h * g, q, k]`, of the prefix's p keys and the cache's.
      prefix: keys and values `[p, h, d]` ahead of the cache, which is not copied for them.

    Returns:
      `[b * m, q, h * g, d]` in `query`'s dtype.
    """
    rows, length, _, dim = query.shape
    batch, heads, places, _ = key.shape
    shape = batch, rows // batch, length, heads, -1, dim
    grouped = jnp.transpose(query.reshape(shape), (0, 3, 1, 4, 2, 5))  # [b, h, m, g, q, d]
    dimensions = (((3,), (3,)), ((0, 1), (0, 1)))
    logits = jax.lax.dot_general(
        grouped.reshape(batch, heads, -1, dim), key, dimensions, preferred_element_type=jnp.float32
    ).reshape(*grouped.shape[:-1], places)
    if prefix is not None:
        ahead = jnp.einsum(
            "bhmgqd,phd->bhmgqp", grouped, prefix[0], preferred_element_type=jnp.float32
        )
        logits = jnp.concatenate([ahead, logits], axis=-1)
        places = logits.shape[-1]
    if bias is not None:
        split = bias.astype(jnp.float32).reshape(-1, 1, heads, logits.shape[3], length, places)
        split = split.reshape(-1, logits.shape[2] if len(bias) > 1 else 1, *split.shape[2:])
        logits = logits + jnp.swapaxes(split, 1, 2)
    mask = visibility.mask()
    if mask is not None:
        shared = len(mask) in (1, batch)  # by the rows of queries that share a row of the cache
        mask = mask.reshape(-1, 1 if shared else logits.shape[2], 1, 1, *mask.shape[2:])
        logits = jnp.where(jnp.swapaxes(mask, 1, 2), logits, HIDDEN)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    flat = weights.astype(value.dtype).reshape(batch, heads, -1, places)
    behind = places - value.shape[2]
    attended = product(flat[..., behind:], value).reshape(grouped.shape)
    if prefix is not None:
        attended += jnp.einsum(
            "bhmgqp,phd->bhmgqd",
            weights[..., :behind].astype(value.dtype),
            prefix[1],
            preferred_element_type=jnp.float32,
        )
    attended = attended / total
    return jnp.transpose(attended, (0, 2, 4, 1, 3, 5)).reshape(query.shape).astype(query.dtype)


class MultiHeadAttention(nn.Module):
    """Attention of `x` over keys and values, which `key_value` projects from `x` or a memory.

    With fewer heads of keys and values than of queries, each serves as many queries in turn
    (grouped-query attention, Ainslie et al. 2023).
    """

    config: StackConfig
    embed_dim: int
    param_dtype: Any
    stddev: float | None = None
    out_stddev: float | None = None

    def setup(self) -> None:
        config, embed_dim = self.config, self.embed_dim
        names = ("embed", "heads", "kv")

        def dense(name: str, heads: int, scale: float = 1.0) -> Dense:
            return Dense(
                (heads, config.head_dim),
                names,
                self.param_dtype,
                scale=scale,
                use_bias=name in config.biases,
                stddev=self.stddev,
            )

        # Without 1/sqrt(d) in front of the logits, 1/d in the variance stands for it.
        unscaled = config.attention_scale == 1.0
        self.query = dense("query", config.num_heads, 1.0 / config.head_dim if unscaled else 1.0)
        self.key = dense("key", config.kv_heads)
        self.value = dense("value", config.kv_heads)
        self.out = Dense(
            (embed_dim,),
            ("heads", "kv", "embed"),
            self.param_dtype,
            in_axes=2,
            use_bias="out" in config.biases,
            stddev=self.out_stddev,
        )
        # T5 drops attention weights with one mask for all queries of a row, which is to drop
        # values: a key that is lost is lost to every query.
        self.drop = Dropout(config.dropout, (-1,))

    def key_value(self, memory: Array, angles: Angles | None = None) -> tuple[Array, Array]:
        """Keys and values `[b, k, kv heads, d]` of `memory [b, k, e]`, keys turned by `angles`."""
        names = ("batch", "length", "heads", "kv")
        key, value = self.key(memory), self.value(memory)
        if angles is not None:
            key = rotate(key, angles)
        return checkpoint_name(constrain(key, *names), PROJECTED), constrain(value, *names)

    def __call__(
        self,
        x: Array,
        key_value: tuple[Array, Array],
        visibility: Visibility,
        bias: Array | ByDistance | None,
        angles: Angles | None,
        deterministic: bool,
    ) -> Array:
        """`[b, q, e]` from `x [b, q, e]`; `angles` turn the queries."""
        config = self.config
        query = self._queries(x, angles)
        if (prefix := self._prefix(x.dtype)) is not None:
            key_value = tuple(
                jnp.concatenate([jnp.broadcast_to(rows, (len(x), *rows.shape)), part], axis=1)
                for rows, part in zip(prefix, key_value, strict=True)
            )
            visibility = dataclasses.replace(visibility, ahead=len(prefix[0]))
        key, value = (
            jnp.repeat(part, config.num_heads // config.kv_heads, axis=2)
            if config.kv_heads != config.num_heads
            else part
            for part in key_value
        )
        value = self.drop(value, deterministic)
        if config.attention == "flash":
            # Pallas for TPUs is a fifteenth of a second to import: for those who want it.
            from t5x_lite.kernels import flash

            attended = flash.attention(query, key, value, visibility, bias)
        else:
            assert not isinstance(bias, ByDistance)
            attended = dot_product_attention(query, key, value, visibility, bias)
        return self.out(constrain(attended, "batch", "length", "heads", "kv"))

    def cached(
        self,
        x: Array,
        cache: KeyValue,
        visibility: Visibility,
        bias: Array | None,
        angles: Angles | None,
    ) -> Array:
        """The same over a cache `[b, heads, k, d]`, without dropout."""
        query = self._queries(x, angles)
        names = ("batch", "heads", "length", "kv")
        key, value = (constrain(kv_cache.read(part, query.dtype), *names) for part in cache)
        if (prefix := self._prefix(query.dtype)) is not None:
            visibility = dataclasses.replace(visibility, ahead=len(prefix[0]))
        attended = cached_attention(query, key, value, visibility, bias, prefix)
        return self.out(constrain(attended, "batch", "length", "heads", "kv"))

    def _prefix(self, dtype: Any) -> tuple[Array, Array] | None:
        """Keys and values `[p, kv heads, d]` that every query sees ahead of the others, if any.

        They stand in the parameters (see `weights.prefix_rows`), and no angle turns them.
        """
        own = self.variables.get("params", {})
        key, value = (prefix_rows(own.get(name, {}).get("kernel")) for name in ("key", "value"))
        return None if key is None or value is None else (key.astype(dtype), value.astype(dtype))

    def _queries(self, x: Array, angles: Angles | None) -> Array:
        """Queries `[b, q, heads, d]`, turned and scaled."""
        config = self.config
        query = self.query(x)
        if angles is not None:
            query = rotate(query, angles)
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        if scale != 1.0:
            query = query * jnp.asarray(scale, query.dtype)
        # What attention reads is kept where projections are, so that it is not turned again.
        return checkpoint_name(constrain(query, "batch", "length", "heads", "kv"), PROJECTED)
