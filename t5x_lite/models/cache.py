"""The key-value cache of decoding: a pytree that goes in and comes out.

Arrays are `[b, h, c, d]`, one of each a layer: what one new token reads lies in memory in the order
in which it is read (T5 1.1 small's cross-attention, batch 8 x 512, on a CPU: 7 ms a token, against
96 for the projections' own `[b, c, h, d]`), and each layer's is written in place.

Shapes: layers, b batch, n new tokens, c capacity in tokens, k encoder length, h heads of keys and
values, d head width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp

from t5x_lite.types import Array

DTYPES = ("float32", "bfloat16", "int8")
CacheDtype = Literal["float32", "bfloat16", "int8"]


@flax.struct.dataclass
class Rounded:
    """Vectors as 8-bit integers, each with its largest element at 127: `values * scale`."""

    values: Array  # int8 [b, h, c, d]
    scale: Array  # float32 [b, h, c]


Vectors: TypeAlias = Array | Rounded
KeyValue: TypeAlias = tuple[Vectors, Vectors]


@flax.struct.dataclass
class LayerCache:
    """One layer's keys and values.

    `self_attention`: what the decoder wrote so far, two `[b, h, c, d]`. `cross_attention`:
    projections of the encoder's output, two `[b, h, k, d]`, written by prefill and only read
    afterwards; None without an encoder.
    """

    self_attention: KeyValue
    cross_attention: KeyValue | None = None


@flax.struct.dataclass
class Cache:
    """All a decoder needs to go on: keys and values a layer, and where it stands.

    With a `window`, every token sees the last `window` alone, itself included, and the places are
    used in turn: a token's is its index modulo the capacity.
    """

    layers: tuple[LayerCache, ...]
    index: Array  # int32 tokens written: a scalar, the same in every row, or [b]
    positions: Array  # int32 [b]: the next token's, smaller than `index` behind padding on the left
    segment_ids: Array | None = None  # int32 [b, c]: 0 hides the prompt's padding; None: none
    memory_segment_ids: Array | None = None  # int32 [b, k]: 0 hides the encoder's padding
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    # (p, n): from place p on, the n tokens of a call are alternatives at one place in the text, as
    # the beams of a search are, and `extend` is told which places each of them goes on from.
    branches: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def capacity(self) -> int:
        """Places."""
        return length(self.layers[0].self_attention)

    def query_places(self, count: int) -> Array:
        """Where the next `count` tokens stand in the text: int32 `[count]`, or `[b, count]`."""
        ahead = jnp.arange(count, dtype=jnp.int32)
        if self.index.ndim:
            return self._in_text(self.index[:, None] + ahead[None])
        return self._in_text(self.index + ahead)

    def key_places(self, ahead: int) -> Array:
        """Where each place stands in the text once `ahead` more are written: `[c]` or `[b, c]`.

        The last one of its place; a number behind all others where there is none yet.
        """
        last = self.index + ahead - 1
        places = jnp.arange(self.capacity, dtype=jnp.int32)
        if last.ndim:
            last, places = last[:, None], places[None]
        token = last - (last - places) % self.capacity
        return self._in_text(jnp.where(token < 0, jnp.iinfo(jnp.int32).max, token))

    def _in_text(self, place: Array) -> Array:
        """A place's place in the text: the same, without branches."""
        if self.branches is None:
            return place
        prompt, count = self.branches
        return jnp.where(place < prompt, place, prompt + (place - prompt) // count)


def start(written: LayerCache, capacity: int, dtype: CacheDtype | None) -> LayerCache:
    """A layer's cache from what a prompt wrote there, `[b, n, h, d]` and `[b, k, h, d]`.

    Args:
      capacity: see `placed`.
      dtype: what to keep vectors in; None: `written`'s.
    """
    by_head = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), written)
    key, value = (placed(x, capacity, 2) for x in by_head.self_attention)
    return jax.tree.map(
        lambda x: rounded(x, dtype), dataclasses.replace(by_head, self_attention=(key, value))
    )


def placed(x: Array, capacity: int, axis: int, fill: int = 0) -> Array:
    """Tokens 0, 1, ... along `axis`, at their places: `capacity` long, the rest `fill`.

    If there are more, the last ones, each where its index modulo the capacity says:
    a b c d e, capacity 3 -> d e c.
    """
    tokens = x.shape[axis]
    if tokens > capacity:
        last = jax.lax.slice_in_dim(x, tokens - capacity, tokens, axis=axis)
        return jnp.roll(last, tokens % capacity, axis=axis)
    room = [(0, capacity - tokens if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, room, constant_values=fill)


def write(cache: KeyValue, new: tuple[Array, Array], index: Array) -> KeyValue:
    """Keys and values `[b, n, h, d]` of tokens `index`, ... (int32, scalar or `[b]`) put down."""
    key, value = (
        jax.tree.map(
            lambda x, y: write_places(x, y, index, 2),
            old,
            rounded(jnp.swapaxes(part, 1, 2), "int8" if isinstance(old, Rounded) else old.dtype),
        )
        for old, part in zip(cache, new, strict=True)
    )
    return key, value


def write_places(old: Array, new: Array, index: Array, axis: int) -> Array:
    """`new [b, ...]` in `old`, along `axis` from place `index` (scalar or `[b]`), modulo its size.

    More than one token at once must fit before the end.
    """
    index = index % old.shape[axis]
    put = jax.lax.dynamic_update_slice_in_dim
    if index.ndim == 0:
        return put(old, new, index, axis)
    return jax.vmap(lambda x, y, i: put(x, y, i, axis - 1))(old, new, index)


def read(vectors: Vectors, dtype: jnp.dtype) -> Array:
    """The vectors `[b, h, c, d]` in `dtype`."""
    if isinstance(vectors, Rounded):
        return vectors.values.astype(dtype) * vectors.scale[..., None].astype(dtype)
    return vectors.astype(dtype)


def rounded(vectors: Array, dtype: CacheDtype | jnp.dtype | None) -> Vectors:
    """`vectors [b, h, c, d]` as the cache keeps them."""
    if dtype is None:
        return vectors
    if dtype != "int8":
        return vectors.astype(dtype)
    scale = jnp.max(jnp.abs(vectors), axis=-1).astype(jnp.float32) / 127.0
    safe = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    values = jnp.round(vectors.astype(jnp.float32) / safe[..., None])
    return Rounded(values.astype(jnp.int8), scale)


def length(key_value: KeyValue) -> int:
    """Places of a cache."""
    key = key_value[0]
    return (key.values if isinstance(key, Rounded) else key).shape[2]
