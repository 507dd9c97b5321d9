"""The key-value cache of decoding: a pytree that goes in and comes out.

Shapes: layers, b batch, c capacity in tokens, k encoder length, h heads of keys and values,
d head width.
"""

from __future__ import annotations

import flax.struct
import jax

from t5x_lite.types import Array

KeyValue = tuple[Array, Array]


@flax.struct.dataclass
class LayerCache:
    """One layer's keys and values, or all layers' stacked on a first axis.

    `self_attention`: what the decoder wrote so far, two arrays `[b, c, h, d]`.
    `cross_attention`: projections of the encoder's output `[b, k, h, d]`, written by prefill and
    only read afterwards; None without an encoder, and before prefill.
    """

    self_attention: KeyValue
    cross_attention: KeyValue | None = None


@flax.struct.dataclass
class Cache:
    """All a decoder needs to go on: `layers` stacked `[layers, ...]`, and where it stands."""

    layers: LayerCache
    index: Array  # int32 scalar: places written, the same in every row
    positions: Array  # int32 [b]: the next token's, smaller than `index` behind padding on the left
    segment_ids: Array | None = None  # int32 [b, c]: 0 hides the prompt's padding; None: none
    memory_segment_ids: Array | None = None  # int32 [b, k]: 0 hides the encoder's padding

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.layers.self_attention[0].shape[2]


def write(cache: KeyValue, new: KeyValue, index: Array) -> KeyValue:
    """`new [b, n, h, d]` written into `cache [b, c, h, d]` from place `index` on."""
    key, value = (
        jax.lax.dynamic_update_slice_in_dim(old, part.astype(old.dtype), index, axis=1)
        for old, part in zip(cache, new, strict=True)
    )
    return key, value
